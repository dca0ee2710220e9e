"""The file of budgets: found, understood, and its slips told with file, line and the nearest key."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunectl.checks import schema
from prunectl.checks.config import scan_keys
from prunectl.checks.schema import BUDGET, LAYER, TOP
from tests.checks.checking import MODEL, RAW, prunectl, put


def test_the_nearest_folder_upwards_wins(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    put(tmp_path, f"[[budget]]\npath = '*.safetensors'\nmax-raw = {RAW}\n", m=MODEL)
    found = prunectl(inner, "check")
    assert (found.code, found.rows[0][2]) == (0, "../../m.safetensors")
    put(inner.parent, "[[budget]]\npath = '*.safetensors'\nmax-raw = 1\n", n=MODEL)
    found = prunectl(inner, "check")
    assert (found.code, found.rows[0][2]) == (1, "../n.safetensors")


def test_pyproject_toml_serves_as_well_if_it_has_budgets(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    (tmp_path / "m.safetensors").write_bytes(MODEL)
    (tmp_path / "pyproject.toml").write_text(
        "[project]\nname = 'x'\n\n[tool.prunectl]\non-missing = 'warn'\n\n"
        "[[tool.prunectl.budget]]\npath = '*.safetensors'\nmax-raw = 1\n"
    )
    found = prunectl(inner, "check", "--json")
    assert found.code == 1
    assert found.json["gates"][0]["line"] == 9


def test_its_own_file_comes_before_pyproject_toml(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = '*.safetensors'\nmax-raw = 1\n", m=MODEL)
    (tmp_path / "pyproject.toml").write_text("[tool.prunectl]\nnonsense = 1\n")
    assert prunectl(tmp_path, "check").code == 1


def test_no_file_at_all_is_told_with_what_writes_one(tmp_path: Path) -> None:
    found = prunectl(tmp_path, "check")
    assert found.code == 2
    assert "prunectl init" in found.err


SLIPS = [
    ("on-mising = 'warn'\n", 1, "on-missing"),
    ("\n[[budget]]\npath = 'a'\nmax-gzp = 1\n", 4, "max-gzip"),
    ("[[budget]]\npath = 'a'\nmax-raw = 1\n[[budget]]\npath = 'b'\n\nmax_raw = 1\n", 7, "max-raw"),
    ("[[budget]]\npath = 'a'\n[[budget.layer]]\nname = 'x'\nmin-sparsty = 1\n", 5, "min-sparsity"),
    ("[[budget]]\npath = [\n  'a',\n]\nmax-growth = {fial = '2%'}\n", 5, "fail"),
    ('[[budget]]\npath = """\na"""\nmessge = "x"\n', 4, "message"),
    ("[[budget]]\npath = 'a'\nbudget = 1\n", 3, ""),
    ("[[budget]]\nmax-raw = 1\n", 1, ""),
    ("[[budget]]\npath = 'a'\nmax-raw = '1 cow'\n", 3, ""),
    ("[[budget]]\npath = 'a'\nmax-raw = 1.5\n", 3, ""),
    ("[[budget]]\npath = 'a'\nmax-raw = true\n", 3, ""),
    ("[[budget]]\npath = 'a'\nmax-params = '1MB'\n", 3, ""),
    ("[[budget]]\npath = 'a'\nmin-sparsity = 80\n", 3, ""),
    ("[[budget]]\npath = 'a'\nmin-nm = 'channel'\n", 3, ""),
    ("[[budget]]\npath = 'a'\nmax-raw = {}\n", 3, ""),
    ("[[budget]]\npath = 'a'\nmax-raw = {fail = 1, warn = 2}\n", 3, ""),
    ("[[budget]]\npath = 'a'\nmin-sparsity = {fail = 0.5, warn = 0.4}\n", 3, ""),
    ("[[budget]]\npath = 1\n", 2, ""),
    ("[[budget]]\npath = 'a'\nmessage = 'x'\n", 1, ""),
    ("[[budget]]\npath = 'a'\nmax-raw = 1\n[[budget.layer]]\nname = 'b'\n", 4, ""),
    ("[[budget]]\npath = 'a'\nmessage = 1\nmax-raw = 1\n", 3, ""),
    ("[budget]\npath = 'a'\n", 1, ""),
    ("on-missing = 'shrug'\n[[budget]]\npath = 'a'\n", 1, ""),
    ("[[budget]]\npath = 'a'\nmax-drop = 1\n", 3, ""),
]


@pytest.mark.parametrize(("toml", "line", "meant"), SLIPS, ids=[toml for toml, _, _ in SLIPS])
def test_a_slip_is_told_with_file_line_and_the_nearest_key(toml: str, line: int, meant: str, tmp_path: Path) -> None:
    found = prunectl(put(tmp_path, toml), "check", "--json")
    error = found.json["error"]
    assert found.code == 2
    assert error["message"].startswith(f"prunectl.toml:{line}: ")
    assert meant in {*error["did_you_mean"], ""}


@pytest.mark.parametrize("toml", ["budget = [", "", "[tool]\n", "\udcff"])
def test_a_file_that_is_no_toml_or_has_no_budget_is_refused(toml: str, tmp_path: Path) -> None:
    (tmp_path / "prunectl.toml").write_text(toml, errors="surrogateescape")
    assert prunectl(tmp_path, "check").code == 2


def test_a_file_of_a_windows_editor_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(MODEL)
    text = "[[budget]]\r\npath = '*.safetensors'\r\nmax-raw = 1\r\n"
    (tmp_path / "prunectl.toml").write_bytes(text.encode("utf-8-sig"))
    found = prunectl(tmp_path, "check", "--json")
    assert (found.code, found.json["gates"][0]["line"]) == (1, 3)


def test_a_file_that_is_not_utf_8_is_to_be_saved_as_it(tmp_path: Path) -> None:
    (tmp_path / "prunectl.toml").write_bytes("[[budget]]\npath = 'a'\n".encode("utf-16"))
    found = prunectl(tmp_path, "check", "--json")
    assert (found.code, found.json["error"]["hint"]) == (2, "save it as UTF-8")


def test_the_schema_that_ships_is_the_table_of_keys() -> None:
    assert json.loads(Path(schema.__file__).with_name(schema.FILE).read_text(encoding="utf-8")) == schema.schema()


def test_the_schema_names_every_key_and_no_other() -> None:
    top = json.loads(Path(schema.__file__).with_name(schema.FILE).read_text(encoding="utf-8"))["properties"]
    budget = top["budget"]["items"]["properties"]
    for keys, properties in ((TOP, top), (BUDGET, budget), (LAYER, budget["layer"]["items"]["properties"])):
        assert [key.name for key in keys] == list(properties)


KEYS = st.text("abcdefgh-_", min_size=1, max_size=5)
VALUES = st.one_of(
    st.integers(), st.booleans(), st.lists(st.integers(), max_size=3), st.text("ab#[]{}'\"= \n", max_size=9)
)


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.lists(st.dictionaries(KEYS, VALUES, max_size=4), max_size=3))
def test_the_line_of_every_key_is_found_whatever_is_around_it(
    top: dict[str, Any], tables: list[dict[str, Any]]
) -> None:
    lines: list[str] = []
    where: dict[tuple[Any, ...], int] = {}

    def add(path: tuple[Any, ...], table: dict[str, Any]) -> None:
        for key, value in table.items():
            where[(*path, key)] = len("\n".join([*lines, ""]).split("\n"))
            lines.append(f"{key} = {written(value)}")

    add((), {f"t{key}": value for key, value in top.items()})
    for number, table in enumerate(tables):
        where["list", number] = len("\n".join([*lines, ""]).split("\n"))
        lines.append("[[list]]  # another")
        add(("list", number), table)
    text = "\n".join(lines)
    tomllib.loads(text)
    found = scan_keys(text)
    assert {path: found.of(*path) for path in where} == where


def written(value: Any) -> str:
    """Return a value as TOML, some of it over several lines."""
    if isinstance(value, list):
        return "[ # numbers\n" + "".join(f"  {item},\n" for item in value) + "]"
    if isinstance(value, str) and "\n" in value:
        return '"""' + value.replace("\\", "\\\\").replace('"', '\\"') + '"""'
    return json.dumps(value)
