"""What a terminal of 80 columns shows, as pictures that are text: every page of help, and screens of the commands.

$ python -m tests.golden.screens
"""

from __future__ import annotations

import importlib
import io
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import typer
from rich.console import Console
from rich.text import Text

from prunectl.commands import doctor
from prunectl.commands._help_page import help_text
from prunectl.commands.app import COMMANDS, app
from prunectl.formats import packages
from tests.golden.running import calm, normaliser
from tests.running import FIXTURES, here

FOLDER = Path(__file__).with_name("screens")
WIDTH = 80
_FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: {char_height}px/{line_height}px monospace }}
.{unique_id}-title {{ font: bold 18px sans-serif }}
{styles}
</style>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
_BULKY = re.compile(r' (?:clip-path="url\(#screen-line-\d+\)"|textLength="[\d.]+")')
"""What holds a line in place where a font is not of one width: a third of a picture."""
_BUDGETS = """\
[[budget]]
name = "digits"
path = "digits_cnn.pt"
max-gzip = { warn = "30KB", fail = "35KB" }
min-sparsity = "50%"
"""
_VERSIONS = {"typer": "0.28.0", "tf-keras": "2.10.0", "torch": ""}
"""What `doctor` is to find: a package that is too old, one that is missing, and the others."""
_SWEEP = "--strategies magnitude,lamp --scopes global --sparsities 50%,90%"
_DATA = "'digits.npz?norm=/16&limit=64'"


@dataclass(frozen=True)
class Screen:
    """A command that is typed in a folder of models, and what it needs."""

    name: str
    line: str
    needs: str = ""


SCREENS = (
    Screen("inspect", "inspect digits_cnn.h5"),
    Screen("inspect-rows", "inspect digits_cnn.pt --tensors --sort sparsity -n 3"),
    Screen("prune", "prune digits_cnn.onnx -o small.onnx -s 80% --scope global"),
    Screen("strip", "strip checkpoint_with_optimizer.pt -o small.pt"),
    Screen("size-failing", "size digits_cnn.pt digits_cnn.onnx --max-gzip 37.5KB"),
    Screen("diff", "diff digits_cnn.pt digits_cnn.h5"),
    Screen("verify", "verify digits_cnn.pt --against digits_cnn.onnx"),
    Screen("check-failing", "check"),
    Screen("init", "init models"),
    Screen("doctor", "doctor"),
    Screen("plugins", "plugins schedules --plot"),
    Screen("sweep", f"sweep digits_cnn.onnx -o trials --data {_DATA} {_SWEEP}", "onnxruntime"),
    Screen(
        "finetune",
        f"finetune digits_cnn.pt -o tuned.pt --builder digits_torch.py:DigitsCNN --data {_DATA} --epochs 0",
        "torch",
    ),
    Screen("error-path", "inspect digits_cnm.h5"),
    Screen("error-option", "prune digits_cnn.pt -o small.pt --amount 80%"),
    Screen("error-sparsity", "prune digits_cnn.pt -o small.pt"),
    Screen("error-trust", "finetune whole_module.pt -o tuned.pt --data digits.npz", "torch"),
    Screen("old-name", "prune digits_cnn.pt --dry-run -s 50% --only 'conv*'"),
)
HELP = {
    **{f"help-{command}-short": (command, True) for command in COMMANDS},
    **{f"help-{command}-all": (command, False) for command in COMMANDS},
}
"""The pages of help by name: of which command, and whether it is the one that fits on a screen."""


def help_picture(name: str) -> str:
    """The picture of a page of help."""
    command, is_short = HELP[name]
    with patch.dict("os.environ", COLUMNS=str(WIDTH)):
        page = importlib.import_module(COMMANDS[command][0]).command
        context = typer.Context(page, info_name=f"prunectl {command}")
        text = help_text(context, is_short=is_short)
    return picture(f"prunectl {command} {'-h' if is_short else '--help'}", text)


def group_picture() -> str:
    """The picture of what prunectl shows by itself."""
    with patch.dict("os.environ", COLUMNS=str(WIDTH)):
        group = typer.main.get_command(app)
        return picture("prunectl", group.get_help(typer.Context(group, info_name="prunectl")))


def screen_picture(screen: Screen, folder: Path) -> str:
    """The picture of a command and what it prints in a folder."""
    for name in ("digits.npz", "digits_torch.py", "whole_module.pt", "checkpoint_with_optimizer.pt"):
        shutil.copyfile(FIXTURES / name, folder / name)
    (folder / "models").mkdir()
    for model in ("digits_cnn.pt", "digits_cnn.h5", "digits_cnn.onnx"):
        shutil.copyfile(FIXTURES / model, folder / model)
        shutil.copyfile(FIXTURES / model, folder / "models" / model)
    (folder / "prunectl.toml").write_text(_BUDGETS)
    with calm(), _same_everywhere():
        words = [*shlex.split(screen.line), "--format", "human", "--color", "always"]
        done = here(*words, cwd=folder, COLUMNS=str(WIDTH))
    return picture(f"prunectl {screen.line}", normaliser(folder)(f"{done.out}{done.err}"))


@contextmanager
def _same_everywhere() -> Generator[None]:
    """Hide which versions are installed on which machine."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(packages, "_version", lambda name: _VERSIONS.get(name, "30.1")))
        stack.enter_context(patch.object(packages, "_installer", lambda: ["pip", "install"]))
        stack.enter_context(patch.object(doctor, "libraries", lambda: (("zlib", "1.2.3"),)))
        stack.enter_context(patch.object(doctor, "__version__", "1.2.3"))
        for name, value in (("python_version", "3.11.0"), ("system", "Linux"), ("machine", "x86_64")):
            stack.enter_context(patch.object(platform, name, lambda value=value: value))
        yield


def picture(title: str, text: str) -> str:
    """A text with the colours of a terminal as SVG, which is the same for the same text."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(Text.from_ansi(text.rstrip("\n")))
    return _BULKY.sub("", console.export_svg(title=title, code_format=_FORMAT, unique_id="screen"))


def main() -> int:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    drawn = {"help": group_picture(), **{name: help_picture(name) for name in HELP}}
    for screen in SCREENS:
        with tempfile.TemporaryDirectory() as folder:
            drawn[screen.name] = screen_picture(screen, Path(folder))
    for old in FOLDER.glob("*.svg"):
        old.unlink()
    for name, svg in drawn.items():
        (FOLDER / f"{name}.svg").write_text(svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
