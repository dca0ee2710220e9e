"""Mutants of model files through the commands: which exit codes, what they cost, what they leave behind.

`python -m benchmarks fuzz` runs 1,000 mutants of each kind through `inspect` and 200 through each of the others.
`python -m benchmarks.fuzz [--inspect N] [--others N] [--kinds A,B] [--commands A,B] [--keep DIR] [--first N]` runs some
of it, from a number on, and keeps the mutants that were handled wrongly. The same numbers give the same mutants, on any
machine.

Every command runs in a worker that has run others before, as a process of its own for each would take a day; one that
dies or hangs is told, and replaced.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.timing import PYTHON, QUIET, show

ROOT = Path(__file__).parent.parent
KINDS = {
    "h5": "digits_cnn.h5",
    "h5 chunked": "chunked_and_gzipped.h5",
    "h5 of tfmot": "wrapped_by_tfmot.h5",
    "keras": "digits_cnn.keras",
    "keras deflated": "deflated.keras",
    "SavedModel": "digits_cnn_savedmodel",
    "checkpoint": "digits_cnn_checkpoint.index",
    "pt": "checkpoint_with_optimizer.pt",
    "pt masks": "masks_of_torch_prune.pt",
    "pt legacy": "before_torch_1.6.pt",
    "TorchScript": "digits_cnn_torchscript.pt",
    "pt2": "digits_cnn.pt2",
    "ONNX": "digits_cnn.onnx",
    "ONNX beside": "external_data",
    "safetensors": "digits_cnn.safetensors",
    "shards": "two_shards",
    "TFLite": "digits_cnn.tflite",
}
COMMANDS: dict[str, Callable[[str, str], list[str]]] = {
    "inspect": lambda model, _: ["inspect", model],
    "prune": lambda model, _: ["prune", model, "-o", "out", "-s", "50%"],
    "strip": lambda model, _: ["strip", model, "-o", "out"],
    "size": lambda model, _: ["size", model],
    "diff": lambda model, sound: ["diff", model, sound],
    "wrap": lambda model, _: ["prune", model, "-o", "out", "-s", "50%", "--wrap"],
    "export": lambda model, _: ["export", model, "-o", "out.onnx"],
}
ALLOWED = {0, 2, 3, 5}
MAX_SECONDS, MAX_BYTES, MAX_CHARACTERS, HANG_SECONDS = 2.0, 300_000_000, 300, 120.0
JOBS_OF_A_WORKER = 400
"""Then a new one, lest what one mutant has done to a framework weigh on all the others."""


def flipped(data: bytearray, chance: random.Random) -> bytearray:
    for _ in range(chance.choice((1, 1, 2, 8)) if data else 0):
        data[_place(data, chance)] ^= 1 << chance.randrange(8)
    return data


def overwritten(data: bytearray, chance: random.Random) -> bytearray:
    number = chance.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1))
    width = chance.choice((1, 2, 4, 8))
    at = _place(data, chance)
    data[at : at + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, chance.choice(("little", "big")))
    return data


def cut(data: bytearray, chance: random.Random) -> bytearray:
    at = _place(data, chance)
    return data[:at] if chance.random() < 0.5 else data[:at] + data[at + chance.choice((1, 2, 8, 64, 1024)) :]


def repeated(data: bytearray, chance: random.Random) -> bytearray:
    at, length = _place(data, chance), chance.choice((1, 4, 16, 256, 4096))
    return data[:at] + data[at : at + length] * chance.choice((2, 3, 50)) + data[at + length :]


def inserted(data: bytearray, chance: random.Random) -> bytearray:
    at = _place(data, chance)
    many = chance.choice((b"[", b"{", b"]", b"\x00", b"\xff", b"a")) * chance.choice((1, 64, 500, 5000))
    junk = chance.choice((many, many, b"..\x00/", b'""'))
    return data[:at] + junk + data[at:]


def numbered(data: bytearray, chance: random.Random) -> bytearray:
    """Another number in the place of one that is written in digits, as JSON has them."""
    digits = [at for at in range(len(data)) if 48 <= data[at] <= 57][:5000]
    if not digits:
        return flipped(data, chance)
    at = chance.choice(digits)
    number = chance.choice((b"-1", b"0", b"99999999999", b"1e400", b"null", b"NaN", b"true", b"[]", b'"x"'))
    return data[:at] + number + data[at + 1 :]


MUTATIONS = (flipped, flipped, overwritten, overwritten, cut, repeated, inserted, numbered)


def _place(data: bytearray, chance: random.Random) -> int:
    """Somewhere, most often near an end, where containers say what they hold."""
    size = max(len(data), 1)
    near = min(size, chance.choice((64, 512, 4096, size)))
    at = chance.randrange(near)
    return min(at if chance.random() < 0.6 else size - 1 - at, max(len(data) - 1, 0))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A mutant of a file; of a zip often with an entry changed and all checksums right, or nothing would be read."""
    if data.startswith(b"PK") and chance.random() < 0.7:
        return _zip_mutant(data, chance)
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 3))):
        changed = chance.choice(MUTATIONS)(changed, chance)
    return bytes(changed)


