"""How the code is cut: files, lines, names and imports by room, and what a command runs through.

`python -m benchmarks.house` prints the figures; `--no-traces` leaves out the commands, which take a minute.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prunectl"
SHORT = 60
"""A module with fewer lines and a single importer is a paragraph of that importer."""
VAGUE = re.compile(r"\b(said|asked|found|told|anew|reckon\w*)\b", re.IGNORECASE)
FIXTURES = ROOT / "fixtures"
TRACES = {
    "prune m.pt": ["prune", f"{FIXTURES}/digits_cnn.pt", "-o", "out.pt", "-s", "0.8"],
    "inspect m.h5 --json": ["inspect", f"{FIXTURES}/digits_cnn.h5", "--json"],
    "prune a chunked HDF5": ["prune", f"{FIXTURES}/chunked_and_gzipped.h5", "-o", "out.h5", "-s", "0.8"],
    "finetune m.h5": [
        *("finetune", f"{FIXTURES}/digits_cnn.h5", "-o", "out.h5", "--epochs", "1", "-s", "0.8", "--batch-size", "8"),
        *("--data", f"{FIXTURES}/digits.npz"),
    ],
    "prune m.onnx by channels": [
        *("prune", f"{FIXTURES}/digits_cnn.onnx", "-o", "out.onnx", "-s", "0.5", "--pattern", "channel"),
    ],
}
TRACER = """
import json, os, sys
files, forks = set(), 0
def note(frame, event, _):
    if event == "call" and frame.f_code.co_name != "<module>":
        files.add(frame.f_code.co_filename)
def forked():
    global forks
    forks += 1
os.register_at_fork(after_in_parent=forked)
import threading
threading.setprofile(note)
sys.setprofile(note)
import prunectl.cli as cli
try:
    code = cli.main()
except SystemExit as stop:
    code = stop.code
sys.setprofile(None)
own = os.path.dirname(cli.__file__) + os.sep
modules = [name for name in sys.modules if name.startswith("prunectl.")]
rooms = ("prunectl.training", "prunectl.channels", "prunectl.calibration")
with open(os.environ["HOUSE_TRACE"], "w") as sink:
    json.dump({
        "code": code or 0,
        "files": sum(file.startswith(own) for file in files),
        "modules": len(modules),
        "of training, channels, calibration": sum(name.startswith(rooms) for name in modules),
        "forks": forks,
    }, sink)
"""


def main() -> None:
    """Print a table of the rooms, a table of the whole, and a table of what commands run through."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house", description=__doc__)
    parser.add_argument("--no-traces", action="store_true")
    options = parser.parse_args()
    console = Console()
    sources = {_module(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    importers = _importers(sources)
    console.print(_rooms(sources, importers))
    console.print(_whole(sources, importers))
    if not options.no_traces:
        console.print(_traces())


def _rooms(sources: dict[str, str], importers: dict[str, set[str]]) -> Table:
    table = _table("room", "files", "lines", "median", "longest", f"one importer, under {SHORT} lines")
    rooms: dict[str, list[str]] = defaultdict(list)
    for module in sources:
        rooms[_room(module)].append(module)
    for room, modules in sorted(rooms.items()):
        table.add_row(room, *_figures(sources, importers, modules))
    table.add_section()
    table.add_row("all", *_figures(sources, importers, list(sources)))
    return table


def _figures(sources: dict[str, str], importers: dict[str, set[str]], modules: list[str]) -> list[str]:
    lines = [sources[module].count("\n") for module in modules]
    lonely = [module for module in modules if _is_lonely(module, sources, importers)]
    return [str(figure) for figure in (len(lines), sum(lines), statistics.median_low(lines), max(lines), len(lonely))]


def _is_lonely(module: str, sources: dict[str, str], importers: dict[str, set[str]]) -> bool:
    is_code = any(not isinstance(node, ast.Expr) for node in ast.parse(sources[module]).body)
    return is_code and sources[module].count("\n") < SHORT and len(importers[module]) == 1


def _whole(sources: dict[str, str], importers: dict[str, set[str]]) -> Table:
    classes = Counter(
        node.name
        for source in sources.values()
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    words = Counter(word.lower() for source in sources.values() for word in VAGUE.findall(source))
    table = _table("of the whole", "number", "which")
    shared = sorted(name for name, count in classes.items() if count > 1)
    table.add_row("public classes that share a name", str(len(shared)), ", ".join(shared))
    table.add_row(
        "vague words", str(words.total()), ", ".join(f"{word} {count}" for word, count in words.most_common())
    )
    lonely = [module for module in sources if _is_lonely(module, sources, importers)]
    table.add_row(f"under {SHORT} lines with one importer", str(len(lonely)), ", ".join(lonely))
    return table


def _traces() -> Table:
    names = ("files", "modules", "of training, channels, calibration", "forks")
    table = _table("command", "files run", "modules loaded", "of training, channels, calibration", "forks")
    for title, arguments in TRACES.items():
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            environment = {**os.environ, "HOUSE_TRACE": str(trace), "PYTHONPATH": path}
            command = [sys.executable, "-c", TRACER, *arguments]
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
            figures = json.loads(trace.read_text())
        if figures["code"]:
            raise SystemExit(f"{title} ended with {figures['code']}")
        table.add_row(title, *(str(figures[name]) for name in names))
    return table


def _importers(sources: dict[str, str]) -> dict[str, set[str]]:
    importers: dict[str, set[str]] = defaultdict(set)
    for module, source in sources.items():
        for target in _imported(source):
            if target in sources and target != module:
                importers[target].add(module)
    return importers


def _imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (PACKAGE / parts[-1]).is_dir() else "(top)"


def _table(first: str, *others: str) -> Table:
    table = Table(first)
    for name in others:
        table.add_column(name, justify="right" if name != "which" else "left")
    return table


if __name__ == "__main__":
    main()
