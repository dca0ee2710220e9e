"""Whatever names one of our modules in text, in tables, settings or documents, names one that is there."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT, files_by_suffix, here

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = PROJECT["tool"]["importlinter"]["contracts"]
DOTTED = re.compile(r"prunectl(\.[a-z_]\w*)+")
QUOTED = r"[\"']prunectl\."
FUNCTION = re.compile(r"[a-z_][\w.]*:[A-Za-z_]\w*")
OURS_THAT_ARE_NONE = re.compile(r"prunectl\.(toml|json|md|xml|1|(strategies|policies|schedules|formats)$)")
"""Files and groups of entry points look like modules."""
EXAMPLES = frozenset({"models:CUSTOM_OBJECTS", "my_module:my_function", "net.py:Net"})
"""Of users' modules, in hints."""


def sources(mark: str, *folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield the modules that hold a mark: to take all of them apart would take long."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if re.search(mark, text := path.read_text()):
                yield path.relative_to(ROOT).as_posix(), ast.parse(text)


def texts(tree: ast.Module) -> Iterator[str]:
    """Yield the strings in a module, but no docstrings and no pieces of f-strings."""
    nodes = list(ast.walk(tree))
    left_out = {id(piece) for node in nodes if isinstance(node, ast.JoinedStr) for piece in node.values}
    left_out |= {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node.value


def prefixes() -> set[str]:
    """Return the packages that names in tables go on from: of f"prunectl.formats.{module}" its beginning."""
    found = set()
    for _, tree in sources(r"f\"prunectl", "prunectl"):
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                begin = re.fullmatch(r"(prunectl(?:\.[a-z_]\w*)*)\.", str(node.values[0].value))
                if begin and len(node.values) > 1:
                    found.add(begin[1])
    return found


def source(module: str) -> Path | None:
    """Return the file of one of our modules: nothing is imported, for some need a framework."""
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or what a module has."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        if source(module) is not None:
            return count == len(parts) or defines(module, parts[count])
    return False


@cache
def bound(path: Path) -> frozenset[str]:
    """Return what a module binds at its top, and what it offers and binds when it is asked."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.alias(name=name, asname=other):
                names.add((other or name).partition(".")[0])
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=offered) | ast.Tuple(elts=offered)):
                names |= {str(item.value) for item in offered if isinstance(item, ast.Constant)}
            case _:
                waiting.extend(ast.iter_child_nodes(node))
    return frozenset(names)


def defines(module: str, name: str) -> bool:
    """Whether a module of ours has a name."""
    path = source(module)
    return path is not None and name in bound(path)


def test_names_of_modules_in_our_code_are_there() -> None:
    named = {
        (file, text)
        for file, tree in sources(QUOTED, "prunectl", "benchmarks", "examples")
        for text in texts(tree)
        if DOTTED.fullmatch(text) and not OURS_THAT_ARE_NONE.match(text)
    }
    assert len(named) > 10
    assert [(file, text) for file, text in sorted(named) if not is_there(text)] == []


def test_imports_in_our_code_are_there_also_those_in_strings() -> None:
    """Programs for other processes stand in strings, where no type checker looks."""
    lost = []
    for folder in ("prunectl", "tests", "benchmarks", "examples", "fixtures"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            named = re.findall(r"\bfrom (prunectl[\w.]*) import (\w+)|\bimport (prunectl(?:\.\w+)+)", path.read_text())
            lost += [(path.name, name) for name in map(".".join, map(_told, named)) if not is_there(name)]
    assert lost == []


def _told(parts: tuple[str, ...]) -> list[str]:
    return [part for part in parts if part]


def test_functions_that_tables_name_are_there() -> None:
    packages = prefixes()
    assert packages
    named = {
        (file, text)
        for file, tree in sources(rf"\"{FUNCTION.pattern}\"", "prunectl")
        for text in texts(tree)
        if FUNCTION.fullmatch(text) and text not in EXAMPLES
    }
    lost = []
    for file, text in sorted(named):
        module, _, name = text.partition(":")
        whole = [module] if module.startswith("prunectl.") else [f"{package}.{module}" for package in packages]
        lost += [] if any(defines(one, name) for one in whole) else [(file, text)]
    assert len(named) > 30
    assert lost == []


def test_commands_and_topics_can_be_loaded() -> None:
    """Every row of the tables of names, by way of what `help` shows."""
    words = re.findall(r"^  ([a-z][a-z-]*)  ", here("help").out, re.MULTILINE)
    assert len(words) > 20
    for word in words:
        assert here("help", word).code == 0, word


def test_what_tests_patch_by_name_is_there() -> None:
    named = {
        (file, text)
        for file, tree in sources(QUOTED, "tests")
        for text in texts(tree)
        if DOTTED.fullmatch(text) and not OURS_THAT_ARE_NONE.match(text) and text != "prunectl.tests"
    }
    assert [(file, text) for file, text in sorted(named) if not is_there(text.removesuffix("."))] == []


def test_entry_points_are_there() -> None:
    for target in PROJECT["project"]["scripts"].values():
        assert defines(*target.split(":")), target


@pytest.mark.parametrize("contract", CONTRACTS, ids=[contract["name"] for contract in CONTRACTS])
def test_modules_of_contracts_are_there(contract: dict[str, Any]) -> None:
    own = [*contract.get("source_modules", ()), *contract.get("forbidden_modules", ())]
    own += [line.split(" -> ")[0] for line in contract.get("ignore_imports", ())]
    own += [f"{box}.{layer}" for box in contract.get("containers", ()) for layer in contract["layers"]]
    for box in contract.get("containers", ()):
        own += [f"{box}.{name}" for name in contract.get("exhaustive_ignores", ())]
    ours = [name.removesuffix(".**").removesuffix(".*") for name in own if name.split(".")[0] == "prunectl"]
    assert ours
    assert [name for name in ours if not is_there(name)] == []


def documents() -> list[Path]:
    own = [*files_by_suffix(".md", ".toml", ".yml", ".sh"), ROOT / "Makefile", *(ROOT / ".ci").iterdir()]
    own.append(ROOT / ".pre-commit-hooks.yaml")
    # The history names what was.
    return [path for path in own if path.name != "CHANGELOG.md"]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_and_modules_in_documents_are_there(path: Path) -> None:
    text = path.read_text()
    files = re.findall(
        r"(?<![\w/.-])((?:prunectl|tests|benchmarks|fixtures|examples)/[\w/.-]*\w\.(?:py|json|sh))", text
    )
    assert [file for file in files if not (ROOT / file).exists()] == []
    imported = re.findall(r"from (prunectl[\w.]*) import (\w+)|import (prunectl(?:\.\w+)+)", text)
    assert [name for name in imported if not is_there(".".join(_told(name)))] == []


def test_short_paths_in_the_guide_are_there() -> None:
    """CONTRIBUTING says `formats/table.py`, and leaves out the package."""
    named = re.findall(r"`([a-z_]+/[\w/]*(?:\.\w+)?)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert named
    assert [name for name in named if not any((ROOT / base / name).exists() for base in ("", "prunectl"))] == []
