"""Would Keras run code, or look for classes that it does not have, to rebuild a model from its configuration?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prunectl.formats.keras.config import layers, text

_CODE = frozenset({"Lambda", "TensorFlowOpLayer", "ClassMethod", "InstanceMethod", "InstanceProperty"})
"""Layers that hold code, or call whatever operation or method the file names."""
_NAMED_OPERATIONS = frozenset({"TFOpLambda", "SlicingOpLambda"})
_PURE = ("math.", "nn.", "__operators__.")
_PURE_NAMES = frozenset(
    {
        "cast",
        "clip_by_value",
        "compat.v1.shape",
        "compat.v1.squeeze",
        "concat",
        "expand_dims",
        "gather",
        "identity",
        "ones_like",
        "reshape",
        "shape",
        "split",
        "squeeze",
        "stack",
        "strided_slice",
        "tile",
        "transpose",
        "unstack",
        "where",
        "zeros_like",
    }
)
"""Operations that do nothing but reckon."""
_MODULES = ("layers", "initializers", "regularizers", "constraints", "activations", "models")
MAX_DEPTH = 200


def code_in(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what of a configuration is or may be code, each in words."""
    found = [*_layers_with_code(config), *_strange_modules(config, 0)]
    return tuple(dict.fromkeys(found))


def _layers_with_code(config: Mapping[str, Any]) -> Iterator[str]:
    for layer in layers(config):
        operation = text(layer.config, "function")
        if layer.kind in _CODE:
            yield f"{layer.kind} layer {layer.name}"
        elif layer.kind in _NAMED_OPERATIONS and not (operation.startswith(_PURE) or operation in _PURE_NAMES):
            yield f"operation {operation or layer.name}"


def _strange_modules(value: Any, depth: int) -> Iterator[str]:
    """Yield what names a class that is not registered, or a module other than those that hold layers and the like."""
    if depth > MAX_DEPTH:
        yield "a configuration nested too deep"
        return
    if isinstance(value, list):
        for item in value:
            yield from _strange_modules(item, depth + 1)
    if not isinstance(value, dict):
        return
    kind, module = text(value, "class_name"), value.get("module")
    if kind in _CODE:
        yield f"{kind} layer {text(value.get('config'), 'name') or kind}"
    if ">" in kind and kind.partition(">")[0] != "TFOptimizationToolkit":
        yield f"custom class {kind.rpartition('>')[2]}"
    if module is not None and not _is_known(module):
        yield f"{kind or 'something'} of {module}"
    for item in value.values():
        yield from _strange_modules(item, depth + 1)


def _is_known(module: Any) -> bool:
    parts = module.split(".") if isinstance(module, str) else []
    return (len(parts) == 2 and parts[0] in {"keras", "tf_keras"} and parts[1] in _MODULES) or parts[:1] == [
        "tensorflow_model_optimization"
    ]
