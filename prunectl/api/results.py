"""Results of the functions: those of the engine, with a text, an HTML page, a JSON document and a DataFrame of them."""

from __future__ import annotations

import html
import importlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from prunectl.analysis.patterns import SparsityMap, sparsity_maps
from prunectl.analysis.sizes import CodecName, get_codec
from prunectl.analysis.stats import ModelStats
from prunectl.analysis.tensor_io import ProgressFactory, no_progress
from prunectl.calibration.sensitivity import Sensitivity
from prunectl.channels.groups import ChannelGroups
from prunectl.checks.diff import ModelDiff
from prunectl.checks.rules import Finding, Findings
from prunectl.checks.suggest import Proposal
from prunectl.commands.diff import diff_report
from prunectl.commands.doctor import Extra, doctor_report
from prunectl.commands.export import export_report
from prunectl.commands.init import init_report
from prunectl.commands.size import size_report
from prunectl.commands.strip import strip_report
from prunectl.commands.verify import verify_report
from prunectl.errors import MissingExtraError
from prunectl.exporting.compare import ExportResult
from prunectl.formats.registry import open_model
from prunectl.pruning.strip import Stripped
from prunectl.reporting.check import check_report
from prunectl.reporting.finetune import finetune_report
from prunectl.reporting.inspect import add_channel_groups, inspect_report
from prunectl.reporting.report import Column, Failure, Report, Section, Table, Unit, report_json
from prunectl.reporting.sensitivity import add_sensitivity
from prunectl.reporting.sweep import sweep_report
from prunectl.sweeping.sweep import Swept, pareto_front
from prunectl.sweeping.trial import BASELINE
from prunectl.training.evaluate import Evaluation
from prunectl.training.finetune import FinetuneResult
from prunectl.units import Units, count, nbytes, percent

_FRAME = "width:100%;height:30em;border:1px solid #8884;border-radius:4px"
_MOST_LINES = 10


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a function."""

    label: str
    """The work in progress, such as `reading model.h5`."""
    done: int
    """Bytes, steps or trials done, as the work counts them."""
    total: int
    """All there are; 0 where that is unknown."""


OnProgress = Callable[[Progress], object] | None
"""Called as work progresses, in the caller's process and often in the caller's thread."""


class _Teller:
    """A progress bar that calls a function instead of drawing."""

    def __init__(self, tell: Callable[[Progress], object], label: str, total: int) -> None:
        self._tell, self._label, self._total, self._done = tell, label, total, 0

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._tell(Progress(self._label, self._done, self._total))


def meter_of(on_progress: OnProgress) -> ProgressFactory:
    """A factory of progress bars that call a function."""
    if on_progress is None:
        return no_progress
    if not callable(on_progress):
        raise TypeError(f"on_progress must be a function, not {type(on_progress).__name__}")
    return lambda label, total: nullcontext(_Teller(on_progress, label, total))


class Result(ABC):
    """The base of all results: presentations of the values that the engine returned."""

    __slots__ = ()
    command: ClassVar[str]
    """The command that prints the same report."""

    @abstractmethod
    def report(self) -> Report:
        """The report of the command on this result."""

    @abstractmethod
    def lines(self) -> tuple[str, ...]:
        """The result in a few lines, the last of them what to do next."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command, as `--json` prints it."""
        document: dict[str, Any] = json.loads(report_json(self.report(), self.command))
        return document

    def to_pandas(self) -> Any:
        """The main table of the report as a DataFrame, with numbers as numbers; needs pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise MissingExtraError(
                "to_pandas needs pandas, which is not installed", hint="pip install pandas"
            ) from error
        table = self.report().table
        return pandas.DataFrame([*table.rows], columns=[column.name for column in table.columns])

    def _maps(self) -> Mapping[str, tuple[SparsityMap, ...]]:
        """Maps of the zeros for the HTML page."""
        return {}

    def _repr_html_(self) -> str:
        """The page of `--html` in a frame, which keeps its style apart from the notebook's."""
        page = importlib.import_module("prunectl.reporting.html").page
        document = page(replace(self.report(), sparsity_maps=self._maps()), self.command, Units.SI)
        return f'<iframe style="{_FRAME}" sandbox="allow-scripts" srcdoc="{html.escape(document)}"></iframe>'

    def __repr__(self) -> str:
        first, *rest = self.lines()
        return "\n".join([first, *(f"  {line}" for line in rest)][:_MOST_LINES])


