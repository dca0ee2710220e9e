"""`finetune` and `sweep` as functions: who watches a run, its search for a sparsity, and what is tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prunectl.api.keywords import names, ratio
from prunectl.api.pruning import trial_teller
from prunectl.api.results import EngineResult, OnProgress, meter_of, size_lines, title_of
from prunectl.commands._requests import OPTION_RULES, Mode
from prunectl.commands.max_drop import TrainingSearch, request_at, training_search
from prunectl.commands.sweep import USUAL, parse_names, parse_param
from prunectl.errors import UsageError
from prunectl.pruning.destination import Destination
from prunectl.reporting.max_drop import max_drop_report
from prunectl.reporting.report import Report
from prunectl.sweeping.trial import SweepConfig
from prunectl.training.finetune import finetune
from prunectl.training.logger import LogEntry, ProgressEvent
from prunectl.training.request import FinetuneRequest

OnEpoch = Callable[[LogEntry], object] | None


@dataclass(frozen=True, slots=True, repr=False)
class TrainingSearchResult(EngineResult, TrainingSearch):
    """The highest sparsity that training holds within a drop, and every one that was tried."""

    output: str = ""
    command: ClassVar[str] = "finetune"

    def report(self) -> Report:
        """The report of `finetune --max-drop`."""
        return max_drop_report(self.search, (self.before, self.after), self.before.path, self.output, self.notes)

    def lines(self) -> tuple[str, ...]:
        """Sizes and the metric before and after."""
        base, result = self.search.base, self.search.result
        found = f"{base.metric}  {base.value:.4g} -> {result.value:.4g}, {len(self.search.tried)} sparsities tried"
        return (title_of(self.before, self.output), *size_lines(self.before, self.after), found)


def search_trained(
    path: Path,
    destination: Destination,
    request: FinetuneRequest,
    limit: tuple[str, Path | None],
    watch: EpochWatcher,
) -> TrainingSearchResult:
    """Search for the highest sparsity that costs at most a drop; each that is tried is trained."""
    _refuse_what_is_of_one_run(request)
    max_drop, tried = limit

    def make(source: Path, sparsity: float, output: Destination) -> None:
        watch.begin()
        for entry in finetune(source, request_at(request, sparsity), output, watch).history:
            watch.tell(entry)

    run = training_search(request, max_drop, make)
    found = run(path, destination, tried, trial_teller(watch.on_progress))
    return TrainingSearchResult.of(found, output=str(destination.target))


def _refuse_what_is_of_one_run(request: FinetuneRequest) -> None:
    """Refuse the options that the command refuses beside `--max-drop`."""
    given = {
        "sparsity": request.pruning.sparsity is not None,
        "checkpoint_dir": request.checkpoint_dir is not None,
        "resume": request.is_resumed,
        "logdir": request.logdir is not None,
        "keep_wrappers": request.keeps_wrappers,
    }
    for rule in OPTION_RULES["finetune"]:
        for name in rule.options:
            if rule.never & Mode.SEARCH and given[name]:
                raise UsageError(rule.message.format(name), hint=rule.hint.format(name))


_SAME = "val val_split epochs batch_size samples lr optimizer loss metric policy seed custom_objects"
_FIELDS = {**{name: name for name in _SAME.split()}, "layers": "only", "builder": "model"}
"""Options of `sweep`, each with what its configuration calls it."""


def sweep_config(data: str, parsed: Mapping[str, Any], *, is_search: bool) -> SweepConfig:
    """What a sweep tries, of parsed keywords; a search for a sparsity is given none."""
    lists: dict[str, Any] = {
        name: parse_names(",".join(names(parsed[name])), name)
        for name in ("strategies", "scopes", "patterns", "schedules")
        if name in parsed
    }
    return SweepConfig(
        data=data,
        params=tuple(map(parse_param, parsed.get("param", ()))),
        sparsities=_ratios(parsed.get("sparsities", () if is_search else USUAL)),
        exclude=parsed.get("exclude", ()),
        is_trusted=parsed.get("trust", False),
        **lists,
        **{field: parsed[name] for name, field in _FIELDS.items() if name in parsed},
    )


def _ratios(values: Any) -> tuple[float, ...]:
    listed = values.split(",") if isinstance(values, str) else [values] if isinstance(values, int | float) else values
    return tuple(sorted({ratio("sparsities", value) for value in listed}))


class EpochWatcher:
    """Tells of each epoch once, when it is over."""

    def __init__(self, on_epoch: OnEpoch, on_progress: OnProgress) -> None:
        if on_epoch is not None and not callable(on_epoch):
            raise TypeError(f"on_epoch must be a function, not {type(on_epoch).__name__}")
        self._on_epoch = on_epoch
        self._told = 0
        self.on_progress = on_progress
        self._bar = meter_of(on_progress)

    def begin(self) -> None:
        """Begin another run, whose epochs are told from the first."""
        self._told = 0

    def __call__(self, event: ProgressEvent) -> None:
        """Tell of a step, and of the epoch that it ended."""
        with self._bar(f"epoch {event.epoch} of {event.epochs}", event.steps) as bar:
            bar.advance(event.step)
        if event.last is not None:
            self.tell(event.last)

    def tell(self, entry: LogEntry) -> None:
        """Tell of an epoch, unless it was told already."""
        if self._on_epoch is not None and entry.epoch > self._told:
            self._told = entry.epoch
            self._on_epoch(entry)
