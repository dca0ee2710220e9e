"""A process that makes points for a sweep: it is told them on its standard input, and answers on what was its output.

`python -m prunectl.sweeping.worker`: a line with the job, then a line for each point; it ends with its input.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from prunectl.errors import PrunectlError, translate
from prunectl.sweeping.choices import Choices
from prunectl.sweeping.point import Point
from prunectl.sweeping.trial import attempt

_GONE = 1


def main() -> None:
    """Make points until there are no more."""
    # What frameworks print is not an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    job = json.loads(lines.get())
    path, folder, choices = Path(job["model"]), Path(job["folder"]), Choices.of_json(job["choices"])
    while True:
        point = Point(**json.loads(lines.get()))
        answers.write(json.dumps(_answer(path, choices, folder, point)) + "\n")
        answers.flush()


def _listen(lines: queue.SimpleQueue[str]) -> None:
    """Take what is said, and end at once when nobody is there any more: another run may make the same point."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(_GONE)


def _answer(path: Path, choices: Choices, folder: Path, point: Point) -> dict[str, Any]:
    try:
        return {"outcome": attempt(path, choices, folder, point).as_json}
    except Exception as error:  # noqa: BLE001 - the other points can do without this one
        known = error if isinstance(error, PrunectlError) else translate(error)
        if known is None:
            traceback.print_exception(error)
            return {"bug": f"{type(error).__name__}: {error}"}
        said = {"message": known.message, "hint": known.hint, "did_you_mean": list(known.did_you_mean)}
        return {"error": {"kind": known.kind, **said}}


if __name__ == "__main__":
    main()
