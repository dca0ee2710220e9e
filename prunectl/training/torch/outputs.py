"""What comes out of a module, and why nothing does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prunectl.errors import UsageError
from prunectl.training.ending import Ending


def tensors(found: Any) -> tuple[torch.Tensor, ...]:
    """Return the outputs in a row, whatever a module gives them in."""
    if isinstance(found, torch.Tensor):
        return (found,)
    if isinstance(found, Mapping):
        found = [found["logits"]] if "logits" in found else list(found.values())
    outs = tuple(one for one in found if isinstance(one, torch.Tensor))
    if not outs:
        raise UsageError(f"the model gives a {type(found).__name__} without a tensor in it")
    return outs


def leaves(found: Any) -> list[torch.Tensor]:
    """Return every tensor in what a module gives, whatever they are packed in."""
    packed = torch.utils._pytree.tree_leaves(found)  # noqa: SLF001
    return [one for one in packed if isinstance(one, torch.Tensor)]


_PASSED_ON = frozenset(
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
_ENDINGS = {
    "Softmax": Ending.SOFTMAX,
    "SafeSoftmax": Ending.SOFTMAX,
    "LogSoftmax": Ending.LOG_SOFTMAX,
    "Sigmoid": Ending.SIGMOID,
}
_RAW = frozenset({"Addmm", "Mm", "Bmm", "Convolution", "Add", "Relu", "NativeBatchNorm", "CudnnBatchNorm", "Tanh"})


def ending(out: torch.Tensor) -> Ending:
    """The last activation, by the operation of autograd that made an output; unknown where that does not tell."""
    step: Any = out.grad_fn
    while step is not None:
        name = str(step.name()).rpartition("::")[2].partition("Backward")[0]
        if name in _ENDINGS:
            return _ENDINGS[name]
        if name not in _PASSED_ON or not step.next_functions:
            return Ending.RAW if name in _RAW else Ending.UNKNOWN
        step = step.next_functions[0][0]
    return Ending.UNKNOWN


def reason(error: Exception) -> str:
    """Return the line in which PyTorch comes to the point: the first, or the last where a script was interpreted."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "TorchScript" in lines[0] else 0]
