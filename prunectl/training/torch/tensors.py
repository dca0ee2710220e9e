"""Conversion of arrays between NumPy and PyTorch; bfloat16 and float8 are passed as integers of the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from prunectl.errors import UsageError
from prunectl.training.task import FinalActivation
from prunectl.training.torch._compat import tree_leaves

_AS_BITS = {
    "bfloat16": (np.int16, torch.bfloat16),
    "float8_e4m3fn": (np.int8, torch.float8_e4m3fn),
    "float8_e5m2": (np.int8, torch.float8_e5m2),
}


def to_torch(array: NDArray[Any]) -> torch.Tensor:
    """A tensor with a copy of the numbers of an array."""
    return view_as_torch(np.array(array, order="C"))


def view_as_torch(array: NDArray[Any]) -> torch.Tensor:
    """A read-only tensor over the memory of an array, which may be that of a mapped file."""
    dense = np.ascontiguousarray(array).reshape(array.shape)
    bits, dtype = _AS_BITS.get(dense.dtype.name, (None, None))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        tensor = torch.from_numpy(dense if bits is None else dense.view(bits))
    return tensor if dtype is None else tensor.view(dtype)


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """An array with a copy of the numbers of a tensor."""
    dense = tensor.detach().cpu().contiguous()
    for name, (bits, dtype) in _AS_BITS.items():
        if dense.dtype is dtype:
            as_bits = dense.view(torch.int16 if bits is np.int16 else torch.int8).numpy().copy()
            return as_bits.view(np.dtype(getattr(ml_dtypes, name)))
    return np.array(dense.numpy())


def output_tensors(outputs: Any) -> tuple[torch.Tensor, ...]:
    """The outputs of a module as a tuple, from a tensor, a sequence or a mapping; of a mapping only its logits."""
    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    if isinstance(outputs, Mapping):
        outputs = [outputs["logits"]] if "logits" in outputs else list(outputs.values())
    outs = tuple(tensor for tensor in outputs if isinstance(tensor, torch.Tensor))
    if not outs:
        raise UsageError(f"the model returns a {type(outputs).__name__} without a tensor")
    return outs


def tensor_leaves(outputs: Any) -> list[torch.Tensor]:
    """Every tensor in the outputs of a module, however they are nested."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


_VALUE_PRESERVING = frozenset(
    {
        "Alias",
        "Cat",
        "Clone",
        "Permute",
        "Reshape",
        "Select",
        "Slice",
        "Squeeze",
        "T",
        "ToCopy",
        "Transpose",
        "UnsafeView",
        "Unsqueeze",
        "View",
    }
)
_ACTIVATIONS = {
    "Softmax": FinalActivation.SOFTMAX,
    "SafeSoftmax": FinalActivation.SOFTMAX,
    "LogSoftmax": FinalActivation.LOG_SOFTMAX,
    "Sigmoid": FinalActivation.SIGMOID,
}
_RAW = frozenset({"Addmm", "Mm", "Bmm", "Convolution", "Add", "Relu", "NativeBatchNorm", "CudnnBatchNorm", "Tanh"})


def final_activation(out: torch.Tensor) -> FinalActivation:
    """The last activation, by the autograd operation that computed an output; unknown if it is none of those above."""
    step: Any = out.grad_fn
    while step is not None:
        name = str(step.name()).rpartition("::")[2].partition("Backward")[0]
        if name in _ACTIVATIONS:
            return _ACTIVATIONS[name]
        if name not in _VALUE_PRESERVING or not step.next_functions:
            return FinalActivation.RAW if name in _RAW else FinalActivation.UNKNOWN
        step = step.next_functions[0][0]
    return FinalActivation.UNKNOWN


def error_line(error: Exception) -> str:
    """The line of an error that states the problem: the first, or the last from the TorchScript interpreter."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "TorchScript" in lines[0] else 0]


class InnerModule(torch.nn.Module):
    """A module that wraps another, with the parameter names of the inner module."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @contextmanager
    def plain(self) -> Generator[torch.nn.Module]:
        """A copy for `torch.export`, which expects parameter names with the prefixes of all enclosing modules."""
        copy: torch.nn.Module = type("Plain", (torch.nn.Module,), {"forward": type(self).forward})()
        copy.__dict__.update(self.__dict__)
        yield copy

    def state_dict(self, *args: Any, **more: Any) -> Any:
        """The state dict of the inner module."""
        return self.inner.state_dict(*args, **more)

    def named_parameters(self, *args: Any, **more: Any) -> Any:
        """Yield the parameters of the inner module."""
        return self.inner.named_parameters(*args, **more)

    def named_buffers(self, *args: Any, **more: Any) -> Any:
        """Yield the buffers of the inner module."""
        return self.inner.named_buffers(*args, **more)
