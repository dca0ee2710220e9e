"""How long it takes until something is on the screen."""

from __future__ import annotations

from benchmarks.timing import PRUNECTL, cost, show

SMALL = tuple(
    f"digits_cnn{end}" for end in (".h5", ".keras", "_savedmodel", ".pt", ".pt2", ".onnx", ".safetensors", ".tflite")
)
GOALS_MS = {"--version": 40, "--help": 150, "size --help": 150}
GOAL_MS = 350


def run() -> None:
    """Print the times of the commands that do next to nothing."""
    rows = []
    for words, goal in GOALS_MS.items():
        rows.append(_row(words, goal))
    for verb in ("inspect", "size"):
        for name in SMALL:
            rows.append(_row(f"{verb} --json fixtures/{name}", GOAL_MS))
    show("Start-up", ("command", "ms", "goal", "MB"), rows)


def _row(words: str, goal_ms: int) -> tuple[str, ...]:
    found = cost([PRUNECTL, *words.split()], runs=9)
    return (f"`{words}`", f"{found.seconds * 1000:.0f}", str(goal_ms), f"{found.peak_bytes / 1e6:.0f}")
