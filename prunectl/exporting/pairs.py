"""From what to what: every pair at once, each converter imported only when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from prunectl.errors import UsageError
from prunectl.exporting.targets import TARGETS, Target
from prunectl.formats.base import Can, ModelFile
from prunectl.formats.optional import require
from prunectl.formats.table import by_name
from prunectl.training.keras.library import hushed

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
class Pair:
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
    Pair(
        KERAS,
        "onnx",
        "by_tf2onnx:write",
        "by_keras:open_live",
        "by_onnxruntime:runner",
        (*_TENSORFLOW, *_ORT, _TF2ONNX),
    ),
    Pair(KERAS, "tflite", "by_tflite:write", "by_keras:open_live", "by_tflite:runner", _TENSORFLOW),
    Pair(KERAS, "saved-model", "by_tensorflow:write", "by_keras:open_live", "by_tensorflow:runner", _TENSORFLOW),
    Pair(KERAS, "keras", "by_keras:write", "by_keras:open_live", "by_keras:runner", _TENSORFLOW),
    Pair(KERAS, "h5", "by_keras:write", "by_keras:open_live", "by_keras:runner", _TENSORFLOW),
    Pair(
        SAVED_MODEL,
        "onnx",
        "by_tf2onnx:write",
        "by_tensorflow:open_live",
        "by_onnxruntime:runner",
        (*_TENSORFLOW, *_ORT, _TF2ONNX),
    ),
    Pair(SAVED_MODEL, "tflite", "by_tflite:write", "by_tensorflow:open_live", "by_tflite:runner", _TENSORFLOW),
    Pair(
        SAVED_MODEL,
        "saved-model",
        "by_tensorflow:write",
        "by_tensorflow:open_live",
        "by_tensorflow:runner",
        _TENSORFLOW,
    ),
    Pair(SAVED_MODEL, "keras", "by_keras:write", "by_keras:open_live", "by_keras:runner", _TENSORFLOW),
    Pair(SAVED_MODEL, "h5", "by_keras:write", "by_keras:open_live", "by_keras:runner", _TENSORFLOW),
    Pair(
        TORCH,
        "onnx",
        "by_torch_onnx:write",
        "by_torch:open_live",
        "by_onnxruntime:runner",
        (*_TORCH, *_ORT, _ONNXSCRIPT),
    ),
    Pair(
        TORCH,
        "torch-export",
        "by_torch_files:write_program",
        "by_torch:open_live",
        "by_torch_files:run_program",
        _TORCH,
    ),
    Pair(
        TORCH, "torchscript", "by_torch_files:write_script", "by_torch:open_live", "by_torch_files:run_script", _TORCH
    ),
    Pair(
        PROGRAM,
        "onnx",
        "by_torch_onnx:write",
        "by_torch:open_live",
        "by_onnxruntime:runner",
        (*_TORCH, *_ORT, _ONNXSCRIPT),
    ),
    Pair(ONNX, "onnx", "by_onnx:write", "by_onnxruntime:open_live", "by_onnxruntime:runner", _ORT),
    Pair((*TORCH, *PROGRAM), "torch", "by_torch_weights:write", needs=_TORCH),
    *(
        Pair(
            (*TORCH, *PROGRAM),
            target,
            "by_torch_code:write",
            "by_torch:open_live",
            "by_torch_code_run:runner",
            _TORCH,
            "by_torch_code:beside",
        )
        for target in ("torch", "safetensors")
    ),
    Pair(NUMBERS, "safetensors", "by_bytes:write_safetensors"),
    Pair(NUMBERS, "npz", "by_bytes:write_npz"),
)


def pair_of(model: ModelFile, target: Target, *, has_code: bool = False) -> Pair:
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
    if Can.STRIP in by_name(model.format).can:
        return f"prunectl strip {model.path} -o OUT writes it again without what training has left"
    return ""


def _find(source: str, target: str, *, has_code: bool = False) -> Pair | None:
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


def load(pair: Pair, reference: str) -> Callable[..., Any]:
    """Import a part of a converter, or say what is not installed."""
    # TensorFlow speaks while it is loaded; what is not there is said all the same.
    with hushed() if _TENSORFLOW[0] in pair.needs else nullcontext():
        for module, extra in pair.needs:
            require(module, extra=extra)
    module, _, name = reference.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"prunectl.exporting.{module}"), name)
    return found
