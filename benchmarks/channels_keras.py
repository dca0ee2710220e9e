"""Half of the channels out of every architecture that Keras comes with, in Keras 3 and in Keras 2.

Weights are random, images as small as the architecture takes. `python -m benchmarks.channels_keras [NAME...]` takes
those whose names begin so, such as `ResNet` or `tf_keras:VGG`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.timing import PYTHON, show

LIBRARIES = ("keras", "tf_keras")
SIDES = (32, 48, 64, 75, 96, 128, 224)
CLASSES = 10
SECONDS = 1800
CUSTOM: dict[str, Any] = {}
"""Classes that the architecture of this process brings with it."""
_TITLES = ("architecture", "input", "may go", "params", "left", "FLOPs", "left", "verified", "seconds", "not cut")


def run(chosen: tuple[str, ...] = ()) -> None:
    """Cut each architecture in a process of its own, and show what is left."""
    rows = []
    for name in _names():
        if not chosen or any(name.startswith((want, f"tf_keras:{want}", f"keras:{want}")) for want in chosen):
            found = _in_child(name)
            rows.append(_row(name, found))
            print(*rows[-1], sep="\t", file=sys.stderr, flush=True)
    verified = sum(row[7] == "yes" for row in rows)
    show(f"Half of the channels of keras.applications: {verified} of {len(rows)} cut and verified", _TITLES, rows)


def _names() -> list[str]:
    code = "from benchmarks.channels_keras import names; import json; print(json.dumps(names()))"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True, env=_quiet())
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def names() -> list[str]:
    """Return every architecture, such as `keras:VGG16`."""
    return [
        f"{library}:{name}"
        for library in LIBRARIES
        for name, found in inspect.getmembers(importlib.import_module(library).applications, inspect.isfunction)
        if name[:1].isupper()
    ]


def _in_child(name: str) -> dict[str, Any]:
    code = f"from benchmarks.channels_keras import cut; cut({name!r})"
    try:
        done = subprocess.run(
            [PYTHON, "-c", code], capture_output=True, text=True, check=False, env=_quiet(), timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"more than {SECONDS} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.splitlines() or ["no output"])[-1]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _quiet() -> dict[str, str]:
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}


def cut(name: str) -> None:
    """Build an architecture, cut half of its channels and print what came of it as JSON."""
    from prunectl.channels.groups import channel_groups as groups
    from prunectl.channels.prune import prune_channels
    from prunectl.errors import PrunectlError
    from prunectl.formats.registry import open_model
    from prunectl.pruning.destination import Destination
    from prunectl.pruning.request import PruneRequest as Request

    library, _, kind = name.partition(":")
    keras = importlib.import_module(library)
    model, side = _built(getattr(keras.applications, kind))
    own = {type(layer).__name__: type(layer) for layer in model.layers if ".applications." in type(layer).__module__}
    CUSTOM.update(own)
    found: dict[str, Any] = {"side": side}
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "net.keras", Path(folder) / "small.keras"
        if library == "tf_keras" and not own:
            # An .h5 does not say whose class a layer is: those of the architectures themselves would stay unknown.
            path, output = path.with_suffix(".h5"), output.with_suffix(".h5")
        model.save(path)
        seen = groups(open_model(path))
        found |= {"channels": seen.channels, "free": seen.prunable, "reasons": _reasons(seen)}
        begin = time.perf_counter()
        try:
            custom = "benchmarks.channels_keras:CUSTOM" if own else ""
            request = Request(sparsity=0.5, pattern="channel", custom_objects=custom)
            done = prune_channels(path, request, Destination(output), is_trusted=True)
        except PrunectlError as error:
            found["error"] = error.message.replace(str(path), "it")
        else:
            found |= {"params": [done.before.params.total, done.after.params.total], "error": ""}
            found |= {"macs": [done.before.macs, done.after.macs], "apart": done.proof.error}
        found["seconds"] = time.perf_counter() - begin
    print(json.dumps(found))


def _reasons(seen: Any) -> str:
    counted = Counter[str]()
    for family in seen.groups:
        if family.locked_because:
            counted[family.locked_because.partition(" ")[0]] += len(family)
    return ", ".join(f"{reason} {count}" for reason, count in counted.most_common(4))


def _built(make: Any) -> tuple[Any, int]:
    """Return a model for the smallest images that it can be built for."""
    for side in SIDES:
        try:
            return make(weights=None, input_shape=(side, side, 3), classes=CLASSES), side
        except ValueError:
            continue
    raise ValueError("no size will do")


def _row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    params, macs = found.get("params", ["", ""]), found.get("macs", ["", ""])
    share = f"{found['free'] / found['channels']:.0%}" if found.get("channels") else ""
    verified = "" if "error" not in found else f"no: {found['error']}" if found["error"] else "yes"
    return (
        name,
        str(found.get("side", "")),
        share,
        *(_millions(params[0]), _share(*params)),
        *(_millions(macs[0], 2), _share(*macs)),
        verified,
        f"{found['seconds']:.0f}" if "seconds" in found else "",
        str(found.get("reasons", "")),
    )


def _millions(count: Any, times: int = 1) -> str:
    return f"{count * times / 1e6:.1f} M" if count else ""


def _share(before: Any, after: Any) -> str:
    return f"{after / before:.0%}" if before and after else ""


if __name__ == "__main__":
    run(tuple(sys.argv[1:]))
