"""How processor time and memory grow with bytes, tensors and shards; and one folder pruned in every way there is.

`workers` prunes 32 shards of 64 MB on Ray, with one to eight workers; nothing else should run meanwhile.
`parts` prunes 64 shards of 64 MB (`PRUNECTL_BENCH_SHARD_MB`) in one process, in parts, in parts that are killed, on
Ray, in memory and from a web server. It takes ten gigabytes of disk and as much memory, and is run by its name.
"""

from __future__ import annotations

import json
import os
import random as chance
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.timing import PRUNECTL, PYTHON, Cost, cost, output_of, show

GIGABYTES = (0.1, 0.5, 2.0, 8.0)
TENSORS = (10, 1_000, 10_000, 100_000)
SHARDS = (1, 10, 100, 1_000)
_BIG, _SMALL = 1 << 22, 256
"""Weights of a tensor where bytes grow, and where tensors or shards do."""
_SHARDED = 10_000
"""Tensors in any number of shards."""
_INDEX = "model.safetensors.index.json"
_NAME = "model.safetensors"


def run() -> None:
    """Print a table of each: processor time, and memory at its peak."""
    folder = os.environ.get("PRUNECTL_BENCH_FOLDER") or None
    for title, head, sizes in (
        ("With bytes, in tensors of 17 MB", "GB", GIGABYTES),
        ("With tensors of 1 kB, in one file", "tensors", TENSORS),
        (f"With shards, of {_SHARDED:,} tensors of 1 kB", "shards", SHARDS),
    ):
        columns = (head, "inspect, s", "MB", "prune, s", "MB")
        show(title, columns, list(_rows(head, sizes, folder)))


def _rows(what: str, sizes: tuple[float, ...], place: str | None) -> Iterator[tuple[str, ...]]:
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="prunectl-bench-", dir=place) as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            if what == "GB":
                _write(folder, round(size * 1e9 / (4 * _BIG)), _BIG, 1)
            elif what == "tensors":
                _write(folder, int(size), _SMALL, 1)
            else:
                _write(folder, _SHARDED, _SMALL, int(size))
            out = Path(scratch) / "out"
            inspected = cost([PRUNECTL, "inspect", str(folder)], runs=1)
            pruned = cost([PRUNECTL, "prune", str(folder), "-o", str(out), "-q", *_HOW], runs=1)
        yield (f"{size:,}", *_shown(inspected), *_shown(pruned))


_HOW = ("-s", "0.8", "--scope", "global")


def _shown(found: Cost) -> tuple[str, ...]:
    return f"{found.processor:.1f}", f"{found.peak_bytes / 1e6:.0f}"


