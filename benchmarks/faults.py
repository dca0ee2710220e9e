"""Signals, full disks, shrinking inputs, rivals and odd surroundings, for every command that writes.

`python -m benchmarks faults`, or `python -m benchmarks.faults [--moments N] [--only NAMES]`. After each run the input
must be whole, the output whole or absent, and the user's other files untouched; after a signal that can be caught,
nothing may be left over, and after one that cannot, nothing once the command has run again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks.timing import PYTHON, QUIET, show

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"
DATA = f"{FIXTURES / 'digits.npz'}?norm=/16"
OWN = {".prunectl-mine/notes.txt": "mine", "out.notes": "mine too", "new/lock": "not prunectl's"}
"""Files of the user's beside the output."""


@dataclass(frozen=True)
class Writer:
    """A command that writes, on an input that is copied for it."""

    source: str
    words: tuple[str, ...]
    outputs: tuple[str, ...] = ("out",)
    is_same_again: bool = True
    """Whether a second run gives the same bytes."""


WRITERS = {
    "prune .pt": Writer("digits_cnn.pt", ("prune", "IN", "-o", "out", "-s", "80%")),
    "prune large": Writer("LARGE", ("prune", "IN", "-o", "out.safetensors", "-s", "80%"), ("out.safetensors",)),
    "prune --in-place": Writer("LARGE", ("prune", "IN", "-s", "80%", "--in-place"), ("IN",)),
    "prune chunked .h5": Writer("chunked_and_gzipped.h5", ("prune", "IN", "-o", "out", "-s", "80%")),
    "prune --pack .keras": Writer("digits_cnn.keras", ("prune", "IN", "-o", "out", "-s", "80%", "--pack")),
    "prune SavedModel": Writer("digits_cnn_savedmodel", ("prune", "IN", "-o", "out", "-s", "80%")),
    "prune shards": Writer("two_shards", ("prune", "IN", "-o", "out", "-s", "50%")),
    "prune --manifest": Writer(
        "digits_cnn.onnx", ("prune", "IN", "-o", "out", "-s", "80%", "--manifest", "run.json"), ("out", "run.json")
    ),
    "prune --target-gzip": Writer("digits_cnn.h5", ("prune", "IN", "-o", "out", "--target-gzip", "20KB")),
    "prune channels": Writer("digits_cnn.onnx", ("prune", "IN", "-o", "out", "--pattern", "channel", "-s", "50%")),
    "strip": Writer("checkpoint_with_optimizer.pt", ("strip", "IN", "-o", "out")),
    "strip .h5": Writer("wrapped_by_tfmot.h5", ("strip", "IN", "-o", "out", "--pack")),
    "export": Writer("digits_cnn.h5", ("export", "IN", "-o", "out.onnx"), ("out.onnx",), is_same_again=False),
    "finetune": Writer(
        "digits_cnn.onnx.h5",
        ("finetune", "IN", "-o", "out", "--data", DATA, "--epochs", "2", "--val-split", "20%"),
        is_same_again=False,
    ),
    "inspect --html": Writer("digits_cnn.h5", ("inspect", "IN", "--html", "page.html"), ("page.html",)),
}


@dataclass
class Place:
    """A folder with an input, the user's own files, and a temporary folder."""

    root: Path
    writer: Writer
    before: dict[str, bytes] = field(default_factory=dict)

    def make(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        (self.root / "tmp").mkdir(parents=True)
        source = large() if self.writer.source == "LARGE" else FIXTURES / self.writer.source.replace(".onnx.h5", ".h5")
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, self.root / f"in{source.suffix}")
        for name, text in OWN.items():
            (self.root / name).parent.mkdir(exist_ok=True)
            (self.root / name).write_text(text)
        self.before = contents(self.root)

    @property
    def input(self) -> str:
        return next(path.name for path in self.root.iterdir() if path.stem == "in")

    @property
    def words(self) -> list[str]:
        return [self.input if word == "IN" else word for word in self.writer.words]

    @property
    def outputs(self) -> list[str]:
        return [self.input if name == "IN" else name for name in self.writer.outputs]

    def start(self, *more: str, before: str = "", umask: int = -1) -> subprocess.Popen[bytes]:
        """Start the command, perhaps with a folder of modules before all others."""
        return subprocess.Popen(
            [PYTHON, "-m", "prunectl", *self.words, *more], umask=umask,
            cwd=self.root, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=os.environ | QUIET | {"TMPDIR": str(self.root / "tmp"), "PYTHONPATH": f"{before}:{ROOT}".lstrip(":")},
        )  # fmt: skip

    def made(self) -> dict[str, bytes]:
        """What is there of the outputs."""
        names = self.outputs
        return {name: data for name, data in contents(self.root).items() if any(_is_in(name, out) for out in names)}

    def faults(self, whole: dict[str, bytes], *, is_caught: bool) -> Iterator[str]:
        """What is wrong with what a run that was disturbed has left."""
        now, made = contents(self.root), self.made()
        for name, data in self.before.items():
            if name not in self.outputs and now.get(name) != data:
                yield f"{name} is {'changed' if name in now else 'gone'}"
        is_in_place = self.input in self.outputs
        new = {name: data for name, data in whole.items() if name in self.outputs}
        if is_in_place and made not in (new, {self.input: self.before[self.input]}):
            yield "the input is neither old nor new"
        elif not is_in_place and made:
            for out in self.outputs:
                own = {name: data for name, data in made.items() if _is_in(name, out)}
                wanted = {name: data for name, data in whole.items() if _is_in(name, out)}
                is_whole = own == wanted if self.writer.is_same_again else own.keys() == wanted.keys()
                if own and not is_whole:
                    yield f"{out} is not whole"
        if left := [name for name in now if name not in self.before and name not in whole and is_caught]:
            yield f"leaves {left[:2]}"


