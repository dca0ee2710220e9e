"""A process that makes points for a sweep: it is told them on its standard input, and answers on what was its output.

`python -m prunectl.sweeping.worker`: a line with the job, then a line for each point; it ends with its input.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading

from prunectl.sweeping.workers import handle

_GONE = 1


def main() -> None:
    """Make points until there are no more."""
    # What frameworks print is not an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    job = json.loads(lines.get())
    while True:
        answers.write(json.dumps(handle(job, json.loads(lines.get()))) + "\n")
        answers.flush()


def _listen(lines: queue.SimpleQueue[str]) -> None:
    """Take what is said, and end at once when nobody is there any more: another run may make the same point."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(_GONE)


if __name__ == "__main__":
    main()
