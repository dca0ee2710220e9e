"""The terminal of the README: what prunectl prints on the model that ships with it, as SVG, light and dark.

    python -m benchmarks.pictures

Nothing in a picture is typed by hand: the commands are run in a scratch folder. Lines left out are marked by an
ellipsis.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
WIDTH = 94
DATA = "digits.npz?norm=/16"
SWEEP = f"sweep digits_cnn.onnx -o trials --data '{DATA}' --val-split 30% --strategies magnitude,obs --scopes global"
PRUNE = f"prune digits_cnn.onnx -o small.onnx -s 80% --strategy obs --scope global --data '{DATA}'"
SIZE = "size small.onnx --max-gzip 10KB"


def colours(text: str) -> list[tuple[int, int, int]]:
    """Return colours that are written as in CSS, without their sharp signs."""
    return [(int(one[:2], 16), int(one[2:4], 16), int(one[4:], 16)) for one in text.split()]


LIGHT = TerminalTheme(
    *colours("ffffff 1f2328"),
    colours("24292f cf222e 116329 7d4e00 0969da 8250df 1b7c83 424a53"),
    colours("6e7781 a40e26 1a7f37 633c01 218bff a475f9 3192aa 1f2328"),
)
DARK = TerminalTheme(
    *colours("0d1117 e6edf3"),
    colours("484f58 ff7b72 3fb950 d29922 58a6ff bc8cff 39c5cf b1bac4"),
    colours("6e7681 ffa198 56d364 e3b341 79c0ff d2a8ff 56d4dd ffffff"),
)


def printed(line: str, folder: Path) -> list[str]:
    """Run a command as on a terminal of our width, and return its lines with their colours."""
    words = [sys.executable, "-m", "prunectl", *shlex.split(line), "--format", "human", "--color", "always"]
    environment = {**os.environ, "COLUMNS": str(WIDTH), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.rstrip().splitlines()


def plain(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def table(lines: list[str], first: str) -> list[str]:
    """Return the table whose head begins with a word, up to the next empty line."""
    start = next(number for number, line in enumerate(lines) if plain(line).split()[:1] == [first])
    end = next((number for number in range(start, len(lines)) if not plain(lines[number]).strip()), len(lines))
    return [line for line in lines[start:end] if not plain(line).startswith("  Not shown")]


def screen() -> list[str]:
    """Return the lines of the picture."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("digits_cnn.onnx", "digits.npz"):
            shutil.copy(ROOT / "fixtures" / name, folder)
        swept, pruned, weighed = (printed(line, folder) for line in (SWEEP, PRUNE, SIZE))
    head, rest = SWEEP.split(" --strategies")
    prune_head, prune_rest = PRUNE.split(" --strategy")
    said = [line for line in pruned if plain(line).split()[:1] in (["method"], ["pruned"])]
    return [
        f"\x1b[1m$ prunectl {head} \\\x1b[0m",
        f"\x1b[1m      --strategies{rest}\x1b[0m",
        *table(swept, "strategy"),
        "…",
        "",
        f"\x1b[1m$ prunectl {prune_head} \\\x1b[0m",
        f"\x1b[1m      --strategy{prune_rest}\x1b[0m",
        *said,
        "",
        *(
            line
            for line in pruned
            if plain(line).split()[:1] in (["before"], ["after"]) or plain(line).split()[:2] == ["sparsity", "raw"]
        ),
        "…",
        "",
        f"\x1b[1m$ prunectl {SIZE}\x1b[0m",
        *weighed,
    ]


def drawn(lines: list[str], theme: TerminalTheme) -> str:
    """Return a picture of a terminal, whose text is text."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), overflow="ignore", no_wrap=True, crop=False)
    svg = console.export_svg(title="prunectl", theme=theme, unique_id="prunectl")
    # Fonts are not fetched where a picture is shown: the reader's own monospaced one it is.
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    if theme is LIGHT:
        svg = svg.replace('stroke="rgba(255,255,255,0.35)"', 'stroke="#d0d7de"')
    svg = svg.replace("Fira Code, monospace", "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace")
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    lines = screen()
    for name, theme in (("light", LIGHT), ("dark", DARK)):
        (PICTURES / f"terminal-{name}.svg").write_text(drawn(lines, theme))


if __name__ == "__main__":
    main()
