"""Which calls rebuild a tensor, which wrap one, and which put one together from several."""

from __future__ import annotations

from typing import Any

from prunectl.formats.torch import arrays, views
from prunectl.formats.torch.values import Made, Persistent

MAX_WRAPPERS = 16
_PARAMETERS = frozenset(
    {
        *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
        *("torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"),
        *("torch._utils._rebuild_device_tensor_from_cpu_tensor", "torch._utils._rebuild_device_tensor_from_numpy"),
        "torch._utils._rebuild_xla_tensor",
    }
)
"""Calls that wrap the tensor which is their first argument."""
_TYPED = frozenset({"torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type"})
_SPARSE = "torch._utils._rebuild_sparse_tensor"
_QUANTIZED = "torch._utils._rebuild_qtensor"
_LISTED = ("indices", "values")
_COMPRESSED = ("compressed_indices", "plain_indices", "values")
_QUANTIZER = ("qscheme", "scales", "zero_points")


def is_leaf(value: Any) -> bool:
    """Whether a value is a tensor with a storage of its own."""
    if isinstance(value, Persistent):
        return not isinstance(value.id, tuple)
    return isinstance(value, Made) and (value.path in views.PLAIN or arrays.is_array(value))


def unwrapped(value: Any) -> Any:
    """Return the tensor inside a parameter or a subclass."""
    for _ in range(MAX_WRAPPERS):
        if not isinstance(value, Made):
            break
        if value.arg(0) is not None and (value.path in _PARAMETERS or value.path.startswith("torch.jit._pickle.")):
            value = value.arg(0)
        elif value.path in _TYPED and isinstance(value.arg(2), tuple):
            inner = Made(value.arg(0), value.arg(2), value.arg(3))
            if not is_leaf(inner) and inner.path != _SPARSE:
                break
            value = inner
        else:
            break
    return value


def parts(made: Made) -> tuple[tuple[str, Any], ...]:
    """Return the tensors that a sparse or quantized one consists of, by names."""
    if made.path == _QUANTIZED:
        settings = made.arg(4)
        return tuple(zip(_QUANTIZER, settings, strict=False)) if isinstance(settings, tuple) else ()
    data = made.arg(1)
    if made.path != _SPARSE or not isinstance(data, tuple):
        return ()
    is_compressed = len(data) > 2 and isinstance(unwrapped(data[2]), Made)
    return tuple(zip(_COMPRESSED if is_compressed else _LISTED, data, strict=False))