def _write(folder: Path, tensors: int, weights: int, shards: int) -> None:
    """Write kernels of random numbers, each other ones, as shards with an index or as one file."""
    random = np.random.default_rng(0).standard_normal(2 * weights + tensors).astype(np.float32)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors" if shards > 1 else _NAME
        own = range(number * tensors // shards, (number + 1) * tensors // shards)
        shape, nbytes = [16, weights // 16], 4 * weights
        header = {
            f"layers.{index}.weight": {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [place * nbytes, (place + 1) * nbytes],
            }
            for place, index in enumerate(own)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for index in own:
                file.write(random[index : index + weights].data)
        weight_map.update(dict.fromkeys(header, name))
    if shards > 1:
        (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


_MANY, _KILLS, _MOST_WAITED = 64, 10, 60.0
_SHARD_BYTES = int(os.environ.get("PRUNECTL_BENCH_SHARD_MB", "64")) << 20
_LAYERWISE = ("-s", "0.6", "--scope", "layer")
_IN_MEMORY = """
import hashlib, sys, fsspec
from prunectl import cli
memory, root = fsspec.filesystem("memory"), sys.argv[1]
memory.put(root, "/bucket/model", recursive=True)
sys.argv = ["prunectl", "prune", "memory://bucket/model", "-o", "memory://bucket/out", "-q", *sys.argv[2:]]
if code := cli.main():
    sys.exit(code)
for path in sorted(memory.find("/bucket/out")):
    print(path.rpartition("/")[2], hashlib.sha256(memory.cat_file(path)).hexdigest())
"""
_SERVER = """
import http.server, os, re, sys
root = sys.argv[1]

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = os.path.join(root, os.path.basename(self.path))
        match = re.fullmatch(r"bytes=(\\d+)-(\\d+)", self.headers["Range"] or "")
        if match is None or not os.path.isfile(path):
            return self.send_error(404)
        size = os.path.getsize(path)
        begin, end = int(match[1]), min(int(match[2]) + 1, size)
        self.send_response(206)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.send_header("ETag", '"1"')
        self.end_headers()
        with open(path, "rb") as file:
            file.seek(begin)
            self.wfile.write(file.read(end - begin))

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def parts() -> None:
    """Print what each way costs, whether it gives the bytes of one process, and how many shards were done twice."""
    with _shards(_MANY) as (model, out):
        ways: dict[str, Callable[[], tuple[float, dict[str, str], str]]] = {
            "one process": lambda: (_prune(model, out), _digests(out), ""),
            "4 parts and the join": lambda: (_in_parts(model, out, 4), _digests(out), ""),
            f"2 parts, killed {_KILLS} times": lambda: _killed(model, out),
            "memory://": lambda: _in_memory(model),
            "a web server with ranges": lambda: _served(model, out),
            "Ray, a worker for each core": lambda: (
                _prune(model, out, "--on", "ray"),
                _digests(out),
                "the driver alone",
            ),
        }
        expected: dict[str, str] = {}
        rows: list[tuple[str, ...]] = []
        for way, run_it in ways.items():
            try:
                seconds, digests, note = run_it()
            except RuntimeError:
                # Ray does not start everywhere, and what was measured before shall not have been for nothing.
                rows.append((way, "-", "-", "failed"))
            else:
                expected = expected or digests
                rows.append((way, f"{seconds:.1f}", "yes" if digests == expected else "no", note))
            print(rows[-1], flush=True)
            shutil.rmtree(out, ignore_errors=True)
    title = f"{_MANY} shards of {_SHARD_BYTES >> 20} MiB, {' '.join(_LAYERWISE)}"
    show(title, ("way", "processor, s", "the same bytes", ""), rows)


WORKERS = (1, 2, 4, 8)
_WORKED = 32
"""Shards that they share."""


def workers() -> None:
    """Print how long a folder takes on so many workers of Ray, from the command's start to its end."""
    with _shards(_WORKED) as (model, out):
        ways = {"one process": ("1", _command(model, out))}
        ways |= {str(count): (str(count), _command(model, out, "--on", "ray")) for count in WORKERS}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        digests = []
        for _ in range(3):
            for way, (threads, words) in ways.items():
                # Ray starts with as many processors as there may be threads, and a worker for each.
                os.environ["OMP_NUM_THREADS"] = threads
                seconds[way].append(cost(words, runs=1).seconds)
                digests.append(_digests(out))
                shutil.rmtree(out)
        if digests.count(digests[0]) < len(digests):
            raise RuntimeError("other bytes")
        rows = [(way, f"{statistics.median(each):.1f}", f"{min(each):.1f}") for way, each in seconds.items()]
    show(f"{_WORKED} shards of {_SHARD_BYTES >> 20} MiB on Ray", ("workers", "median of three, s", "least"), rows)


@contextmanager
def _shards(count: int) -> Iterator[tuple[Path, Path]]:
    """A folder of so many shards, and one beside it for what comes of them."""
    with tempfile.TemporaryDirectory(prefix="prunectl-bench-", dir=os.environ.get("PRUNECTL_BENCH_FOLDER")) as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "out"
        model.mkdir()
        _write(model, 4 * count, _SHARD_BYTES // 16, count)
        yield model, out


def _command(model: str | Path, out: Path, *more: str) -> list[str]:
    return [PRUNECTL, "prune", str(model), "-o", str(out), "-q", *_LAYERWISE, *more]


def _prune(model: str | Path, out: Path, *more: str) -> float:
    return cost(_command(model, out, *more), runs=1).processor


def _in_parts(model: Path, out: Path, count: int) -> float:
    seconds = sum(_prune(model, out, "--part", f"{number}/{count}") for number in range(1, count + 1))
    return seconds + cost([PRUNECTL, "prune", str(model), "-o", str(out), "-q", "--join"], runs=1).processor


def _killed(model: Path, out: Path) -> tuple[float, dict[str, str], str]:
    """Two parts, in turns, each killed after some seconds; a shard that the ledger has must stay the file it is."""
    moments, seen, twice = chance.Random(0), dict[str, tuple[int, int]](), set[str]()
    done_at_kills = []
    for number in range(_KILLS + 1):
        if number < _KILLS:
            words = _command(model, out, "--part", f"{number % 2 + 1}/2")
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            # The start is not counted, which takes as long as other work on the machine lets it.
            until, before = time.monotonic() + _MOST_WAITED, _written(out)
            try:
                while time.monotonic() < until and process.poll() is None and _written(out) <= before:
                    time.sleep(0.05)
                time.sleep(moments.uniform(0, 4))
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
        else:
            for part in (1, 2):
                _prune(model, out, "--part", f"{part}/2")
        now = _noted(out)
        twice |= {name for name in seen if seen[name] != now.get(name)}
        seen |= now
        done_at_kills.append(len(now))
    cost([PRUNECTL, "prune", str(model), "-o", str(out), "-q", "--join"], runs=1)
    note = f"{len(twice)} shards done twice; done after each kill: {' '.join(map(str, done_at_kills[:-1]))}"
    return float("nan"), _digests(out), note


def _written(out: Path) -> set[Path]:
    """The shards that are there, and those that are being written."""
    # Folders that vanish meanwhile are passed over, which rglob fails at.
    return {Path(folder, name) for folder, _, names in os.walk(out) for name in names if name.endswith(".safetensors")}


def _noted(out: Path) -> dict[str, tuple[int, int]]:
    """The shards that the ledger has, as files: one that is written again has another number.

    A note without its shard is of one that was about to take its place.
    """
    notes = (match[1] for path in out.rglob("done-*") if (match := re.fullmatch(r"done-(.*)\.json", path.name)))
    files = (out / name for name in notes)
    return {file.name: (facts.st_ino, facts.st_mtime_ns) for file in files if file.exists() for facts in (file.stat(),)}


def _in_memory(model: Path) -> tuple[float, dict[str, str], str]:
    spent = cost([PYTHON, "-c", _IN_MEMORY, str(model), *_LAYERWISE], runs=1)
    digests = dict(line.split() for line in spent.out.splitlines() if line.count(" ") == 1)
    return spent.processor, digests, "with the upload to memory, and the hashes"


@contextmanager
def _server(root: Path) -> Iterator[str]:
    with subprocess.Popen([PYTHON, "-c", _SERVER, str(root)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{(process.stdout.readline() if process.stdout else '').strip()}"
        finally:
            process.terminate()


def _served(model: Path, out: Path) -> tuple[float, dict[str, str], str]:
    with _server(model) as url:
        return _prune(f"{url}/{_INDEX}", out), _digests(out), "without the server"


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: output_of("sha256sum", path).split()[0] for path in sorted(folder.iterdir()) if path.is_file()}