def _is_in(name: str, out: str) -> bool:
    return name == out or name.startswith(f"{out}/")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


_LARGE: list[Path] = []


def large() -> Path:
    """A file that takes long enough to be disturbed while it is read and written."""
    if not _LARGE:
        place = Path(tempfile.mkdtemp(prefix="faults-")) / "large.safetensors"
        chance = np.random.default_rng(0)
        save_file({f"{n}.weight": chance.standard_normal((1024, 2048), np.float32) for n in range(8)}, place)
        _LARGE.append(place)
    return _LARGE[0]


def signalled(place: Place, number: int, whole: dict[str, bytes], seconds: float, moments: int) -> list[str]:
    """Send a signal at so many moments of a run."""
    faults = []
    for moment in range(moments):
        place.make()
        process = place.start()
        time.sleep(seconds * (moment + 0.5) / moments)
        process.send_signal(number)
        try:
            err = process.communicate(timeout=120)[1].decode()
        except subprocess.TimeoutExpired:
            process.kill()
            faults.append(f"moment {moment}: does not end")
            continue
        found = list(place.faults(whole, is_caught=number != signal.SIGKILL))
        # Python itself, interrupted before the first line of ours, ends like that.
        is_early = "KeyboardInterrupt" in err and f"{ROOT / 'prunectl'}{os.sep}" not in err
        if "Traceback" in err and not is_early:
            found.append(f"traceback: {err.splitlines()[-3:]}")
        if number != signal.SIGKILL and not is_early and process.returncode not in (0, 130, 143, -number):
            found.append(f"exit {process.returncode}")
        if number == signal.SIGKILL:
            # The next run clears up what this one could not.
            replaces = {"--in-place", "--html"}.intersection(place.words)
            again = place.start(*(() if replaces else ("--force",)))
            again.communicate()
            found += place.faults(whole, is_caught=True)
        faults += [f"moment {moment}: {fault}" for fault in found]
    return faults


def full_disk(place: Place, whole: dict[str, bytes]) -> list[str]:
    """Run where there is room for the input, and for parts of the output."""
    faults, parent = [], place.root.parent / "small"
    parent.mkdir(exist_ok=True)
    place.make()
    size = sum(map(len, place.before.values()))
    for share in (0.02, 0.3, 0.6, 0.9):
        room = int(size + 40_000 + share * max(size, sum(map(len, whole.values()))))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", str(parent)], check=True)
        try:
            here = Place(parent / "work", place.writer)
            here.make()
            process = here.start()
            err = process.communicate()[1].decode()
            found = list(here.faults(whole, is_caught=True))
            if process.returncode not in (0, 5):
                found.append(f"exit {process.returncode}: {err.splitlines()[:1]}")
            faults += [f"{share:.0%} of room: {fault}" for fault in found]
        finally:
            subprocess.run(["umount", str(parent)], check=True)
    return faults