def _zip_mutant(data: bytes, chance: random.Random) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = [info.filename for info in old.infolist() if info.file_size]
        chosen = chance.choice(names)
        for info in old.infolist():
            content = old.read(info)
            if info.filename == chosen:
                content = mutated(content, chance)
            new.writestr(zipfile.ZipInfo(info.filename, info.date_time), content, info.compress_type)
    return out.getvalue()


def mutant(kind: str, number: int, folder: Path) -> str:
    """Write a mutant into a folder, and say by which name it is opened."""
    chance = random.Random(f"{kind} {number}")
    source = ROOT / "fixtures" / KINDS[kind]
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file())
        shutil.copytree(source, folder / "model")
        chosen = chance.choice(files)
        (folder / "model" / chosen.relative_to(source)).write_bytes(mutated(chosen.read_bytes(), chance))
        own = [path.name for path in files if path.suffix == ".onnx" or path.name.endswith(".index.json")]
        return f"model/{own[0]}" if own else "model"
    beside = [source] if source.suffix != ".index" else sorted(source.parent.glob(f"{source.stem}.*"))
    for path in beside:
        content = path.read_bytes()
        if path == source or (path.suffix != ".index" and chance.random() < 0.2):
            content = mutated(content, chance)
        (folder / path.name).write_bytes(content)
    return source.name


def worker() -> None:
    """Run the commands that come in, a line of JSON each, and answer with what came of each."""
    from prunectl import cli

    answers = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        job = json.loads(line)
        os.chdir(job["folder"])
        out, err = io.StringIO(), io.StringIO()
        before, used = _peaks(reset=True), _seconds()
        sys.stdout, sys.stderr = out, err
        try:
            code: Any = cli._run(job["words"])  # noqa: SLF001
        except BaseException as error:  # noqa: BLE001
            code = repr(error)[:300]
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        told = {"code": code, "err": err.getvalue()[:5000], "seconds": _seconds() - used}
        grown = max(peak - before.get(pid, 0) for pid, peak in _peaks().items())
        answers.write(json.dumps({**told, "bytes": grown}) + "\n")
        answers.flush()


def _family() -> list[int]:
    """This process and its children, of which the sandbox stays from file to file."""
    found = [os.getpid()]
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended meanwhile
            found += map(int, path.read_text().split())
    return found


