"""What `prune --pattern channel` and `prune --pattern layers` say, drawn from the parts that were removed."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from prunectl.analysis.stats import ModelStats
from prunectl.reporting.bench import comparison
from prunectl.reporting.prune import UNMEASURED, compare_sizes, output_report, recover_accuracy, what_is_unmeasured
from prunectl.reporting.report import Artifact, Cell, Column, Report, Table, Unit
from prunectl.units import count, percent

if TYPE_CHECKING:
    from prunectl.channels.config import ChannelConfig
    from prunectl.channels.prune import ChannelPruneResult
    from prunectl.channels.verify import Verification
    from prunectl.pruning.blocks import BlocksPruned

_CUTS = (
    Column("tensor"),
    Column("before", is_whole=True),
    Column("after", is_whole=True),
    Column("params", Unit.COUNT, is_optional=True, title="params before"),
    Column("left", Unit.COUNT, is_optional=True, title="params after"),
    Column("share left", Unit.RATIO, title="kept"),
)
_SIZES = (
    Column(""),
    Column("params", Unit.COUNT),
    Column("FLOPs", Unit.COUNT),
    Column("raw", Unit.BYTES),
    Column("gzip", Unit.BYTES),
)
_LATENCY = Column("latency", Unit.SECONDS)


def channels_report(result: ChannelPruneResult, output: str) -> Report:
    """The report on a run; without an output it was a dry run."""
    cuts = Table("cuts", _CUTS, _rows(result))
    sizes = Table(
        "sizes",
        (*_SIZES, *((_LATENCY,) if result.latencies else ())),
        tuple(
            (*_size(name, stats), *(latency.median.middle for latency in result.latencies[index : index + 1]))
            for index, (name, stats) in enumerate((("before", result.before), ("after", result.after)))
        ),
        note=what_is_unmeasured(result.before, result.after),
    )
    notes = [*([_skipped(result)] if result.skips else []), *_unknown(result.before), *result.notes]
    if result.latencies:
        notes.append(comparison("the original", "The result", result.latencies[1]))
    report = output_report(
        result,
        output,
        (cuts, sizes),
        facts=_facts(result),
        notes=notes,
        next_step=_next_step(result, output),
        extra_json={"channels": _json(result)},
    )
    beside = (Artifact(*file) for file in result.beside) if output else ()
    return replace(report, artifacts=(*report.artifacts, *beside))


def _next_step(result: ChannelPruneResult, output: str) -> str:
    """The next command: training; or a comparison of sizes where only dead channels were removed."""
    if not output or result.cutting.only_dead:
        return compare_sizes(result.before, output)
    return recover_accuracy(result.before, output, result.builder)


def _rows(result: ChannelPruneResult) -> tuple[tuple[Cell, ...], ...]:
    after = {row.name: row for row in result.after.layers}
    rows: list[tuple[Cell, ...]] = []
    for row in result.before.layers:
        now = after.get(row.name)
        if now is not None and now.shape != row.shape:
            share = now.params / row.params
            rows.append((row.name, _shape(row.shape), _shape(now.shape), row.params, now.params, share))
    return tuple(rows)


def _size(name: str, stats: ModelStats) -> tuple[Cell, ...]:
    flops = None if stats.macs is None else 2 * stats.macs
    return (name, stats.params.total, flops, stats.bytes.raw, stats.bytes.compressed)


def _facts(result: ChannelPruneResult) -> tuple[tuple[str, str], ...]:
    return (
        ("target", _goal(result.cutting)),
        *(
            ()
            if result.cutting.only_dead
            else (("method", f"{_measure(result.cutting)}, {result.cutting.scope} scope"),)
        ),
        ("cut", f"{count(result.dropped)} of {count(result.channels)} removable channels"),
        ("verified", f"outputs equal those of {_reference(result.cutting)}, within {_proof(result.proof)}"),
    )


def _proof(proof: Verification) -> str:
    wide = f", {proof.error_float64:.1e} in float64" if proof.error_float64 is not None else ""
    return f"{proof.error:.1e}{wide}{', also on your data' if proof.batches else ''}"


def _goal(cutting: ChannelConfig) -> str:
    if cutting.only_dead:
        return "only dead channels, which make no difference"
    if cutting.target is None:
        return f"{percent(cutting.ratio)} of the channels"
    target = cutting.target
    left = f"{target.number:,}" if target.share is None else percent(target.share)
    return f"{left} of the {target.kind}" if target.share is not None else f"{left} {target.kind}"


def _reference(cutting: ChannelConfig) -> str:
    return "the original network" if cutting.only_dead else "the network with these channels set to zero"


def _measure(cutting: ChannelConfig) -> str:
    return "random" if cutting.importance is None else cutting.importance.name


def _skipped(result: ChannelPruneResult) -> str:
    reasons = Counter(skip.reason for skip in result.skips)
    listed = "; ".join(f"{reason} ({number})" for reason, number in reasons.most_common(6))
    return f"Not pruned: {listed}{'; and others' if len(reasons) > 6 else ''}."


def _unknown(stats: ModelStats) -> list[str]:
    if not stats.macs_unknown:
        return []
    return [f"The FLOPs do not count {len(stats.macs_unknown)} operations of unknown shape."]


def _shape(lengths: tuple[int, ...]) -> str:
    return "x".join(map(str, lengths))


def _json(result: ChannelPruneResult) -> dict[str, object]:
    medians = [latency.median.middle for latency in result.latencies]
    return {
        "total": result.channels,
        "dropped": result.dropped,
        "error": result.proof.error,
        "error_float64": result.proof.error_float64,
        "data_batches": result.proof.batches,
        "seconds": dict(zip(("before", "after"), medians, strict=True)) if medians else None,
        "families": [
            {"name": loss.group.name, "channels": len(loss.group), "dropped": list(loss.dropped)}
            for loss in result.pruned_groups
        ],
        "left_alone": [asdict(skip) for skip in result.skips],
    }


_STACKS = (
    Column("blocks of"),
    Column("before", Unit.COUNT),
    Column("removed", Unit.COUNT),
    Column("numbers", is_whole=True),
)
_BLOCK_SIZES = (Column(""), Column("params", Unit.COUNT), Column("raw", Unit.BYTES), Column("gzip", Unit.BYTES))


def blocks_report(result: BlocksPruned, output: str) -> Report:
    """The report on a run; without an output it was a dry run."""
    rows = tuple((stack.name, stack.before, len(stack.removed), ranges(stack.removed)) for stack in result.stacks)
    stacks = Table("blocks", _STACKS, rows)
    sizes = Table(
        "sizes",
        _BLOCK_SIZES,
        tuple(
            (name, stats.params.total, stats.bytes.raw, stats.bytes.compressed)
            for name, stats in (("before", result.before), ("after", result.after))
        ),
        note=what_is_unmeasured(result.before, result.after),
    )
    return output_report(
        result,
        output,
        (stacks, sizes),
        notes=(*result.notes, UNMEASURED) if output else result.notes,
        next_step=f"prunectl inspect {output}" if output else "",
        extra_json={"blocks": [asdict(stack) for stack in result.stacks]},
    )


def ranges(numbers: tuple[int, ...]) -> str:
    """Numbers with ranges: `4, 20-23`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
