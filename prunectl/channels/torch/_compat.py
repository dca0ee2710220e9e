"""The private APIs of PyTorch that a recording needs, and that a version may lack; no other module touches them."""
# ruff: noqa: SLF001

from __future__ import annotations

from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _compiling_state_context as compiling_state
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["compiling_state", "enable_python_dispatcher"]

OpOverload = torch._ops.OpOverload
"""One variant of an operation."""


class WholeOperations(ProxyTorchDispatchMode):  # type: ignore[no-untyped-call]
    """The base of a mode that sees operations whole, above autograd and before they are split into others.

    PyTorch lets a few classes of its own into that place; all that is taken from this one is that it is one of them.
    Under `enable_python_dispatcher`, without which nothing is seen there.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Any:
        return TorchDispatchMode.__enter__(self)  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: object) -> None:
        TorchDispatchMode.__exit__(self, *raised)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether PyTorch shall import its compiler, to keep it away from here."""
        return False


class SplitOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The base of a mode that sees operations below autograd, those that make a tensor of nothing among them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def schema_of(operation: Any) -> Any:
    """What an operation says of its arguments."""
    return operation._schema