def _seconds() -> float:
    """Processor time of this process and its children, those that have ended among them."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = time.process_time() + ended.ru_utime + ended.ru_stime
    for pid in _family()[1:]:
        with suppress(OSError):
            ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            found += sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return found


def _peaks(*, reset: bool = False) -> dict[int, int]:
    """What this process and its children held at most since the last reset, in bytes."""
    found = {}
    for pid in _family():
        with suppress(OSError):
            if reset:
                Path(f"/proc/{pid}/clear_refs").write_text("5")
            if kilobytes := Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[:1]:
                found[pid] = int(kilobytes[0]) * 1024
    return found


@dataclass
class Worker:
    """A process that runs commands, replaced when it dies."""

    temporary: Path
    process: subprocess.Popen[str] | None = None
    jobs: int = 0

    def run(self, words: list[str], folder: Path) -> dict[str, Any]:
        if self.process is None or self.jobs >= JOBS_OF_A_WORKER:
            self.close()
            self.process = subprocess.Popen(
                [PYTHON, "-m", "benchmarks.fuzz", "--worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
                env=os.environ | QUIET | {"TMPDIR": str(self.temporary)},
            )  # fmt: skip
            self.jobs = 0
        self.jobs += 1
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"words": words, "folder": str(folder)}) + "\n")
        self.process.stdin.flush()
        line = _line(self.process.stdout, HANG_SECONDS)
        if line:
            return json.loads(line)
        try:
            code, is_hung = self.process.wait(timeout=1), False
        except subprocess.TimeoutExpired:
            self.process.kill()
            code, is_hung = self.process.wait(), True
        self.process = None
        return {"code": "hangs" if is_hung else f"signal {-code}", "err": "", "seconds": 0.0, "bytes": 0}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _line(stream: IO[str], seconds: float) -> str:
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return stream.readline() if selector.select(seconds) else ""


@dataclass
class Tally:
    """What became of the mutants of a kind under a command."""

    codes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    nbytes: int = 0
    faults: list[str] = field(default_factory=list)


def judge(found: dict[str, Any], command: str, folder: Path, temporary: Path, known: set[str]) -> Iterator[str]:
    """What is wrong with how a mutant was handled."""
    code = found["code"]
    if code not in ALLOWED:
        yield f"{code}: {found['err'].splitlines()[0][:120] if found['err'] else ''}"
    if code != 0 and (left := sorted({path.name for path in folder.iterdir()} - known)):
        yield f"leaves {left[:3]}"
    if left := [path.name for path in temporary.iterdir() if path.name.startswith("prunectl")]:
        yield f"leaves {left[:3]} in the temporary folder"
        shutil.rmtree(temporary)
        temporary.mkdir()
    is_refused, is_light = code not in (0, "hangs"), command not in {"export", "wrap"}
    if is_refused and any(len(line) > MAX_CHARACTERS + 20 for line in found["err"].splitlines()):
        yield f"says {max(map(len, found['err'].splitlines()))} characters"
    if is_light and found["seconds"] > MAX_SECONDS:
        yield f"takes {found['seconds']:.1f} s"
    if is_light and found["bytes"] > MAX_BYTES:
        yield f"takes {found['bytes'] / 1e6:.0f} MB"


def fuzz(kind: str, command: str, numbers: range, keep: Path | None) -> Tally:
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        temporary, folder = Path(scratch, "temporary"), Path(scratch, "work")
        temporary.mkdir()
        worker = Worker(temporary)
        for number in numbers:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            model = mutant(kind, number, folder)
            source = ROOT / "fixtures" / KINDS[kind]
            sound = source / Path(model).relative_to("model") if source.is_dir() else source
            known = {path.name for path in folder.iterdir()}
            found = worker.run(COMMANDS[command](model, str(sound)), folder)
            tally.codes[str(found["code"])] += 1
            tally.seconds = max(tally.seconds, found["seconds"])
            tally.nbytes = max(tally.nbytes, found["bytes"])
            for fault in judge(found, command, folder, temporary, known):
                tally.faults.append(f"{kind} {number} {command}: {fault}")
                print(tally.faults[-1], file=sys.stderr, flush=True)
                if keep is not None:
                    shutil.copytree(
                        folder, keep / f"{kind} {number} {command}".replace(" ", "_"), symlinks=True, dirs_exist_ok=True
                    )
        worker.close()
    return tally


def run(
    inspected: int = 1000, others: int = 200, kinds: list[str] | None = None, commands: list[str] | None = None,
    keep: Path | None = None, first: int = 0,
) -> list[str]:  # fmt: skip
    """Run it all, show a table, and return what was handled wrongly."""
    jobs = [
        (kind, command, range(first, first + (inspected if command == "inspect" else others)))
        for command in commands or COMMANDS
        for kind in kinds or KINDS
        if command != "wrap" or "h5" in kind or "keras" in kind or kind.startswith("pt")
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
        counts = list(workers.map(lambda job: fuzz(*job, keep), jobs))
    rows = [
        (kind, command, *(str(tally.codes[str(code)]) for code in sorted(ALLOWED)), str(len(tally.faults)),
         f"{tally.seconds:.2f} s", f"{tally.nbytes / 1e6:.0f} MB")
        for (kind, command, _), tally in zip(jobs, counts, strict=True)
    ]  # fmt: skip
    head = ("kind", "command", *(f"exit {code}" for code in sorted(ALLOWED)), "faults", "longest", "most memory")
    total = sum(len(numbers) for _, _, numbers in jobs)
    faults = [fault for tally in counts for fault in tally.faults]
    show(f"{total} mutants, {len(faults)} handled wrongly", head, rows)
    return faults


def main() -> None:
    """Run some of it from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--inspect", type=int, default=1000)
    parser.add_argument("--others", type=int, default=200)
    parser.add_argument("--kinds", default="")
    parser.add_argument("--commands", default="")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--first", type=int, default=0)
    said = parser.parse_args()
    if said.worker:
        worker()
        return
    names = [list(filter(None, text.split(","))) or None for text in (said.kinds, said.commands)]
    sys.exit(bool(run(said.inspect, said.others, *names, said.keep, said.first)))


if __name__ == "__main__":
    main()