def shrinking(place: Place, whole: dict[str, bytes], seconds: float, moments: int) -> list[str]:
    """Cut the input short while it is read."""
    faults = []
    for moment in range(moments):
        place.make()
        process = place.start()
        time.sleep(seconds * (moment + 0.5) / moments)
        file = place.root / place.input
        os.truncate(file, file.stat().st_size // 3)
        place.before[place.input] = file.read_bytes()
        err = process.communicate()[1].decode()
        found = list(place.faults(whole, is_caught=True))
        if process.returncode not in (0, 3, 5) or "Traceback" in err:
            found.append(f"exit {process.returncode}: {err.splitlines()[:1]}")
        faults += [f"moment {moment}: {fault}" for fault in found]
    return faults


def rivals(place: Place, whole: dict[str, bytes], moments: int) -> list[str]:
    """Two runs onto one output, the second a little later each time; also where both say --if-changed."""
    faults = []
    mores: tuple[tuple[str, ...], ...] = ((), ("--force",))
    if place.words[0] in {"prune", "strip"} and "--in-place" not in place.words:
        mores = (*mores, ("--if-changed",))
    for more in mores:
        for moment in range(moments):
            place.make()
            first = place.start(*more)
            time.sleep(0.05 * moment)
            second = place.start(*more)
            ends = [process.communicate()[1].decode() for process in (first, second)]
            stamps = {f".{out}.prunectl": b"" for out in place.outputs}
            found = [fault for fault in place.faults({**whole, **stamps}, is_caught=True) if "leaves" not in fault]
            codes = {first.returncode, second.returncode}
            if not codes <= {0, 2, 5} or 0 not in codes or any("Traceback" in err for err in ends):
                found.append(f"exits {codes}: {[err.splitlines()[:1] for err in ends]}")
            if not place.made():
                found.append("no output")
            faults += [f"{' '.join(more)} {moment}: {fault}" for fault in found]
    return faults


CRIPPLED = """import errno, fcntl, os

def _refuse(*_, **__):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

os.link = fcntl.flock = fcntl.lockf = _refuse
"""
"""A filesystem without hard links and locks, for any process of Python that begins with it."""


def surroundings(place: Place, whole: dict[str, bytes]) -> list[str]:
    """Run where there are no hard links and no locks, under a strict umask, and in a folder whose name is no text."""
    faults, crippled = [], place.root.parent / "crippled"
    crippled.mkdir(exist_ok=True)
    (crippled / "sitecustomize.py").write_text(CRIPPLED)
    odd = Path(os.fsdecode(os.fsencode(place.root.parent) + b"/w\xff\x1b\n"))
    for name, here, options in (
        ("no links or locks", place, {"before": str(crippled)}),
        ("umask 077", place, {"umask": 0o077}),
        ("odd folder", Place(odd, place.writer), {}),
    ):
        here.make()
        process = here.start(**options)
        err = process.communicate()[1].decode(errors="replace")
        found = list(here.faults(whole, is_caught=True))
        if process.returncode or not here.made():
            found.append(f"exit {process.returncode}: {err.splitlines()[:1]}")
        modes = [(here.root / made).stat().st_mode for made in here.made()]
        if "umask" in options and here.input not in here.outputs and any(mode & 0o077 for mode in modes):
            found.append("others may read the output")
        faults += [f"{name}: {fault}" for fault in found]
    return faults


def disturbed(place: Place, whole: dict[str, bytes], seconds: float, moments: int) -> Iterator[tuple[str, list[str]]]:
    """Disturb a command in every way, and say what was wrong each time."""
    yield "SIGINT", signalled(place, signal.SIGINT, whole, seconds, moments)
    yield "SIGTERM", signalled(place, signal.SIGTERM, whole, seconds, moments // 3)
    yield "SIGKILL", signalled(place, signal.SIGKILL, whole, seconds, moments)
    is_rival = place.writer.is_same_again and "--html" not in place.words
    yield "rivals", rivals(place, whole, 5) if is_rival else []
    yield "shrinking", shrinking(place, whole, seconds, moments // 3) if place.writer.source == "LARGE" else []
    yield "full disk", full_disk(place, whole) if os.geteuid() == 0 else []
    yield "surroundings", surroundings(place, whole)


def run(moments: int = 30, only: list[str] | None = None) -> list[str]:
    """Disturb every writing command in every way, show a table, and return what was wrong."""
    rows, faults = [], []
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        for name, writer in WRITERS.items():
            if only and name not in only:
                continue
            place = Place(Path(scratch, "work"), writer)
            place.make()
            began = time.monotonic()
            process = place.start()
            err = process.communicate()[1].decode()
            seconds = time.monotonic() - began
            if process.returncode:
                raise RuntimeError(f"{name} ended with {process.returncode}: {err}")
            whole = place.made()
            row = [name, f"{seconds:.1f} s"]
            for kind, found in disturbed(place, whole, seconds, moments):
                for fault in found:
                    faults.append(f"{name}, {kind}, {fault}")
                    print(faults[-1], file=sys.stderr, flush=True)
                row.append(str(len(found)))
            rows.append(tuple(row))
    for path in _LARGE:
        shutil.rmtree(path.parent)
    show(
        "Faults",
        ("command", "alone", "SIGINT", "SIGTERM", "SIGKILL", "rivals", "shrinking", "full disk", "surroundings"),
        rows,
    )
    return faults


def main() -> None:
    """Run some of it from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--only", default="")
    said = parser.parse_args()
    sys.exit(bool(run(said.moments, list(filter(None, said.only.split(","))))))


if __name__ == "__main__":
    main()
