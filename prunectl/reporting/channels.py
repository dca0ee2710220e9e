"""What `prune --pattern channel` says, drawn from what was cut."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

from prunectl.analysis.stats import ModelStats
from prunectl.channels.config import ChannelConfig
from prunectl.channels.prune import ChannelPruneResult
from prunectl.channels.verify import Verification
from prunectl.reporting.report import Artifact, Cell, Column, Report, Section, Table, Unit
from prunectl.reporting.serialize import survey_json
from prunectl.units import count, percent

_CUTS = (
    Column("tensor"),
    Column("before"),
    Column("after"),
    Column("params", Unit.COUNT),
    Column("left", Unit.COUNT),
    Column("share left", Unit.RATIO),
)
_SIZES = (
    Column(""),
    Column("params", Unit.COUNT),
    Column("FLOPs", Unit.COUNT),
    Column("raw", Unit.BYTES),
    Column("gzip", Unit.BYTES),
)
_MILLISECONDS = Column("ms", Unit.NUMBER)


def channels_report(found: ChannelPruneResult, output: str) -> Report:
    """Return the report on a run; without an output it was a dry run."""
    cuts = Table("cuts", _CUTS, _rows(found))
    sizes = Table(
        "sizes",
        (*_SIZES, *(() if found.seconds is None else (_MILLISECONDS,))),
        tuple(
            (*_size(name, survey), *(() if found.seconds is None else (round(found.seconds[place] * 1e3, 3),)))
            for place, (name, survey) in enumerate((("before", found.before), ("after", found.after)))
        ),
    )
    remarks = [*([_skipped(found)] if found.skips else []), *_unknown(found.before), *found.notes]
    remarks.append(
        "This was a dry run: nothing was written."
        if not output
        else f"Next: prunectl size {found.before.path} {output}"
    )
    return Report(
        models=(survey_json(found.before), survey_json(found.after)),
        main=cuts,
        sections=(
            Section(f"{found.before.path} -> {output or 'nowhere'}", _facts(found), (cuts, sizes), tuple(remarks)),
        ),
        artifacts=(Artifact(output, found.after.bytes.raw), *(Artifact(*one) for one in found.beside))
        if output
        else (),
        bare=(),
        more={"channels": _json(found)},
    )


def _rows(found: ChannelPruneResult) -> tuple[tuple[Cell, ...], ...]:
    after = {row.name: row for row in found.after.layers}
    rows: list[tuple[Cell, ...]] = []
    for row in found.before.layers:
        now = after.get(row.name)
        if now is not None and now.shape != row.shape:
            share = now.params / row.params
            rows.append((row.name, _shape(row.shape), _shape(now.shape), row.params, now.params, share))
    return tuple(rows)


def _size(name: str, found: ModelStats) -> tuple[Cell, ...]:
    flops = None if found.macs is None else 2 * found.macs
    return (name, found.params.total, flops, found.bytes.raw, found.bytes.compressed)


def _facts(found: ChannelPruneResult) -> tuple[tuple[str, str], ...]:
    return (
        ("asked", _asked(found.cutting)),
        *(() if found.cutting.is_dead else (("how", f"{_measure(found.cutting)}, {found.cutting.scope} scope"),)),
        ("cut", f"{count(found.dropped)} of {count(found.channels)} channels that may go"),
        ("proof", f"the same as {_reference(found.cutting)}, within {_proof(found.proof)}"),
    )


def _proof(proof: Verification) -> str:
    wide = f", {proof.wide:.1e} in float64" if proof.wide is not None else ""
    return f"{proof.error:.1e}{wide}{', also on your data' if proof.batches else ''}"


def _asked(cutting: ChannelConfig) -> str:
    if cutting.is_dead:
        return "channels that make no difference"
    if cutting.goal is None:
        return f"{percent(cutting.ratio)} of the channels"
    goal = cutting.goal
    left = f"{goal.number:,}" if goal.share is None else percent(goal.share)
    return f"{left} of the {goal.what}" if goal.share is not None else f"{left} {goal.what}"


def _reference(cutting: ChannelConfig) -> str:
    return "the whole network" if cutting.is_dead else "with these channels at zero"


def _measure(cutting: ChannelConfig) -> str:
    return "random" if cutting.measure is None else cutting.measure.name


def _skipped(found: ChannelPruneResult) -> str:
    reasons = Counter(skip.reason for skip in found.skips)
    told = "; ".join(f"{reason} ({number})" for reason, number in reasons.most_common(6))
    return f"Left alone: {told}{'; and others' if len(reasons) > 6 else ''}."


def _unknown(survey: ModelStats) -> list[str]:
    if not survey.macs_unknown:
        return []
    return [f"FLOPs are without {len(survey.macs_unknown)} operations of unknown shape."]


def _shape(lengths: tuple[int, ...]) -> str:
    return "x".join(map(str, lengths))


def _json(found: ChannelPruneResult) -> dict[str, object]:
    return {
        "total": found.channels,
        "dropped": found.dropped,
        "error": found.proof.error,
        "error_float64": found.proof.wide,
        "data_batches": found.proof.batches,
        "seconds": None if found.seconds is None else dict(zip(("before", "after"), found.seconds, strict=True)),
        "families": [
            {"name": loss.family.name, "channels": len(loss.family.groups), "dropped": list(loss.dropped)}
            for loss in found.losses
        ],
        "left_alone": [asdict(skip) for skip in found.skips],
    }