class EngineResult(Result):
    """A result with the fields of a result of the engine."""

    __slots__ = ()

    @classmethod
    def of(cls, result: Any, **more: Any) -> Self:
        """The result of the engine, with further fields."""
        return cls(**{field.name: getattr(result, field.name) for field in fields(result)}, **more)


def size_lines(before: ModelStats, after: ModelStats) -> tuple[str, ...]:
    """Sizes on disk and compressed, and the sparsity, before and after."""
    lines = [f"on disk   {nbytes(before.bytes.raw)} -> {nbytes(after.bytes.raw)}"]
    if before.bytes.compressed is not None and after.bytes.compressed is not None:
        lines.append(f"gzip      {nbytes(before.bytes.compressed)} -> {nbytes(after.bytes.compressed)}")
    if before.params.total != after.params.total:
        lines.append(f"weights   {count(before.params.total)} -> {count(after.params.total)}")
    if before.prunable_sparsity is not None and after.prunable_sparsity is not None:
        lines.append(f"sparsity  {percent(before.prunable_sparsity)} -> {percent(after.prunable_sparsity)}")
    return tuple(lines)


def title_of(before: ModelStats, output: str) -> str:
    """The headline: the model and its output."""
    return f"{before.path} -> {output or '(nothing was written)'}"


def _stats_lines(stats: ModelStats) -> tuple[str, ...]:
    lines = [f"{stats.path} ({stats.format})", f"on disk   {nbytes(stats.bytes.raw)}"]
    if stats.bytes.packed is not None:
        lines.append(f"packed    {nbytes(stats.bytes.packed)}")
    if stats.bytes.compressed is not None:
        lines.append(f"gzip      {nbytes(stats.bytes.compressed)}")
    lines.append(f"weights   {count(stats.params.total)} in {count(len(stats.layers))} tensors")
    if stats.prunable_sparsity is not None:
        lines.append(f"sparsity  {percent(stats.prunable_sparsity)}")
    return tuple(lines)


@dataclass(frozen=True, slots=True, repr=False)
class InspectResult(EngineResult, ModelStats):
    """A model, measured."""

    groups: ChannelGroups | None = None
    """Its dependency groups: channels that are cut together."""
    sensitivity: Sensitivity | None = None
    """The damage of pruning each tensor alone."""
    command: ClassVar[str] = "inspect"

    def report(self) -> Report:
        """The report of `inspect`."""
        report = inspect_report([self], [], has_flops=self.macs is not None)
        report = report if self.sensitivity is None else add_sensitivity(report, [self.sensitivity])
        return report if self.groups is None else add_channel_groups(report, [self.groups])

    def lines(self) -> tuple[str, ...]:
        """Sizes and sparsity, and the first piece of advice."""
        return (*_stats_lines(self), *self.advice[:1], f"Next: prunectl.prune({self.path!r}, OUTPUT, sparsity='80%')")

    def _maps(self) -> Mapping[str, tuple[SparsityMap, ...]]:
        # Read when the page is drawn: by then the file may be gone or changed.
        if not os.path.exists(self.path):
            return {}
        model = open_model(Path(self.path))
        return {self.path: sparsity_maps(model, self) if model.nbytes == self.bytes.raw else ()}


@dataclass(frozen=True, slots=True, repr=False)
class SizeResult(EngineResult, ModelStats):
    """The sizes of a model: as it is, packed, and compressed."""

    codec: str = CodecName.GZIP.value
    level: int | None = None
    command: ClassVar[str] = "size"

    def report(self) -> Report:
        """The report of `size`."""
        return size_report([self], [], [], get_codec(CodecName(self.codec), self.level))

    def lines(self) -> tuple[str, ...]:
        """Sizes and sparsity."""
        return tuple(line.replace("gzip", self.codec, 1) for line in _stats_lines(self))


