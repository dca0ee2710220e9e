"""From what to what: every pair at once, each converter imported only when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prunectl.errors import UsageError
from prunectl.formats.base import Capability, ModelFile
from prunectl.formats.registry import by_name
from prunectl.formats.safe_json import require
from prunectl.training.keras.backend import hushed

_RUN = frozenset({"input", "data", "samples", "batch-size", "seed", "atol", "rtol", "model", "custom-objects", "trust"})
"""Options of what is run beside its source."""


@dataclass(frozen=True, slots=True)
class Target:
    """A format to write."""

    name: str
    title: str
    suffix: str
    options: frozenset[str]
    is_weights: bool = False
    """Whether it holds numbers alone, which are compared bit by bit."""


TARGETS = (
    Target("onnx", "ONNX", ".onnx", _RUN | {"opset", "half", "bf16", "int8", "sparse", "pack", "metadata"}),
    Target("tflite", "TensorFlow Lite", ".tflite", _RUN | {"half", "int8", "sparse"}),
    Target("saved-model", "TensorFlow SavedModel", "", _RUN),
    Target("keras", "Keras archive", ".keras", _RUN | {"pack"}),
    Target("h5", "Keras HDF5", ".h5", _RUN | {"pack"}),
    Target("torch", "PyTorch state dict", ".pt", frozenset({"half", "bf16", "pack", "code"}), is_weights=True),
    Target("torchscript", "TorchScript", ".torchscript", _RUN | {"int8", "pack"}),
    Target("torch-export", "PyTorch exported program", ".pt2", _RUN | {"pack"}),
    Target(
        "safetensors", "safetensors", ".safetensors", frozenset({"half", "bf16", "metadata", "code"}), is_weights=True
    ),
    Target("npz", "NumPy archive", ".npz", frozenset({"half", "pack"}), is_weights=True),
)
_ALSO = {".pth": "torch", ".hdf5": "h5", ".keras": "keras"}


def target_of(to: str, output: Path) -> Target:
    """Return the format that was asked for by its name, or by the suffix of the output."""
    known = {target.name: target for target in TARGETS}
    if to:
        if to not in known:
            raise UsageError(
                f"--to {to} is no format that prunectl writes",
                did_you_mean=tuple(get_close_matches(to, known, n=2)),
                hint=f"known: {', '.join(known)}",
            )
        return known[to]
    suffix = output.suffix.lower()
    for target in TARGETS:
        if target.suffix == suffix:
            return target
    if suffix in _ALSO:
        return known[_ALSO[suffix]]
    raise UsageError(
        f"{output} has no suffix that names a format",
        hint=f"say it: --to {', '.join(known)}",
    )


def check_options(target: Target, typed: tuple[str, ...]) -> None:
    """Refuse an option that the target does not have."""
    # Code is run beside its source, and so it has the options of all that runs.
    allowed = target.options | (_RUN if "code" in typed else frozenset())
    for name in typed:
        if name not in allowed:
            others = [other.name for other in TARGETS if name in other.options]
            why = "has no such thing"
            if target.is_weights and name in _RUN:
                why = "holds weights alone, and nothing is run" + (" without --code" * ("code" in target.options))
            raise UsageError(
                f"--{name} does not go with {target.title}, which {why}", hint=f"it goes with {', '.join(others)}"
            )


def suffix_of(to: str) -> str:
    """Return the suffix of a format, empty if there is no such format."""
    return next((target.suffix for target in TARGETS if target.name == to), "")


KERAS = ("keras", "keras-h5")
SAVED_MODEL = ("saved-model",)
TORCH = ("torch", "torch-legacy", "torch-tar", "shards", "safetensors")
PROGRAM = ("torch-export",)
ONNX = ("onnx",)
_OLD = frozenset({"torch-legacy", "torch-tar", "shards"})
"""What goes the ways of PyTorch, and is not named beside it."""
NUMBERS = (*KERAS, *SAVED_MODEL, *TORCH, *PROGRAM, *ONNX, "tflite", "tf-checkpoint")

_TENSORFLOW = (("tensorflow", "tensorflow"), ("tf_keras", "tensorflow"))
_TORCH = (("torch", "torch"),)
_ORT = (("onnx", "onnx"), ("onnxruntime", "onnx"))
_TF2ONNX = ("tf2onnx", "export")
_ONNXSCRIPT = ("onnxscript", "export")


@dataclass(frozen=True, slots=True)
class Route:
    """A way from a format to another."""

    sources: tuple[str, ...]
    target: str
    writer: str
    """`module:function` in this package that writes the result."""
    opener: str = ""
    """`module:function` that opens the source in its runtime; none where bytes are enough."""
    runner: str = ""
    """`module:function` that runs the result in its own."""
    needs: tuple[tuple[str, str], ...] = ()
    """Packages, each with the extra that brings it."""
    beside: str = ""
    """`module:function` that says which files with code are written beside the result, where there are some."""


PAIRS = (
    Route(
        KERAS,
        "onnx",
        "tf2onnx:write",
        "keras:open_live",
        "onnx:runner",
        (*_TENSORFLOW, *_ORT, _TF2ONNX),
    ),
    Route(KERAS, "tflite", "tflite:write", "keras:open_live", "tflite:runner", _TENSORFLOW),
    Route(KERAS, "saved-model", "tensorflow:write", "keras:open_live", "tensorflow:runner", _TENSORFLOW),
    Route(KERAS, "keras", "keras:write", "keras:open_live", "keras:runner", _TENSORFLOW),
    Route(KERAS, "h5", "keras:write", "keras:open_live", "keras:runner", _TENSORFLOW),
    Route(
        SAVED_MODEL,
        "onnx",
        "tf2onnx:write",
        "tensorflow:open_live",
        "onnx:runner",
        (*_TENSORFLOW, *_ORT, _TF2ONNX),
    ),
    Route(SAVED_MODEL, "tflite", "tflite:write", "tensorflow:open_live", "tflite:runner", _TENSORFLOW),
    Route(
        SAVED_MODEL,
        "saved-model",
        "tensorflow:write",
        "tensorflow:open_live",
        "tensorflow:runner",
        _TENSORFLOW,
    ),
    Route(SAVED_MODEL, "keras", "keras:write", "keras:open_live", "keras:runner", _TENSORFLOW),
    Route(SAVED_MODEL, "h5", "keras:write", "keras:open_live", "keras:runner", _TENSORFLOW),
    Route(
        TORCH,
        "onnx",
        "torch_onnx:write",
        "torch:open_live",
        "onnx:runner",
        (*_TORCH, *_ORT, _ONNXSCRIPT),
    ),
    Route(
        TORCH,
        "torch-export",
        "torch_files:write_program",
        "torch:open_live",
        "torch_files:run_program",
        _TORCH,
    ),
    Route(TORCH, "torchscript", "torch_files:write_script", "torch:open_live", "torch_files:run_script", _TORCH),
    Route(
        PROGRAM,
        "onnx",
        "torch_onnx:write",
        "torch:open_live",
        "onnx:runner",
        (*_TORCH, *_ORT, _ONNXSCRIPT),
    ),
    Route(ONNX, "onnx", "onnx:write", "onnx:open_live", "onnx:runner", _ORT),
    Route((*TORCH, *PROGRAM), "torch", "torch_files:write", needs=_TORCH),
    *(
        Route(
            (*TORCH, *PROGRAM),
            target,
            "torch_code:write",
            "torch:open_live",
            "torch_code:runner",
            _TORCH,
            "torch_code:beside",
        )
        for target in ("torch", "safetensors")
    ),
    Route(NUMBERS, "safetensors", "weights:write_safetensors"),
    Route(NUMBERS, "npz", "weights:write_npz"),
)


def find_route(model: ModelFile, target: Target, *, has_code: bool = False) -> Route:
    """Return the way from a model to a target, or say which way leads nearest to it."""
    title = by_name(model.format).title
    if target.name in _already(model) and not has_code:
        raise UsageError(f"{model.path} is {target.title} already", hint=_again(model))
    found = _find(model.format, target.name, has_code=has_code)
    if found is None and has_code:
        raise UsageError(
            f"--code writes a class of PyTorch, and {model.path} is {title}",
            hint="leave out --code for its weights alone",
        )
    if found is None:
        ways = [
            other.name for other in TARGETS if other.name not in _already(model) and _find(model.format, other.name)
        ]
        raise UsageError(
            f"there is no way from {title} to {target.title}",
            hint=f"{_around(target)}; from {title} there are ways to {', '.join(ways)}",
        )
    return found


def _again(model: ModelFile) -> str:
    if Capability.STRIP in by_name(model.format).can:
        return f"prunectl strip {model.path} -o OUT writes it again without what training has left"
    return ""


def _find(source: str, target: str, *, has_code: bool = False) -> Route | None:
    ways = (pair for pair in PAIRS if bool(pair.beside) == has_code)
    return next((pair for pair in ways if source in pair.sources and pair.target == target), None)


def _already(model: ModelFile) -> frozenset[str]:
    """Return the targets that a model is."""
    if model.format == "keras-h5":
        # A file of weights alone becomes a model by --model.
        return frozenset() if model.about.keras is None else frozenset({"h5"})
    if model.format == "torch":
        # A whole module and TorchScript become a state dict; so do files of old.
        return frozenset() if model.about.code else frozenset({"torch"})
    # ONNX becomes ONNX of another version, and a SavedModel one that does nothing but serve.
    return frozenset({model.format} - {"onnx", "saved-model"})


def _around(target: Target) -> str:
    names = [name for name in _sources(target.name) if name not in _OLD]
    return f"{target.title} is made of {', '.join(dict.fromkeys(by_name(name).title for name in names))}"


def _sources(target: str) -> Iterable[str]:
    return (source for pair in PAIRS if pair.target == target for source in pair.sources)


def load(pair: Route, reference: str) -> Callable[..., Any]:
    """Import a part of a converter, or say what is not installed."""
    # TensorFlow speaks while it is loaded; what is not there is said all the same.
    with hushed() if _TENSORFLOW[0] in pair.needs else nullcontext():
        for module, extra in pair.needs:
            require(module, extra=extra)
    module, _, name = reference.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"prunectl.exporting.{module}"), name)
    return found
