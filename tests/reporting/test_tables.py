"""Tables on terminals: names are shortened and not broken, and what is not shown is named."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from prunectl.analysis.sizes import CodecName, get_codec
from prunectl.analysis.stats import SizeStats, measure_stats
from prunectl.commands import diff, doctor, export, init, plugins, size, strip, verify
from prunectl.commands.eval import evaluation_report
from prunectl.formats.registry import open_model
from prunectl.reporting import bench, finetune, inspect, prune, sensitivity, structured, sweep
from prunectl.reporting import check as check_reports
from prunectl.reporting.report import Cell, Column, Settings, Table, Unit
from prunectl.reporting.reporter import make_console
from prunectl.reporting.tables import print_table, shorten, shorten_all
from tests.running import FIXTURES

WIDTHS = (60, 80, 100, 120)
_SWEPT: Any = SimpleNamespace(
    base=SimpleNamespace(metric="accuracy"), config=SimpleNamespace(patterns=("2:4",), params=("damp=1",))
)
MAIN: dict[str, tuple[Column, ...]] = {
    "inspect": inspect._columns("2:4", has_flops=True),
    "inspect --sensitivity": (Column("loss at"), Column("weights", Unit.COUNT), *sensitivity._heads(Unit.NUMBER)),
    "inspect --groups": inspect._COLUMNS,
    "prune": prune._COLUMNS,
    "prune --pattern channel": structured._CUTS,
    "finetune": finetune._RESULT,
    "diff": diff._COLUMNS,
    "sweep": sweep._columns(_SWEPT),
    "strip": strip._ITEMS,
    "export": export._OUTPUTS,
    "verify": verify._COLUMNS,
    "init": init._COLUMNS,
    "plugins": plugins._COLUMNS,
    "doctor": doctor._EXTRAS,
    "check": check_reports._HUMAN,
    "bench": bench._COLUMNS,
    "eval": evaluation_report((), None, (), ()).table.columns,
    "prune --pattern layers": structured._STACKS,
    "size": size.size_report((), (), (), get_codec(CodecName.GZIP, None)).table.columns,
}
PARTS = ("model", "layers", "0", "17", "mlp", "down_proj", "self_attn", "conv2d_transpose", "encoder", "weight", "bias")


@st.composite
def names(draw: st.DrawFn) -> str:
    """Names of 10 to 80 characters, as models have them."""
    parts = draw(st.lists(st.sampled_from(PARTS), min_size=3, max_size=8))
    return ".".join(parts)[:80].rstrip(".").ljust(10, "x")


def shown(table: Table, width: int, rows: int = 0) -> list[str]:
    """Return what a terminal of that width shows of a table."""
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        print_table(table, make_console(stream, Settings()), Settings(), rows)
    return stream.getvalue().splitlines()


def cell(column: Column, name: str, number: int, place: int) -> Cell:
    if place == 0:
        return name
    if column.unit is Unit.TEXT:
        return "64x128x3x3" if column.is_whole else "kernel"
    return number / 10**9 if column.unit is Unit.RATIO else number


def fits(part: str, name: str) -> bool:
    """Whether a cell is a name, or one with an ellipsis or two in it."""
    return re.fullmatch(".+".join(map(re.escape, part.split("…"))), name) is not None


@pytest.mark.parametrize("command", MAIN)
@settings(max_examples=8)
@given(
    width=st.sampled_from(WIDTHS),
    listed=st.lists(names(), min_size=1, max_size=4, unique=True),
    number=st.integers(0, 10**9),
)
def test_no_name_is_broken_and_no_column_is_lost_without_a_word(
    command: str, width: int, listed: list[str], number: int
) -> None:
    columns = MAIN[command]
    rows = tuple(tuple(cell(column, name, number, place) for place, column in enumerate(columns)) for name in listed)
    lines = shown(Table("t", columns, rows), width)
    assert max(map(len, lines)) <= width
    said = " ".join(" ".join(lines).split())
    hidden = found[1].split(", ") if (found := re.search(rf"Not shown at {width} columns: (.*?)\. Use", said)) else []
    end = next((place for place, line in enumerate(lines) if line.startswith("  Not shown")), len(lines))
    heads, body = lines[: end - len(rows)], lines[end - len(rows) : end]
    for column in columns:
        assert column.heading in hidden or all(word in " ".join(heads) for word in column.heading.split())
    assert columns[0].heading not in hidden
    for line, name in zip(body, listed, strict=True):
        assert fits(line.split()[0], name)
    assert len({line.split()[0] for line in body}) == len(listed) or width < 100


def test_whole_parts_that_tell_least_are_left_out() -> None:
    assert shorten("model.layers.0.mlp.down_proj.weight", 28) == "model…0.mlp.down_proj.weight"
    assert shorten("model.decoder.block.mlp.down_proj.weight", 26) == "model…mlp.down_proj.weight"
    assert shorten("model.layers.3.experts.14.w1.weight", 24) == "…3.experts.14.w1.weight"
    assert shorten("model.layers.3.experts.14.w1.weight", 17) == "…3…14.w1.weight"
    assert shorten("/a/layers.3/experts.14/w1/kernel:0", 22) == "/a…3…14/w1/kernel:0"
    assert shorten("model.weight", 12) == "model.weight"
    assert shorten("a_single_very_long_name_of_a_layer", 16) == "a_sin…of_a_layer"


def test_names_that_differ_stay_different() -> None:
    listed = [f"block{at}.expand_and_normalize.parameters" for at in range(9)]
    for width in range(12, 40):
        short = shorten_all(listed, width)
        assert len(set(short)) == len(listed)
        assert max(map(len, short)) <= width


def test_sentences_wrap_at_words_and_are_not_shortened() -> None:
    reason = "its channels go through Reshape node_12 that mixes them with positions of the picture"
    table = Table("t", (Column("channels of"), Column("locked")), (("conv1.weight", reason),))
    lines = shown(table, 60)
    assert [word for line in lines[1:] for word in line.split() if word != "conv1.weight"] == reason.split()
    assert max(map(len, lines)) <= 60


def test_the_least_important_columns_go_first_and_are_named() -> None:
    columns = inspect._columns("", has_flops=False)
    row = ("model.layers.10.mlp.down_proj.weight", "kernel", "2048x5632", "bfloat16", 11_534_336, 5_767_168, 0.5, 12)
    lines = shown(Table("tensors", columns, (row,)), 80)
    assert "Not shown at 80 columns: dead channels, zeros." in " ".join(" ".join(lines).split())
    assert lines[1].startswith("model…10.mlp.down_proj.weight")
    assert len(shown(Table("tensors", columns, (row,)), 120)) == 2


def test_a_column_that_is_empty_goes_without_a_word() -> None:
    columns = (Column("tensor"), Column("was", is_optional=True), Column("shape", is_whole=True))
    table = Table("t", columns, (("conv1.weight", "", "12x3x3x3"),))
    assert shown(table, 23) == shown(table, 120) == ["tensor        shape   ", "conv1.weight  12x3x3x3"]


def test_wide_letters_are_counted_as_a_terminal_does() -> None:
    short = shorten("層の重み層の重み層の重み", 9)
    assert "…" in short
    assert 8 <= cell_len(short) <= 9


def test_a_size_that_was_not_measured_has_its_reason() -> None:
    model = open_model(FIXTURES / "digits_cnn.pt")
    measured = measure_stats(model, model.tensors, has_zeros=False)
    big = replace(measured, bytes=SizeStats(raw=20_000_000))
    said = " ".join(" ".join(shown(prune.before_after(big, big), 80)).split())
    assert "after - 20.0 MB - -" in said
    assert (
        "packed and gzip sizes of a model above 16 MB are not measured: prunectl size measures them, prunectl size "
        "--estimate" in said
    )
    small = replace(measured, bytes=SizeStats(raw=20_000, packed=10_000, compressed=9_000))
    assert "not measured" not in " ".join(shown(prune.before_after(small, small), 80))