@dataclass(frozen=True, slots=True, repr=False)
class StripResult(EngineResult, Stripped):
    """What was removed, and sizes before and after."""

    output: str = ""
    """What was written; empty where nothing was."""
    is_rewritten: bool = False
    """Whether the remaining tensors were packed or stored as halves."""
    command: ClassVar[str] = "strip"

    def report(self) -> Report:
        """The report of `strip`."""
        return strip_report(self, self.output, is_rewritten=self.is_rewritten)

    def lines(self) -> tuple[str, ...]:
        """Sizes before and after, and what was removed."""
        removed = f"removed   {nbytes(sum(item.bytes for item in self.removed))} in {count(len(self.removed))} parts"
        return (title_of(self.before, self.output), *size_lines(self.before, self.after), removed)


@dataclass(frozen=True, slots=True, repr=False)
class TrainingResult(EngineResult, FinetuneResult):
    """The result of a training run."""

    output: str = ""
    command: ClassVar[str] = "finetune"

    def report(self) -> Report:
        """The report of `finetune`."""
        return finetune_report(self, self.before.path, self.output)

    def lines(self) -> tuple[str, ...]:
        """Sizes and metrics before and after."""
        metrics = tuple(
            f"{name}  {self.judged_before[name]:.4g} -> {value:.4g}"
            for name, value in [*self.judged_after.items()][:3]
            if name in self.judged_before
        )
        course = f"epochs    {len(self.history)} ({count(self.course.steps)} steps)"
        return (
            title_of(self.before, self.output),
            *size_lines(self.before, self.after),
            course,
            *metrics,
            f"Next: prunectl.size({self.output!r})",
        )


@dataclass(frozen=True, slots=True, repr=False)
class ConversionResult(EngineResult, ExportResult):
    """The result of an export, compared with its source."""

    output: str = ""
    command: ClassVar[str] = "export"

    def report(self) -> Report:
        """The report of `export`."""
        return export_report(self, self.output)

    def lines(self) -> tuple[str, ...]:
        """Formats, sizes, and whether both models compute the same outputs."""
        compared = "equal bit by bit" if self.comparison is None else "the outputs agree"
        formats = f"format    {self.source} -> {self.target} ({compared})"
        return (title_of(self.before, self.output), formats, *size_lines(self.before, self.after))


@dataclass(frozen=True, slots=True, repr=False)
class CheckResult(EngineResult, Findings):
    """The verdicts on all budgets."""

    command: ClassVar[str] = "check"

    @property
    def is_ok(self) -> bool:
        """Whether no model exceeds a limit, and all could be read."""
        return self.exit_code == 0

    def report(self) -> Report:
        """The report of `check`."""
        return check_report(self, has_gates=True)

    def lines(self) -> tuple[str, ...]:
        """How many limits are exceeded, and the first of them."""
        verdict = f"{len(self.failed)} failed, {len(self.warned)} warned, of {len(self.findings)} limits"
        failed = tuple(f"FAIL {finding.model}: {finding.id}" for finding in self.failed[:6])
        return (f"{self.file}: {verdict}", f"models    {count(self.models)}", *failed)


@dataclass(frozen=True, slots=True, repr=False)
class DiffResult(EngineResult, ModelDiff):
    """Two models compared tensor by tensor, and the differences that are not allowed."""

    findings: tuple[Finding, ...] = ()
    command: ClassVar[str] = "diff"

    @property
    def is_ok(self) -> bool:
        """Whether there is no difference that is not allowed."""
        return not any(finding.is_failure for finding in self.findings)

    def report(self) -> Report:
        """The report of `diff`."""
        return diff_report(self, self.findings, has_gates=True)

    def lines(self) -> tuple[str, ...]:
        """How many tensors differ, and by how much the sizes do."""
        kinds = dict.fromkeys(change.kind for change in self.changes)
        counted = (f"{sum(change.kind == kind for change in self.changes)} {kind}" for kind in kinds)
        return (title_of(self.old, self.new.path), f"tensors   {', '.join(counted)}", *size_lines(self.old, self.new))


