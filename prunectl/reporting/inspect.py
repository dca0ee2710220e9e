"""What `inspect` says, drawn from surveys."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prunectl.analysis.inspect import FoldedTensors, in_natural_order, overview, parts_without_masks
from prunectl.analysis.stats import Histogram, ModelStats, TensorStats, totals
from prunectl.errors import abbreviated
from prunectl.formats.base import PRUNABLE, QUANTISED, Capability
from prunectl.formats.registry import by_name
from prunectl.reporting.report import Cell, Column, Failure, Report, Row, Section, Table, Unit, survey_json
from prunectl.units import count, listed, percent

if TYPE_CHECKING:
    from prunectl.channels.groups import ChannelGroup, ChannelGroups

_BAR_WIDTH = 40
_BARS = Column("", is_optional=True, title="bars", is_whole=True)
_MAX_FACT = 500
"""The most characters shown of a fact that comes from the file."""


def inspect_report(
    models: Sequence[ModelStats],
    failures: Sequence[Failure],
    *,
    has_flops: bool,
    lists_tensors: bool = False,
    is_sorted: bool = False,
) -> Report:
    """The report on models; a terminal gets one row for each layer, or with `lists_tensors` one for each tensor."""
    pattern = next((stats.pattern for stats in models if stats.pattern), "")
    columns = _columns(pattern, has_flops=has_flops)

    def rows() -> Iterator[Row]:
        for stats in models:
            for row in stats.layers:
                yield stats.path, *_cells(row, pattern, has_flops=has_flops)

    return Report(
        models=tuple(survey_json(stats) for stats in models),
        table=Table("tensors", (Column("path"), *columns), rows),
        sections=tuple(
            _section(stats, columns, pattern, has_flops=has_flops, lists_tensors=lists_tensors, is_sorted=is_sorted)
            for stats in models
        ),
        failures=tuple(failures),
        next_step=next_step(models[0]) if len(models) == 1 and not failures else "",
    )


def next_step(stats: ModelStats) -> str:
    """The next command: to strip what only training needs, else to prune."""
    path = Path(stats.path)

    def command(verb: str, kind: str, *options: str) -> str:
        output = str(path.with_name(f"{path.stem}-{kind}{path.suffix}"))
        return shlex.join(["prunectl", verb, stats.path, "-o", output, *options])

    if not path.name.strip(".-") or not Capability.WRITE & by_name(stats.format).can:
        return ""
    kept = parts_without_masks(stats).split()
    if any(f"`{' '.join(['prunectl', 'strip', *kept])}`" in sentence for sentence in stats.advice):
        return command("strip", "stripped", *kept)
    zeros = stats.prunable_sparsity if stats.params.prunable else None
    is_dense = zeros is not None and zeros < _FEW_ZEROS
    can_be_pruned = is_dense and not any(row.dtype in QUANTISED for row in stats.layers if row.role in PRUNABLE)
    return command("prune", "pruned", "-s", "80%") if can_be_pruned else ""


_FEW_ZEROS = 0.1


def _columns(pattern: str, *, has_flops: bool) -> tuple[Column, ...]:
    return (
        Column("tensor"),
        Column("role", is_optional=True),
        Column("shape", is_whole=True),
        Column("dtype", is_optional=True),
        Column("params", Unit.COUNT),
        Column("zeros", Unit.COUNT, is_optional=True),
        Column("sparsity", Unit.RATIO),
        Column("dead", Unit.COUNT, is_optional=True, title="dead channels"),
        *([Column(pattern, Unit.RATIO)] if pattern else []),
        *([Column("FLOPs", Unit.COUNT)] if has_flops else []),
    )


def _cells(row: TensorStats, pattern: str, *, has_flops: bool) -> tuple[Cell, ...]:
    return (
        row.name,
        f"{row.role} = {row.tied_to}" if row.tied_to else str(row.role),
        "x".join(map(str, row.shape)) or "scalar",
        row.dtype,
        row.params,
        row.zeros,
        row.sparsity,
        row.dead_channels,
        *([row.conforming] if pattern else []),
        *([None if row.macs is None else 2 * row.macs] if has_flops else []),
    )


def _section(
    stats: ModelStats,
    columns: tuple[Column, ...],
    pattern: str,
    *,
    has_flops: bool,
    lists_tensors: bool,
    is_sorted: bool,
) -> Section:
    def table(rows: Sequence[TensorStats], on_terminal: tuple[Table, ...] = ()) -> Table:
        return Table(
            "tensors",
            columns,
            lambda: (_cells(row, pattern, has_flops=has_flops) for row in rows),
            total=_total(stats, columns, has_flops=has_flops),
            on_terminal=on_terminal,
        )

    if lists_tensors:
        rows = stats.layers if is_sorted else in_natural_order(stats.layers)
        folded: tuple[FoldedTensors, ...] = ()
    else:
        rows, folded = overview(stats, is_sorted=is_sorted)
    tensors = table(stats.layers, (table(rows), *([_folded(folded, stats.bytes.raw)] if folded else [])))
    tables = [_parts(stats), *([tensors] if stats.layers else [])]
    if stats.histogram is not None:
        tables.append(_bars(stats.histogram))
    return Section(title=stats.path, facts=_facts(stats), tables=tuple(tables), notes=stats.advice)


def _folded(folded: Sequence[FoldedTensors], raw: int) -> Table:
    return Table(
        "folded",
        (Column("also in the file"), Column("size", Unit.BYTES), Column("share", Unit.RATIO)),
        tuple((group.name, group.bytes, group.bytes / raw if raw else 0.0) for group in folded),
        note="--tensors lists each of them.",
    )


def _total(stats: ModelStats, columns: tuple[Column, ...], *, has_flops: bool) -> tuple[Cell, ...]:
    shown = totals(stats.layers)
    sums: dict[str, Cell] = {"tensor": "all", "params": shown.total, "zeros": shown.zero}
    if shown.zero is not None:
        sums["sparsity"] = shown.zero / shown.total if shown.total else 0.0
    if has_flops:
        sums["FLOPs"] = None if stats.macs is None else 2 * stats.macs
    return tuple(sums.get(column.name, "" if not column.is_number else None) for column in columns)


def _prunable(stats: ModelStats) -> str:
    """The name of prunable weights; quantised ones cannot be pruned any more, but their zeros count."""
    kernels = [row for row in stats.layers if row.is_prunable]
    return "in quantised kernels" if kernels and all(row.dtype in QUANTISED for row in kernels) else "prunable"


def _architecture(stats: ModelStats) -> list[tuple[str, str]]:
    """The architecture of a model folder, which comes first."""
    folder = stats.architecture
    if folder is None:
        return []
    names = ", ".join(folder.architectures)
    family = f"{folder.model_type} ({names})" if folder.model_type and names else folder.model_type or names
    facts = [("model", f"{family} for {folder.base_model}" if folder.base_model else family)]
    blocks = " and ".join(f"{count(number)} blocks in {name}" for name, number in folder.blocks.items())
    heads = [] if folder.heads is None else [f"{folder.heads} heads"]
    if heads and folder.key_value_heads not in {None, folder.heads}:
        heads = [f"{heads[0]} ({folder.key_value_heads} for keys and values)"]
    sizes = [f"hidden size {count(folder.hidden_size)}"] if folder.hidden_size else []
    words = [f"vocabulary {count(folder.vocabulary)}"] if folder.vocabulary else []
    facts.append(("layout", ", ".join([*([blocks] if blocks else []), *sizes, *heads, *words])))
    if folder.experts is not None:
        active, share = folder.experts.active_params, folder.experts.active_params / max(stats.params.total, 1)
        each = f"{folder.experts.active} of {folder.experts.total} for each token"
        facts.append(("experts", f"{each}: {count(active)} parameters are active ({percent(share)})"))
    dtypes = folder.dtypes
    kinds = ", ".join(dtypes if len(dtypes) < 2 else (f"{name} ({count(n)})" for name, n in dtypes.items()))
    tied = {True: "; the output layer is the embedding (tied)", False: "; the output layer is its own", None: ""}
    shards = f"{folder.shards} shards" if folder.shards > 1 else "one file"
    facts.append(("weights", f"{kinds} in {shards}{tied[folder.is_tied]}"))
    return [(name, fact) for name, fact in facts if fact]


def _facts(stats: ModelStats) -> tuple[tuple[str, str], ...]:
    about = stats.about
    facts = [
        *_architecture(stats),
        ("format", ", ".join(filter(None, (by_name(stats.format).title, about.producer)))),
        ("params", f"{count(stats.params.total)}, of which {count(stats.params.prunable)} {_prunable(stats)}"),
    ]
    if stats.sparsity is not None and stats.prunable_sparsity is not None:
        facts.append(
            (
                "sparsity",
                f"{percent(stats.prunable_sparsity)} of prunable weights, {percent(stats.sparsity)} of all parameters",
            )
        )
    if stats.macs is not None:
        unknown = f", not counting {len(stats.macs_unknown)} operations of unknown shape" if stats.macs_unknown else ""
        facts.append(("FLOPs", f"{count(2 * stats.macs)} for one input{unknown}"))
    for kind in dict.fromkeys(wrapper.kind for wrapper in about.wrappers):
        layers = [wrapper for wrapper in about.wrappers if wrapper.kind == kind]
        schedules = ", ".join(dict.fromkeys(filter(None, (wrapper.schedule for wrapper in layers))))
        facts.append(("wrapped", f"{kind} around {len(layers)} layers{': ' if schedules else ''}{schedules}"))
    if about.optimizer:
        facts.append(("optimizer", about.optimizer))
    if about.training:
        facts.append(("training", ", ".join(about.training)))
    if about.code:
        facts.append(("code", listed(about.code, 3, "more")))
    return tuple((name, abbreviated(fact, _MAX_FACT)) for name, fact in facts)


def _parts(stats: ModelStats) -> Table:
    raw = stats.bytes.raw
    has_note = any(part.is_dead for part in stats.parts)
    columns = (Column("part"), Column("size", Unit.BYTES), Column("share", Unit.RATIO))
    rows: tuple[Row, ...] = tuple(
        (
            *(part.name, part.bytes, part.bytes / raw if raw else 0.0),
            *(["dead weight" if part.is_dead else ""] if has_note else []),
        )
        for part in stats.parts
    )
    return Table(
        "parts",
        (*columns, *([Column("", is_optional=True, title="note")] if has_note else [])),
        rows,
        total=("file", raw, None, *([""] if has_note else [])),
    )


def _bars(histogram: Histogram) -> Table:
    tallest = max(histogram.counts, default=1)
    rows: list[tuple[Cell, ...]] = [("0", histogram.zero, "")]
    if histogram.below:
        rows.append((f"< {histogram.edges[0]:.2g}", histogram.below, ""))
    for low, number in zip(histogram.edges, histogram.counts, strict=False):
        rows.append((f"{low:.2g}", number, "#" * -(-number * _BAR_WIDTH // tallest)))
    if histogram.not_finite:
        rows.append(("NaN or infinite", histogram.not_finite, ""))
    return Table("histogram", (Column("|weight| at least"), Column("weights", Unit.COUNT), _BARS), tuple(rows))


_COLUMNS = (
    Column("channels of"),
    Column("channels", Unit.COUNT),
    Column("tensors", Unit.COUNT, is_optional=True),
    Column("goes with", is_optional=True, title="coupled with"),
    Column("locked"),
)
_SHOWN = 4


def add_channel_groups(report: Report, models: Sequence[ChannelGroups]) -> Report:
    """The report of `inspect` with the channels of its models, given in its order."""
    by_path = {groups.path: groups for groups in models}
    sections = tuple(
        replace(
            section,
            facts=(*section.facts, ("channels", _fact(by_path[section.title]))),
            tables=(*section.tables, *_tables(by_path[section.title])),
        )
        if section.title in by_path
        else section
        for section in report.sections
    )
    # With --groups, a pipe gets the groups as its rows.
    rows = tuple((groups.path, *_row(group)) for groups in models for group in groups.groups)
    main = Table("groups", (Column("path"), *_COLUMNS), rows)
    return replace(
        report,
        table=main,
        sections=sections,
        extra_json={**report.extra_json, "groups": [_json(groups) for groups in models]},
    )


def _fact(groups: ChannelGroups) -> str:
    if groups.missing_because:
        return f"none: {groups.missing_because}"
    return f"{count(groups.prunable)} of {count(groups.channels)} can be removed"


def _tables(groups: ChannelGroups) -> tuple[Table, ...]:
    rows = tuple(_row(group) for group in groups.groups)
    return (Table("groups", _COLUMNS, rows, title="channels"),) if rows else ()


def _row(group: ChannelGroup) -> tuple[Cell, ...]:
    places = [f"{place.tensor}[{place.axis}]" for place in group.axes if place.tensor != group.name]
    tensors = len({place.tensor for place in group.axes})
    return (group.name, len(group), tensors, listed(places, _SHOWN, "more"), group.locked_because)


def _json(groups: ChannelGroups) -> dict[str, object]:
    return {
        "path": groups.path,
        "families": [
            {
                "name": group.name,
                "channels": len(group),
                "locked": group.locked_because or None,
                "places": [
                    {"tensor": place.tensor, "axis": place.axis, "part": str(place.role)} for place in group.axes
                ],
            }
            for group in groups.groups
        ],
    }
