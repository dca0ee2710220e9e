"""Models as Python has them: by a path or a URL, and in memory.

One in memory is saved in a format of its own, pruned as that file, and loaded back into a copy.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Generator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from prunectl.analysis.patterns import CHANNEL
from prunectl.analysis.stats import ModelStats
from prunectl.api.in_memory import copy_of
from prunectl.api.keywords import AnyPath, FilePruneOptions, PruneOptions, check_type
from prunectl.errors import SCRATCH, PrunectlError, UsageError, first_line
from prunectl.exporting.weights import save_arrays
from prunectl.formats.detect import URL, without_secrets
from prunectl.formats.registry import open_model
from prunectl.formats.safetensors import CODES
from prunectl.formats.scratch import temporary_folder
from prunectl.pruning.destination import Destination


def local_path(name: str, path: AnyPath) -> Path:
    """A path on this machine."""
    if kind_of(path) is not None:
        raise TypeError(f"{name} must be a path: only prune takes a model in memory, not {type(path).__name__}")
    check_type(name, path, AnyPath)
    if is_url(path):
        is_written = name in {"output", "tried"}
        to_read = "download it first; inspect, size, diff, prune and strip read a model at a URL"
        raise UsageError(
            f"{name} is a URL, where a file is needed",
            hint="write it to a path on this machine, and upload it afterwards" if is_written else to_read,
        )
    return Path(path)


def destination_of(model: AnyPath, output: AnyPath, *, force: bool, in_place: bool) -> Destination:
    """The destination of an output; `in_place` needs the path of the model as the output."""
    target = local_path("output", output)
    # A model at a URL is read without a local path, and refused elsewhere for in_place.
    if in_place and not is_url(model) and os.path.realpath(target) != os.path.realpath(model):
        raise UsageError(
            f"in_place replaces {model}, but the output is {target}",
            hint=f"write {str(model)!r} as output too, or leave out in_place",
        )
    return Destination(target, is_forced=force, is_in_place=in_place)


def is_url(path: object) -> bool:
    """Whether a model is named by a URL."""
    return isinstance(path, str) and URL.match(path) is not None


@contextmanager
def model_path(name: str, path: AnyPath, *, is_read_whole: bool = False) -> Generator[Path]:
    """Yield a local path to a model, which for a URL reads no more of it than is needed."""
    if not is_url(path):
        yield local_path(name, path)
        return
    remote = importlib.import_module("prunectl.formats.remote")
    with remote.mirrored(path, is_read_whole=is_read_whole) as mirror:
        yield mirror


def shown_path(path: AnyPath, stats: ModelStats) -> ModelStats:
    """Statistics that name the URL of the model instead of its local stand-in."""
    return replace(stats, path=without_secrets(str(path))) if is_url(path) else stats


PATH_HINT = "write prunectl.prune('model.pt', 'small.pt', sparsity='80%'), or None as output to write nothing"


class StatefulModule(Protocol):
    """A `torch.nn.Module`, without importing torch."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Weights by name."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights by name."""


class WeightedModel(Protocol):
    """A `keras.Model`, without importing Keras."""

    def get_weights(self) -> Any:
        """The weights in order."""

    def load_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Load the weights of a file."""


class ProtobufModel(Protocol):
    """An `onnx.ModelProto`, without importing onnx."""

    def SerializeToString(self, *args: Any, **kwargs: Any) -> bytes:  # noqa: N802 - protobuf calls it so
        """The bytes of its `.onnx` file."""


LiveModel = TypeVar("LiveModel", bound=StatefulModule | WeightedModel | ProtobufModel | Mapping[str, Any])
FilePruner = Callable[[Path, Path, Mapping[str, Any]], object]
"""Prunes a file to a file, with options."""


@dataclass(frozen=True, slots=True)
class ModelKind:
    """How models of one kind are saved, and loaded back."""

    title: str
    suffix: str
    save: Callable[[Any, Path], object]
    load: Callable[[Any, Path, bool], Any]
    """Load the pruned file (second argument), into the model itself where the third says so, and return the result."""
    code: Callable[[Any], dict[str, Any]]
    """Options that the framework needs to run the saved file, such as a builder."""
    keeps_shapes: bool = False
    """Whether only weights of the same shapes can be loaded back."""


def kind_of(model: object) -> ModelKind | None:
    """The kind of a model in memory. No framework is imported: that of the model is imported already."""
    for library, name, kind in _CLASSES:
        module = sys.modules.get(library)
        cls = getattr(module, name, None)
        if isinstance(cls, type) and isinstance(model, cls):
            return kind
    if isinstance(model, Mapping):
        return _STATE_DICT if any(map(_is_tensor, model.values())) else _ARRAYS
    return None


