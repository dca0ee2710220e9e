"""The pictures of the documents, as SVG, light and dark: a terminal of real output, and a chart of published figures.

    python -m benchmarks.pictures          both
    python -m benchmarks.pictures chart    the chart alone

Nothing in a picture is typed by hand. The commands are run in a scratch folder, and lines left out are marked by an
ellipsis; the chart has the numbers of the tables in docs/figures.md.
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
THEMES = {"light": LIGHT, "dark": DARK}


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


METHODS = ("magnitude", "magnitude, global", "magnitude + repair", "obs, global")
PANEL, HEIGHT, TOP, LEFT = 260, 300, 44, 58
SPARSITIES = (70, 80, 90, 95)


def calibration_tables() -> dict[str, dict[str, list[float]]]:
    """Return the accuracies of the section on pruning without training: by network and method, dense among them."""
    section = (ROOT / "docs/figures.md").read_text().partition("## Pruning without training")[2].partition("\n## ")[0]
    found = {}
    for network, dense, rows in re.findall(r"\*\*([^*]+)\*\*, dense ([\d.]+) %\n\n((?:\|.*\n)+)", section):
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()[2:]]
        found[network] = {name: list(map(float, values)) for name, *values in cells} | {"dense": [float(dense)]}
    return found


def chart(theme: TerminalTheme) -> str:
    """Return accuracy against sparsity, a panel for each network and a line for each method."""
    ink, paper = theme.foreground_color.hex, theme.background_color.hex
    colors = dict(zip(METHODS, (theme.ansi_colors[number] for number in (1, 3, 4, 2)), strict=True))
    tables = calibration_tables()
    width = LEFT + len(tables) * PANEL + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 76}" role="img">',
        "<title>Accuracy against sparsity, without training afterwards</title>",
        f'<rect width="100%" height="100%" rx="8" fill="{paper}"/>',
        f'<g font-family="system-ui, sans-serif" font-size="12" fill="{ink}" stroke-linejoin="round">',
    ]
    for number, (network, table) in enumerate(tables.items()):
        lines += panel(network, table, LEFT + number * PANEL, colors, ink, is_first=not number)
    for number, (method, color) in enumerate(colors.items()):
        x = LEFT + number * 190
        lines.append(f'<rect x="{x}" y="{HEIGHT + 46}" width="18" height="4" fill="rgb({color_text(color)})"/>')
        lines.append(f'<text x="{x + 24}" y="{HEIGHT + 52}">{method}</text>')
    return "\n".join([*lines, "</g>", "</svg>", ""])


def color_text(color: tuple[int, int, int]) -> str:
    return ",".join(map(str, color))


def panel(
    network: str,
    table: dict[str, list[float]],
    left: int,
    colors: dict[str, tuple[int, int, int]],
    ink: str,
    *,
    is_first: bool,
) -> list[str]:
    """Return one network's axes and lines."""

    def x(sparsity: float) -> float:
        return left + (sparsity - 70) / 25 * (PANEL - 48)

    def y(accuracy: float) -> float:
        return round(TOP + (1 - accuracy / 100) * (HEIGHT - TOP), 1)

    (dense,) = table["dense"]
    lines = [f'<text x="{left}" y="26" font-weight="600">{network.partition(",")[0]}</text>']
    for accuracy in (0, 25, 50, 75, 100):
        lines.append(f'<path d="M{left} {y(accuracy)}H{x(95):g}" stroke="{ink}" stroke-opacity=".15"/>')
        if is_first:
            lines.append(f'<text x="{left - 8}" y="{y(accuracy) + 4:g}" text-anchor="end">{accuracy} %</text>')
    for sparsity in SPARSITIES:
        lines.append(f'<text x="{x(sparsity):g}" y="{HEIGHT + 20}" text-anchor="middle">{sparsity} %</text>')
    lines.append(
        f'<path d="M{left} {y(dense)}H{x(95):g}" stroke="{ink}" stroke-dasharray="4 4"/>'
        f'<text x="{x(95):g}" y="{y(dense) - 5:g}" text-anchor="end">dense {dense:.2f} %</text>'
    )
    for method, color in colors.items():
        points = list(zip(SPARSITIES, table[method], strict=True))
        path = "L".join(f"{x(sparsity):g} {y(accuracy)}" for sparsity, accuracy in points)
        lines.append(f'<path d="M{path}" fill="none" stroke="rgb({color_text(color)})" stroke-width="2.5"/>')
        lines += [
            f'<circle cx="{x(sparsity):g}" cy="{y(accuracy)}" r="3.5" fill="rgb({color_text(color)})">'
            f"<title>{method}, {sparsity} %: {accuracy:.2f} %</title></circle>"
            for sparsity, accuracy in points
        ]
    return lines


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name, theme in THEMES.items():
        (PICTURES / f"accuracy-{name}.svg").write_text(chart(theme))
    if "chart" not in sys.argv[1:]:
        lines = screen()
        for name, theme in THEMES.items():
            (PICTURES / f"terminal-{name}.svg").write_text(drawn(lines, theme))


if __name__ == "__main__":
    main()