@dataclass(frozen=True, slots=True, repr=False)
class VerifyResult(Result):
    """The checks of a pruned model against its manifest or source."""

    path: str
    findings: tuple[Finding, ...]
    command: ClassVar[str] = "verify"

    @property
    def is_ok(self) -> bool:
        """Whether all checks passed."""
        return not any(finding.is_failure for finding in self.findings)

    def report(self) -> Report:
        """The report of `verify`."""
        return verify_report(self.path, self.findings, has_gates=True)

    def lines(self) -> tuple[str, ...]:
        """Each check that failed."""
        failed = [finding for finding in self.findings if finding.is_failure]
        verdict = f"{len(failed)} of {len(self.findings)} checks failed" if failed else "all checks passed"
        return (f"{self.path}: {verdict}", *(f"FAIL {finding.id}: {finding.note}" for finding in failed))


@dataclass(frozen=True, slots=True, repr=False)
class SweepResult(EngineResult, Swept):
    """The trials of a sweep."""

    model: str = ""
    command: ClassVar[str] = "sweep"

    def report(self) -> Report:
        """The report of `sweep`."""
        return sweep_report(self, self.model)

    def lines(self) -> tuple[str, ...]:
        """The trials on the Pareto front."""
        front = [trial for trial in pareto_front(self.outcomes) if trial != BASELINE]
        rows = tuple(
            f"{trial.name}  {self.outcomes[trial].value:.4g}  {nbytes(self.outcomes[trial].gzip)} gzip"
            for trial in front[:6]
        )
        metric, number = self.base.metric, len(self.outcomes) - 1
        trials = "1 trial" if number == 1 else f"{count(number)} trials"
        return (
            f"{self.model} -> {self.folder}: {trials}, {len(self.failed)} failed",
            f"unpruned  {metric} {self.base.value:.4g}, {nbytes(self.base.gzip)} gzip",
            f"{len(front)} on the Pareto front:",
            *rows,
        )


@dataclass(frozen=True, slots=True, repr=False)
class InitResult(Result):
    """Budgets that were written."""

    path: Path
    baseline: Path | None
    """The baseline that was written; None if there was one."""
    proposals: list[Proposal]
    failures: list[Failure]
    command: ClassVar[str] = "init"

    def report(self) -> Report:
        """The report of `init`."""
        return init_report(self.path, self.baseline, self.proposals, self.failures)

    def lines(self) -> tuple[str, ...]:
        """The models that now have budgets."""
        models = tuple(proposal.path for proposal in self.proposals[:6])
        return (f"{self.path}: budgets for {len(self.proposals)} models", *models, "Next: prunectl.check()")


@dataclass(frozen=True, slots=True, repr=False)
class DoctorResult(Result):
    """What is installed."""

    extras: tuple[Extra, ...]
    command: ClassVar[str] = "doctor"

    def report(self) -> Report:
        """The report of `doctor`."""
        return doctor_report(self.extras)

    def lines(self) -> tuple[str, ...]:
        """The extras that work, and what to install for the others."""
        ready = ", ".join(extra.name or "core" for extra in self.extras if extra.is_ready)
        return (f"prunectl works with: {ready}", *(e.install_command for e in self.extras if e.install_command))


@dataclass(frozen=True, slots=True, repr=False)
class EvaluationResult(EngineResult, Evaluation):
    """How good a model is on some data."""

    path: str = ""
    command: ClassVar[str] = "evaluate"

    def report(self) -> Report:
        """The metrics in a table."""
        columns = (Column("metric"), Column("value", Unit.NUMBER))
        table = Table("metrics", columns, tuple(self.logs.items()))
        numbers = {name: value if math.isfinite(value) else None for name, value in self.logs.items()}
        return Report(
            models=(),
            table=table,
            sections=(Section(self.path, tables=(table,), notes=self.notes),),
            extra_json={"path": self.path, "metric": self.metric, "logs": numbers},
        )

    def lines(self) -> tuple[str, ...]:
        """The metrics."""
        return (self.path, *(f"{name}  {value:.4g}" for name, value in [*self.logs.items()][:8]))