def prune_in_memory(
    kind: ModelKind, model: Any, prune_file: FilePruner, options: Mapping[str, Any], *, in_place: bool
) -> Any:
    """A pruned copy of a model, or the model itself in place: it is saved to a file, which is pruned and loaded."""
    changes_shapes = options.get("pattern") == CHANNEL
    save = f"save it, and prune the file: prunectl.prune('model{kind.suffix}', 'small{kind.suffix}', "
    if changes_shapes and (kind.keeps_shapes or in_place):
        raise UsageError(
            f"channels cannot be removed from {kind.title} in memory: its layers would need other shapes",
            hint=f"{save}pattern='channel', …)" if kind.keeps_shapes else "leave out in_place: a copy can be smaller",
        )
    for name in options.keys() & FilePruneOptions.__annotations__.keys() - PruneOptions.__annotations__.keys():
        raise UsageError(f"{name} needs a file: {kind.title} is in memory", hint=f"{save}{name}=…)")
    code = kind.code(model) if options.get("data") is not None else {}
    with temporary_folder() as scratch:
        source, target = scratch / f"model{kind.suffix}", scratch / f"pruned{kind.suffix}"
        kind.save(model, source)
        try:
            prune_file(source, target, {**code, **options})
        except PrunectlError as error:
            raise _without_paths(error) from error
        return kind.load(model, target, in_place)


_SCRATCH_FILE = re.compile(rf"\S*/{SCRATCH.pattern}/\S*\w")


def _without_paths(error: PrunectlError) -> PrunectlError:
    """The same error without the paths of temporary files."""
    # The hint may name things to do with a file, which do not apply to a model in memory.
    hint = "; ".join(advice for advice in error.hint.split("; ") if not _SCRATCH_FILE.search(advice))
    return type(error)(_SCRATCH_FILE.sub("the model", error.message), hint=hint, did_you_mean=error.did_you_mean)


def _torch() -> Any:
    return sys.modules["torch"]


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _save_module(model: Any, path: Path) -> None:
    """The tensors of a module; what its `get_extra_state` adds may be anything, and stays where it is."""
    parameters = _torch().nn.parameter
    for name, value in model.named_parameters():
        if parameters.is_lazy(value):
            raise UsageError(f"{name} has no shape yet", hint="call the module once on an example")
        if value.is_meta:
            raise UsageError(f"{name} is on the device meta: it has no values", hint="load the weights first")
    _torch().save({name: value for name, value in model.state_dict().items() if _is_tensor(value)}, path)


def _load_module(model: Any, path: Path, is_in_place: bool) -> Any:
    result = model if is_in_place else copy_of(model)
    try:
        result.load_state_dict({**result.state_dict(), **_read_state_dict(path)})
    except RuntimeError as error:
        raise UsageError(
            f"{type(model).__name__} does not load its own state dict: {first_line(error)}",
            hint="prune net.state_dict(), which comes back as a dict",
        ) from error
    _compute_weights(result)
    return result


