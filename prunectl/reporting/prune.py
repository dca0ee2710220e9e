"""What `prune` says, drawn from its plan and its result."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prunectl.analysis.copies import averaged_copies_hint
from prunectl.analysis.stats import ModelStats
from prunectl.formats.base import Family
from prunectl.formats.detect import URL
from prunectl.formats.families import architectures
from prunectl.formats.registry import by_name
from prunectl.pruning.destination import BIG_BYTES
from prunectl.pruning.plan import UNKNOWN, counted_reason
from prunectl.pruning.prune import Pruned
from prunectl.pruning.request import names_code
from prunectl.pruning.strategies import sample_depth_bias
from prunectl.reporting.report import Artifact, Cell, Column, Report, Row, Section, Table, Unit, survey_json
from prunectl.units import count, listed, nbytes, percent

if TYPE_CHECKING:
    from prunectl.pruning.parts import PartPruned
    from prunectl.pruning.schedules import SparsitySchedule
    from prunectl.training.wrap.prune import WrapResult

_COMPARED = (
    Column(""),
    Column("sparsity", Unit.RATIO),
    Column("raw", Unit.BYTES),
    Column("packed", Unit.BYTES),
    Column("gzip", Unit.BYTES),
)


def before_after(before: ModelStats, after: ModelStats) -> Table:
    """The sizes of a model before and after, and how many of its prunable weights are zero."""
    rows = (_compared_row("before", before), _compared_row("after", after))
    return Table("sizes", _COMPARED, rows, note=what_is_unmeasured(before, after))


def what_is_unmeasured(before: ModelStats, after: ModelStats) -> str:
    """The command for sizes that were not measured because the model is big; empty if all were measured."""
    is_big = max(before.bytes.raw, after.bytes.raw) > BIG_BYTES
    return _UNMEASURED if after.bytes.compressed is None and is_big else ""


_UNMEASURED = (
    f"packed and gzip sizes of a model above {BIG_BYTES >> 20} MB are not measured: prunectl size measures them, "
    "prunectl size --estimate tells gzip in about a second"
)


def _compared_row(name: str, stats: ModelStats) -> tuple[Cell, ...]:
    return (name, stats.prunable_sparsity, stats.bytes.raw, stats.bytes.packed, stats.bytes.compressed)


_COLUMNS = (
    Column("tensor"),
    Column("shape", is_optional=True, is_whole=True),
    Column("weights", Unit.COUNT, is_optional=True),
    Column("dropped", Unit.COUNT, title="pruned"),
    Column("zeros", Unit.COUNT),
    Column("sparsity", Unit.RATIO),
)


UNMEASURED = "Accuracy was not measured."


def prune_report(pruned: Pruned, output: str) -> Report:
    """The report on a run; without an output it was a dry run."""
    dropped = sum(counts.dropped for counts in pruned.counts.values())
    zeros = sum(counts.zeros for counts in pruned.counts.values())
    size = pruned.plan.size
    cuts = Table(
        "cuts", _COLUMNS, lambda: _rows(pruned), total=("all", "", size, dropped, zeros, zeros / size if size else 0.0)
    )
    notes = [*([_skipped(pruned)] if pruned.plan.skips else []), *pruned.notes, *averaged_copies_hint(pruned.before)]
    notes += [*_without_groups(pruned), *(_left_behind(pruned, output) if output else ())]
    if any(skip.reason == UNKNOWN for skip in pruned.plan.skips):
        notes.append(f"Tensors of {UNKNOWN} are pruned only if --layers names them.")
    if any(skip.reason == "optimizer state" for skip in pruned.plan.skips):
        notes.append(
            "The optimizer's state was not changed: resumed training starts with the moments of the dense weights."
        )
    if pruned.request.strategy == "random-weighted" and not pruned.request.params:
        notes.append(
            f"The bias towards early or late layers, drawn with --seed, is {sample_depth_bias(pruned.request.seed)}."
        )
    if pruned.request.policy == "xnnpack":
        notes.append(
            "XNNPACK runs these kernels faster on ARM, in WebAssembly and on RISC-V; "
            "on x86 with AVX it multiplies their zeros like other numbers."
        )
    if pruned.request.cluster:
        count_of = pruned.request.cluster.partition(":")[0]
        notes.append(
            f"Each of these tensors has at most {count_of} distinct values, which makes the file compress better."
        )
    if output and not pruned.request.data:
        notes += [UNMEASURED, *_lossy(pruned)]
    tables = (cuts, before_after(pruned.before, pruned.after))
    return output_report(
        pruned, output, tables, facts=_facts(pruned), notes=notes, next_step=_next_step(pruned, output)
    )


class BeforeAfter(Protocol):
    """The result of a run that makes one model from another."""

    @property
    def before(self) -> ModelStats:
        """The input model."""

    @property
    def after(self) -> ModelStats:
        """The output model."""


def output_report(
    result: BeforeAfter,
    output: str,
    tables: tuple[Table, ...],
    *,
    rows: Table | None = None,
    facts: tuple[tuple[str, str], ...] = (),
    notes: Iterable[str],
    next_step: str | None = None,
    extra_json: Mapping[str, Any] | None = None,
) -> Report:
    """The report on a run that makes one model from another; without an output it was a dry run.

    Scripts get the rows of the first table, or `rows`.
    """
    before, after = result.before, result.after
    dry = () if output else ("This was a dry run: nothing was written.",)
    return Report(
        models=(survey_json(before), survey_json(after)),
        table=tables[0] if rows is None else rows,
        sections=(Section(f"{before.path} -> {output or '(dry run)'}", facts, tables, (*notes, *dry)),),
        artifacts=(Artifact(output, after.bytes.raw),) if output else (),
        summary=outcome(before, after, output),
        next_step=compare_sizes(before, output) if next_step is None else next_step,
        quiet_lines=(),
        extra_json=extra_json or {},
    )


_MOST_LOST = 0.5
"""A layer that loses more than this share of its norm gets a warning: accuracy is often lost by then."""
LIKELY_TO_FALL = "accuracy is likely to fall"


def _most_hurt(pruned: Pruned) -> list[tuple[float, str]]:
    return sorted(((share, name) for name, share in pruned.lost.items() if share > _MOST_LOST), reverse=True)


def _lossy(pruned: Pruned) -> Iterator[str]:
    """A warning without data: layers that lose most of their norm, and how to win accuracy back."""
    lost = _most_hurt(pruned)
    if not lost:
        return
    (most, worst), tensors = lost[0], len(pruned.lost)
    if len(lost) == 1:
        yield f"{worst} loses {percent(most)} of the norm of its weights: {LIKELY_TO_FALL}. {_remedy(pruned)}"
    else:
        yield (
            f"{len(lost)} of {tensors} tensors lose more than half of the norm of their weights, {worst} most "
            f"({percent(most)}): {LIKELY_TO_FALL}. {_remedy(pruned)}"
        )
    empty = [name for share, name in lost if share >= 1.0]
    if empty:
        shown = listed(empty, _SHOWN)
        yield f"Nothing is left of {shown}: --exclude keeps tensors whole."


def _remedy(pruned: Pruned) -> str:
    family = by_name(pruned.before.format).family
    if family in _TRAINED or family is Family.SAFETENSORS:
        needed = _needs(pruned.before, "net.py:Net")
        code = f" {shlex.join(needed.code)}" if needed.code and not pruned.request.model else ""
        data = f"--data {needed.train}{code}"
        return f"Add --repair outputs {data} to win it back without labels, or finetune the result."
    if family is Family.ONNX:
        return (
            "Add --repair --data train.npz to win some of it back, or prune and train the file that it was made from."
        )
    if pruned.before.format == "diffusers":
        is_joint = any(cut.drop is None for cut in pruned.plan.cuts)
        layers = "--scope layer, since its networks are ranked together, or " if is_joint else ""
        return f"Try {layers}a lower --sparsity."
    return "Prune and train the Keras or PyTorch file that it was made from."


def _without_groups(pruned: Pruned) -> Iterator[str]:
    """A note on tensors too narrow for a single group of an N:M pattern."""
    match = _N_OF_M.fullmatch(pruned.request.pattern)
    names = [cut.tensor.name for cut in pruned.plan.cuts if not pruned.counts[cut.tensor.name].zeros]
    if match is not None and names:
        shown = listed(names, _SHOWN)
        has, it = ("has", "it") if len(names) == 1 else ("have", "them")
        yield f"{shown} {has} fewer than {match[2]} inputs, so {pruned.request.pattern} prunes none of {it}."


_OF_WEIGHTS = (".safetensors", ".bin", ".index.json")
"""Name endings of the weight files in a Hugging Face folder."""


def _left_behind(pruned: Pruned, place: str) -> Iterator[str]:
    """A note on files in the folder of the weights that are missing beside the output."""
    source, output = Path(pruned.before.path), Path(place)
    is_folder = not place.endswith(".safetensors") if URL.match(place) else output.is_dir()
    if pruned.before.format not in {"safetensors", "shards"} or not source.is_dir() or is_folder:
        return
    names = [path.name for path in sorted(source.iterdir()) if path.is_file() and not path.name.endswith(_OF_WEIGHTS)]
    missing = [name for name in names if not name.startswith(".") and not (output.parent / name).exists()]
    if missing:
        shown = listed(missing, _SHOWN)
        yield f"Only the weights were written, without {shown} of {source}: a folder as the output holds them all."


def outcome(before: ModelStats, after: ModelStats, output: str) -> str:
    """The sizes of a model before and after, and its sparsity, in a sentence for logs."""
    sizes = (before.bytes.compressed, after.bytes.compressed)
    kind = "gzipped"
    if None in sizes:
        sizes, kind = (before.bytes.raw, after.bytes.raw), "on disk"
    shown = " -> ".join(nbytes(size) for size in sizes if size is not None)
    sparsity = "" if after.prunable_sparsity is None else f", {percent(after.prunable_sparsity)} sparse"
    return f"{output or '(dry run)'}: {shown} {kind}{sparsity}"


def _next_step(pruned: Pruned, output: str) -> str:
    """The next command: training where the format can be trained, else a search by accuracy.

    After a pruning that probably lost accuracy, the command that measures it comes first.
    """
    family, builder = by_name(pruned.before.format).family, pruned.request.model or "net.py:Net"
    if output and family is Family.ONNX and not pruned.request.data:
        words = ("-o", output, "--force", "--max-drop", "1pp", "--data", "test.npz")
        return shlex.join(["prunectl", "prune", pruned.before.path, *words])
    if output and not pruned.request.data and _most_hurt(pruned) and family in {*_TRAINED, Family.SAFETENSORS}:
        return measure_accuracy(pruned.before, output, builder)
    if not output or (family is not Family.ONNX and family not in _TRAINED):
        return compare_sizes(pruned.before, output)
    return recover_accuracy(pruned.before, output, builder)


def compare_sizes(before: ModelStats, output: str) -> str:
    """The command that compares the sizes of a model before and after; empty for a dry run."""
    return shlex.join(["prunectl", "size", before.path, output]) if output else ""


def measure_accuracy(before: ModelStats, output: str, builder: str) -> str:
    """The command that measures the accuracy of a smaller model."""
    needed = _needs(before, builder)
    data = ("--data", needed.test, *needed.metric)
    return shlex.join(["prunectl", "eval", output, *data, "--against", before.path, *needed.code])


def recover_accuracy(before: ModelStats, output: str, builder: str) -> str:
    """The command that trains a smaller model, or measures its accuracy where no framework can train it."""
    family, path = by_name(before.format).family, Path(output)
    if family is Family.ONNX:
        return measure_accuracy(before, output, builder)
    tuned = str(path.with_name(f"{path.stem}-tuned{path.suffix}"))
    needed = _needs(before, builder)
    data = ("--data", needed.train, "--val", needed.test, *needed.metric)
    return shlex.join(["prunectl", "finetune", output, "-o", tuned, *data, *needed.code])


@dataclass(frozen=True, slots=True)
class _Needs:
    """What a command that runs a model needs beside it."""

    train: str = "train.npz"
    test: str = "test.npz"
    metric: tuple[str, ...] = ()
    code: tuple[str, ...] = ()


_CAUSAL = ("ForCausalLM", "LMHeadModel")


def _needs(before: ModelStats, builder: str) -> _Needs:
    """A folder of `transformers` needs no code, and if it is a language model, text is its data."""
    if by_name(before.format).family not in {Family.TORCH, Family.SAFETENSORS}:
        return _Needs()
    if not (classes := architectures(Path(before.path))):
        return _Needs(code=("--builder", builder))
    if classes[0].endswith(_CAUSAL):
        return _Needs("corpus.txt", "test.txt", ("--metric", "perplexity"))
    return _Needs()


_TRAINED = {Family.KERAS, Family.SAVED_MODEL, Family.TORCH, Family.TORCH_PROGRAM}


def _rows(pruned: Pruned) -> Iterator[Row]:
    for cut in pruned.plan.cuts:
        tensor, counts = cut.tensor, pruned.counts[cut.tensor.name]
        shape = "x".join(map(str, tensor.shape))
        yield tensor.name, shape, tensor.size, counts.dropped, counts.zeros, counts.zeros / tensor.size


def _facts(pruned: Pruned) -> tuple[tuple[str, str], ...]:
    request = pruned.request
    method = ", ".join((request.strategy, f"{request.scope} scope", f"policy {request.policy}"))
    return (
        ("target", percent(pruned.sparsity)),
        ("method", method),
        *([("pattern", _pattern(request.pattern))] if request.pattern else []),
        *(
            [("clusters", f"at most {request.cluster} distinct values in each tensor (k-means)")]
            if request.cluster
            else []
        ),
        ("pruned", f"{count(pruned.plan.drop)} of {count(pruned.plan.size)} weights"),
    )


def _pattern(text: str) -> str:
    """A pattern in words: 1:4 is one zero in four weights, not one weight in four."""
    match = _N_OF_M.fullmatch(text)
    if match is None:
        return text
    zeros, group = map(int, match.groups())
    return f"{text}: {zeros} zero{'s' * (zeros != 1)} in every {group} weights, {percent(zeros / group)} sparse"


_N_OF_M = re.compile(r"(\d+):(\d+)")


def _skipped(pruned: Pruned) -> str:
    reasons = Counter(skip.reason for skip in pruned.plan.skips)
    listed = ", ".join(counted_reason(reason, number) for reason, number in reasons.most_common(_SHOWN))
    others = " and others" if len(reasons) > _SHOWN else ""
    return f"Not pruned (policy {pruned.request.policy}): {listed}{others}."


_SHOWN = 6


_SHARDS = (
    Column("shard"),
    Column("bytes", Unit.BYTES),
    Column("weights", Unit.COUNT, is_optional=True),
    Column("dropped", Unit.COUNT, title="pruned"),
    Column("zeros", Unit.COUNT),
    Column("written"),
)


def part_report(result: PartPruned, output: str) -> Report:
    """The report on a part: its shards, and whether all parts are ready to be joined."""
    rows = tuple(
        (shard.name, shard.bytes, shard.weights, shard.pruned, shard.zeros, "now" if shard.is_new else "before")
        for shard in result.shards
    )
    table = Table("shards", _SHARDS, rows)
    new, total = sum(shard.is_new for shard in result.shards), len(result.shards)
    notes = [f"{total - new} of {total} shards were there already."] if total > new else []
    if result.missing:
        notes.append(f"{output} is not complete: {len(result.missing)} shards of other parts are missing.")
    else:
        notes.append(f"All shards are there; {output} becomes a model by --join.")
    trust = ["--trust"] if names_code(result.request) else []
    step = shlex.join(["prunectl", "prune", result.source, "-o", output, "--join", *trust])
    return Report(
        models=(),
        table=table,
        sections=(Section(f"{result.source} -> {output}, part {result.part}", (), (table,), tuple(notes)),),
        artifacts=tuple(Artifact(str(Path(output, shard.name)), shard.bytes) for shard in result.shards),
        summary=f"{output}: part {result.part} is done, {new} of {total} shards were written",
        next_step="" if result.missing else step,
        quiet_lines=(),
        extra_json={
            "part": {"number": result.part.number, "count": result.part.count, "missing": list(result.missing)}
        },
    )


def wrap_report(wrapped: WrapResult, output: str) -> Report:
    """The report on a run; without an output it was a dry run."""
    report = prune_report(wrapped.pruned, output)
    (section,) = report.sections
    kept = [
        note for note in section.notes if not (note.startswith("The optimizer's state") and wrapped.loses_optimizer)
    ]
    facts = section.facts
    if wrapped.ramp is not None:  # nothing is pruned yet
        kept = [note for note in kept if note != UNMEASURED]
        facts = tuple(("to prune" if name == "pruned" else name, text) for name, text in facts)
    pruned = wrapped.pruned
    # Wrappers are for training.
    training = recover_accuracy(pruned.before, output, pruned.request.model or "net.py:Net") if output else ""
    notes = (*_wrapper_notes(wrapped), *kept)
    return replace(report, sections=(replace(section, facts=facts, notes=notes),), next_step=training)


def _wrapper_notes(wrapped: WrapResult) -> tuple[str, ...]:
    tensors = f"{wrapped.wrapped} tensor{'s' * (wrapped.wrapped != 1)}"
    notes = [f"Added pruning wrappers to {tensors}: {_schedule(wrapped.ramp)}"]
    if wrapped.bare:
        names = listed(wrapped.bare, _SHOWN)
        consequence = "are pruned without one" if wrapped.ramp is None else "remain dense"
        notes.append(f"The framework has no wrapper for {names}: they {consequence}.")
    if wrapped.loses_compilation:
        notes.append(
            "The result is not compiled: the file's loss, optimizer or a metric is custom code that is missing here."
        )
    if wrapped.loses_optimizer:
        notes.append("The optimizer's state was not kept: wrapped weights need a new optimizer.")
    return tuple(notes)


def _schedule(ramp: SparsitySchedule | None) -> str:
    if ramp is None:
        return "their masks keep pruned weights at zero."
    until = f" to step {ramp.end}" if ramp.end is not None else ""
    final = percent(ramp.final) if ramp.final else "the sparsity of each layer"
    begin = "from the first step" if not ramp.begin else f"from step {ramp.begin}"
    return f"no weight is pruned yet; in training, {ramp.curve} {percent(ramp.initial)} to {final}, {begin}{until}."
