"""The table of export routes from source formats to targets, each converter imported only when used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Capability, ModelFile
from prunectl.formats.registry import FORMATS, by_name
from prunectl.formats.safe_json import require
from prunectl.training.keras.backend import quiet_import

_RUN_OPTIONS = frozenset(
    {"input", "data", "samples", "batch-size", "seed", "atol", "rtol", "builder", "custom-objects", "trust"}
)
"""Options of targets that are run and compared with the source."""
_WEIGHT_OPTIONS = frozenset({"half", "bf16", "code", "shard-size"})
"""Options of targets that hold the weights of PyTorch networks; shards are for folders."""


@dataclass(frozen=True, slots=True)
class Target:
    """A format to write."""

    name: str
    title: str
    suffix: str
    options: frozenset[str]
    is_weights: bool = False
    """Whether it holds weights alone, which are compared bit by bit."""


TARGETS = (
    Target("onnx", "ONNX", ".onnx", _RUN_OPTIONS | {"opset", "half", "bf16", "int8", "sparse", "pack", "metadata"}),
    Target("tflite", "TensorFlow Lite", ".tflite", _RUN_OPTIONS | {"half", "int8", "sparse"}),
    Target("saved-model", "TensorFlow SavedModel", "", _RUN_OPTIONS),
    Target("keras", "Keras archive", ".keras", _RUN_OPTIONS | {"pack"}),
    Target("h5", "Keras HDF5", ".h5", _RUN_OPTIONS | {"pack"}),
    Target("torch", "PyTorch state dict", ".pt", _WEIGHT_OPTIONS | {"pack", "sparse"}, is_weights=True),
    Target("torchscript", "TorchScript", ".torchscript", _RUN_OPTIONS | {"int8", "pack"}),
    Target("torch-export", "PyTorch exported program", ".pt2", _RUN_OPTIONS | {"pack"}),
    Target(
        "safetensors",
        "safetensors",
        ".safetensors",
        _WEIGHT_OPTIONS | {"metadata"},
        is_weights=True,
    ),
    Target("npz", "NumPy archive", ".npz", frozenset({"half", "pack"}), is_weights=True),
)
_OTHER_SUFFIXES = {".pth": "torch", ".hdf5": "h5", ".keras": "keras"}


def target_of(to: str, output: Path) -> Target:
    """The target of `--to`, or else of the suffix of the output."""
    known = {target.name: target for target in TARGETS}
    if to:
        if to not in known:
            raise UsageError(
                f"prunectl cannot write the format --to {to}",
                did_you_mean=tuple(get_close_matches(to, known, n=2)),
                hint=f"formats: {', '.join(known)}",
            )
        return known[to]
    suffix = output.suffix.lower()
    for target in TARGETS:
        if target.suffix == suffix:
            return target
    if suffix in _OTHER_SUFFIXES:
        return known[_OTHER_SUFFIXES[suffix]]
    raise UsageError(
        f"the suffix of {output} is not that of a format",
        hint=f"add --to FORMAT: {', '.join(known)}",
    )


def check_options(target: Target, given_options: tuple[str, ...]) -> None:
    """Refuse an option that the target does not have."""
    # Generated code is run and compared with its source, so it takes the options for running.
    allowed = target.options | (_RUN_OPTIONS if "code" in given_options else frozenset())
    for name in given_options:
        if name not in allowed:
            targets = [other.name for other in TARGETS if name in other.options]
            reason = "does not support it"
            if target.is_weights and name in _RUN_OPTIONS:
                reason = "holds only weights, so nothing is run" + (" without --code" * ("code" in target.options))
            raise UsageError(
                f"--{name} cannot be used with {target.title}, which {reason}",
                hint=f"it works with {', '.join(targets)}",
            )


def suffix_of(to: str) -> str:
    """The suffix of a format, empty if there is no such format."""
    return next((target.suffix for target in TARGETS if target.name == to), "")


KERAS = ("keras", "keras-h5")
SAVED_MODEL = ("saved-model",)
TORCH = ("torch", "torch-legacy", "torch-tar", "shards", "safetensors")
PROGRAM = ("torch-export",)
ONNX = ("onnx",)
RANKS = tuple(row.name for row in FORMATS if row.is_of_ranks)
_LEGACY = frozenset({"torch-legacy", "torch-tar", "shards"})
"""PyTorch sources that hints do not list."""
WEIGHTS_SOURCES = (*KERAS, *SAVED_MODEL, *TORCH, *PROGRAM, *ONNX, "tflite", "tf-checkpoint")
"""Sources of routes that only need weights; these routes accept all other formats too, such as those of plug-ins."""

_TENSORFLOW = (("tensorflow", "tensorflow"), ("tf_keras", "tensorflow"))
_TORCH = (("torch", "torch"),)
_ORT = (("onnx", "onnx"), ("onnxruntime", "onnx"))
_TF2ONNX = ("tf2onnx", "export")
_ONNXSCRIPT = ("onnxscript", "export")


@dataclass(frozen=True, slots=True)
class Route:
    """A converter from some source formats to a target."""

    sources: tuple[str, ...]
    target: str
    writer: str
    """`module:function` in this package that writes the result."""
    opener: str = ""
    """`module:function` that opens the source in its runtime; empty if the route only reads bytes."""
    runner: str = ""
    """`module:function` that returns a function to run the result; empty if nothing is run."""
    needs: tuple[tuple[str, str], ...] = ()
    """Packages that the route imports, each with its extra."""
    companion_files: str = ""
    """`module:function` that returns the paths of code files written beside the result; empty if there are none."""


ROUTES = (
    *(
        Route(sources, target, writer, opener, runner, (*_TENSORFLOW, *more))
        for sources, opener in ((KERAS, "keras:open_runnable"), (SAVED_MODEL, "tensorflow:open_runnable"))
        for target, writer, runner, more in (
            ("onnx", "tensorflow:write_onnx", "onnx:runner", (*_ORT, _TF2ONNX)),
            ("tflite", "tensorflow:write_tflite", "tensorflow:run_tflite", ()),
            ("saved-model", "tensorflow:write", "tensorflow:runner", ()),
        )
    ),
    # Keras can only save models that it has loaded, so a SavedModel is loaded by Keras here, not by its signature.
    *(
        Route((*KERAS, *SAVED_MODEL), target, "keras:write", "keras:open_runnable", "keras:runner", _TENSORFLOW)
        for target in ("keras", "h5")
    ),
    Route(
        (*TORCH, *PROGRAM),
        "onnx",
        "torch:write_onnx",
        "torch:open_runnable",
        "onnx:runner",
        (*_TORCH, *_ORT, _ONNXSCRIPT),
    ),
    Route(TORCH, "torch-export", "torch:write_program", "torch:open_runnable", "torch:run_program", _TORCH),
    Route(TORCH, "torchscript", "torch:write_script", "torch:open_runnable", "torch:run_script", _TORCH),
    Route(ONNX, "onnx", "onnx:write", "onnx:open_runnable", "onnx:runner", _ORT),
    Route((*TORCH, *PROGRAM, *RANKS), "torch", "torch:write_state_dict", needs=_TORCH),
    *(
        Route(
            (*TORCH, *PROGRAM),
            target,
            "torch_code:write",
            "torch:open_runnable",
            "torch_code:runner",
            _TORCH,
            "torch_code:companion_files",
        )
        for target in ("torch", "safetensors")
    ),
    Route(WEIGHTS_SOURCES, "safetensors", "weights:write_safetensors"),
    Route(WEIGHTS_SOURCES, "npz", "weights:write_npz"),
)


_LITE = Route(("tflite",), "", "", "tensorflow:open_lite", needs=_TENSORFLOW)


def running_route(model: ModelFile) -> Route:
    """The route whose opener runs a model of this format; of several, the one that needs the fewest packages."""
    routes = [route for route in (*ROUTES, _LITE) if route.opener and model.format in route.sources]
    if not routes:
        raise InputError(
            f"{model.path} ({by_name(model.format).title}) holds weights alone, which no runtime here can run",
            hint="use the model that they were taken from",
        )
    return min(routes, key=lambda route: len(route.needs))


def find_route(model: ModelFile, target: Target, *, has_code: bool = False) -> Route:
    """The route from a model to a target; if there is none, an error lists the possible targets."""
    title = by_name(model.format).title
    if target.name in _own_targets(model) and not has_code:
        raise UsageError(f"{model.path} already has the format {target.title}", hint=_strip_hint(model))
    route = _route_between(model.format, target.name, has_code=has_code)
    if route is None and has_code:
        raise UsageError(
            f"--code needs a PyTorch model, but {model.path} is {title}",
            hint="leave out --code to export only the weights",
        )
    if route is None:
        reachable = [
            other.name
            for other in TARGETS
            if other.name not in _own_targets(model) and _route_between(model.format, other.name)
        ]
        raise UsageError(
            f"prunectl cannot export {title} to {target.title}",
            hint=f"{_sources_hint(target)}; {title} can be exported to {', '.join(reachable)}",
        )
    return route


def _strip_hint(model: ModelFile) -> str:
    if Capability.STRIP in by_name(model.format).can:
        return f"to remove training leftovers: prunectl strip {model.path} -o OUT"
    return ""


def _route_between(source: str, target: str, *, has_code: bool = False) -> Route | None:
    routes = (route for route in ROUTES if bool(route.companion_files) == has_code)
    routes = (route for route in routes if source in route.sources or route.sources is WEIGHTS_SOURCES)
    return next((route for route in routes if route.target == target), None)


def _own_targets(model: ModelFile) -> frozenset[str]:
    """The targets whose format the model already has."""
    if model.format == "keras-h5":
        # A file of weights alone can be exported as a whole model with --builder.
        return frozenset() if model.about.keras is None else frozenset({"h5"})
    if model.format == "torch":
        # A pickled module or TorchScript can be exported to a state dict.
        return frozenset() if model.about.code else frozenset({"torch"})
    # ONNX can be exported to another opset, and a SavedModel to one with only its serving signature.
    return frozenset({model.format} - {"onnx", "saved-model"})


def _sources_hint(target: Target) -> str:
    names = [name for name in _sources(target.name) if name not in _LEGACY]
    return f"{target.title} can be exported from {', '.join(dict.fromkeys(by_name(name).title for name in names))}"


def _sources(target: str) -> Iterable[str]:
    return (source for route in ROUTES if route.target == target for source in route.sources)


def load(route: Route, reference: str) -> Callable[..., Any]:
    """Resolve a `module:function` of a route, or name the extra that is missing."""
    # TensorFlow logs while it is imported; a missing package is reported all the same.
    with quiet_import() if _TENSORFLOW[0] in route.needs else nullcontext():
        for module, extra in route.needs:
            require(module, extra=extra)
    module, _, name = reference.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(f"prunectl.exporting.{module}"), name)
    return function