def _compute_weights(model: Any) -> None:
    """Compute the weights that functions of `torch.nn.utils` compute before each forward pass."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():  # noqa: SLF001 - there is no other way to them
            names = {cls.__name__ for cls in type(hook).__mro__}
            if names & {"BasePruningMethod", "WeightNorm"}:
                hook(module, None)
            elif "SpectralNorm" in names:
                # In training mode the hook itself would take a power step, and change the norm.
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))


def _read_state_dict(path: Path) -> Any:
    return _torch().load(path, map_location="cpu", weights_only=True)


_PLAIN = frozenset({str, int, float, bool, type(None)})


def _save_state_dict(model: Mapping[str, Any], path: Path) -> None:
    _torch().save(_loadable(model, "model"), path)


def _loadable(value: Any, where: str) -> Any:
    """The tensors in a value, and around them only what `torch.load` takes with weights_only=True."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim > 1:
        raise TypeError(f"{where} must be a tensor, as others are, not a NumPy array")
    if isinstance(value, Mapping):
        loadable = {name: _loadable(part, f"{where}[{name!r}]") for name, part in value.items() if type(name) in _PLAIN}
        return {name: part for name, part in loadable.items() if part is not None}
    if isinstance(value, list | tuple):
        parts = [_loadable(part, f"{where}[{index}]") for index, part in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    return value if _is_tensor(value) or type(value) in _PLAIN else None


def _load_state_dict(model: MutableMapping[str, Any], path: Path, is_in_place: bool) -> Any:
    pruned = _read_state_dict(path)
    return _updated(model, _with_tensors(model, pruned), is_in_place=is_in_place)


def _with_tensors(value: Any, pruned: Any) -> Any:
    """A value with the tensors of its pruned version, on their old devices, and everything else as it was."""
    if _is_tensor(pruned):
        return pruned.to(value.device) if _is_tensor(value) else pruned
    if isinstance(value, Mapping):
        result = copy.copy(value) if isinstance(value, dict) else dict(value)
        for name, part in pruned.items():
            result[name] = _with_tensors(value.get(name, part), part)
        return result
    if isinstance(value, list | tuple):
        parts = [_with_tensors(*pair) for pair in zip(value, pruned, strict=True)]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    return value


def _updated(model: MutableMapping[str, Any], values: Mapping[str, Any], *, is_in_place: bool) -> Any:
    result = model if is_in_place else copy.copy(model)
    result.update(values)
    return result


def _save_arrays(model: Mapping[str, Any], path: Path) -> None:
    if not model:
        raise UsageError("the dict holds no weights", hint="give arrays by name, such as {'fc.weight': array}")
    for name, value in model.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise TypeError(f"model[{name!r}] must be a NumPy array, not {type(value).__name__}")
        if value.dtype.name not in CODES or not value.dtype.isnative:
            raise TypeError(f"model[{name!r}] has the type {value.dtype}, which safetensors does not support")
    save_arrays([*model.items()], {}, path)


def _load_arrays(model: MutableMapping[str, Any], path: Path, is_in_place: bool) -> Any:
    file = open_model(path)
    values = {tensor.name: np.array(file.read(tensor)) for tensor in file.tensors}
    return _updated(model, values, is_in_place=is_in_place)


def _save_keras(model: Any, path: Path) -> None:
    if not model.built:
        raise UsageError("the Keras model has no weights yet", hint="call it once on an example")
    try:
        model.save(str(path))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(
            f"Keras cannot save {type(model).__name__}: {first_line(error)}",
            hint="give its classes a get_config, or prune a file of its weights: model.save_weights('m.weights.h5')",
        ) from error


def _load_keras(model: Any, path: Path, is_in_place: bool) -> Any:
    if is_in_place:
        model.load_weights(str(path))
        return model
    objects = _custom_objects(model)
    try:
        return _keras_of(model).models.load_model(str(path), custom_objects=objects, compile=False, safe_mode=False)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(
            f"Keras cannot build a copy of {type(model).__name__}: {first_line(error)}",
            hint="give its classes a get_config, or prune the model itself with in_place=True",
        ) from error


def _keras_of(model: Any) -> Any:
    tf_keras = sys.modules.get("tf_keras")
    return tf_keras if tf_keras is not None and isinstance(model, tf_keras.Model) else sys.modules["keras"]


def _custom_objects(model: Any) -> dict[str, Any]:
    """The classes and functions, such as activations, of a model and its layers that do not belong to Keras itself."""
    parts = (model, *model._flatten_layers())  # noqa: SLF001 - also layers in layers
    functions = {value for part in parts for value in vars(part).values() if inspect.isfunction(value)}
    objects: set[Any] = {*map(type, parts), *functions}
    return {one.__name__: one for one in objects if one.__module__.partition(".")[0] not in {"keras", "tf_keras"}}


def _keras_code(model: Any) -> dict[str, Any]:
    objects = _custom_objects(model)
    return {"custom_objects": objects} if objects else {}


def _save_onnx(model: Any, path: Path) -> None:
    path.write_bytes(model.SerializeToString())


def _load_onnx(model: Any, path: Path, is_in_place: bool) -> Any:
    pruned = type(model).FromString(path.read_bytes())
    if not is_in_place:
        return pruned
    model.CopyFrom(pruned)
    return model


def _no_code(_: Any) -> dict[str, Any]:
    """No options: the file is complete by itself."""
    return {}


_STATE_DICT = ModelKind("a state dict", ".pt", _save_state_dict, _load_state_dict, _no_code)
_ARRAYS = ModelKind("a dict of arrays", ".safetensors", _save_arrays, _load_arrays, _no_code)
_KERAS = ModelKind("a Keras model", ".keras", _save_keras, _load_keras, _keras_code)
_MODULE = ModelKind(
    "a PyTorch module",
    ".pt",
    _save_module,
    _load_module,
    lambda model: {"builder": lambda: copy_of(model)},
    keeps_shapes=True,
)
_ONNX = ModelKind("an ONNX model", ".onnx", _save_onnx, _load_onnx, _no_code)
_CLASSES = (
    ("torch.nn", "Module", _MODULE),
    ("keras", "Model", _KERAS),
    ("tf_keras", "Model", _KERAS),
    ("onnx", "ModelProto", _ONNX),
)
"""Modules and their classes, looked up in `sys.modules` only."""
