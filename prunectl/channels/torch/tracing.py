"""From a module to a program that shows each of its operations."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from prunectl.channels.torch.inputs import with_batch
from prunectl.errors import InputError, UsageError, first_line

Examples = tuple[torch.Tensor, ...]
_HALF = (torch.float16, torch.bfloat16)
_SEVERAL = 2
"""A batch of 1 would be taken for a length that never changes."""


def trace(module: torch.nn.Module, examples: Examples, path: str) -> tuple[ExportedProgram, Examples]:
    """Return a module as a program, for a batch of any size where it is written so, and what it was traced on."""
    module.eval()
    if any(weight.dtype in _HALF for weight in module.parameters()):
        # What is proved is proved in single precision; the numbers that are written are those of the file.
        module.float()
    usable = _usable(module, examples, path)
    if isinstance(module, torch.jit.ScriptModule):
        return _converted(module, usable, path), usable
    open_batch = tuple({0: Dim.AUTO} if one.ndim else None for one in usable)
    with quietly():
        try:
            return _export(module, usable, open_batch), usable
        except Exception as error:  # noqa: BLE001 - PyTorch raises what it likes
            trouble = error
        try:
            return _export(module, usable, None), usable
        except Exception as error:
            reason = first_line(trouble)
            raise InputError(
                f"the model of {path} cannot be followed by torch.export: {reason}",
                hint="what runs must not depend on the numbers that come in; or export it to ONNX, and cut that",
            ) from error


def _export(
    module: torch.nn.Module, examples: Examples, axes: tuple[dict[int, Any] | None, ...] | None
) -> ExportedProgram:
    takes_any = getattr(getattr(module.forward, "__code__", None), "co_flags", 0) & inspect.CO_VARARGS
    # What goes into one parameter, `*inputs`, is described together.
    dynamic = (axes,) if axes is not None and takes_any else axes
    return torch.export.export(module, examples, dynamic_shapes=dynamic, strict=False)


def _usable(module: torch.nn.Module, examples: Examples, path: str) -> Examples:
    """Return examples that the module takes: two at a time, or as many as was said."""
    several = tuple(with_batch(one, _SEVERAL) if one.ndim and len(one) == 1 else one for one in examples)
    trouble = None
    for tried in (several, examples):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module(*tried)
        except Exception as error:  # noqa: BLE001 - it is the user's code
            trouble = error
        else:
            return tried
    shapes = " and ".join("x".join(map(str, one.shape)) for one in examples)
    raise UsageError(
        f"the model of {path} cannot be run on {shapes}: {first_line(trouble) if trouble else ''}",
        hint="say another shape with --input; one for each input, as 1,128:i64 where it takes whole numbers",
    ) from trouble


def _converted(module: torch.jit.ScriptModule, examples: Examples, path: str) -> ExportedProgram:
    from torch._export.converter import TS2EPConverter  # noqa: PLC0415

    with quietly():
        try:
            return TS2EPConverter(module, examples, {}).convert()
        except Exception as error:
            raise InputError(
                f"{path} is a script that PyTorch cannot turn into a graph: {first_line(error)}",
                hint="say what built it: --model package.module:function with a state dict",
            ) from error


@contextmanager
def quietly() -> Generator[None]:
    """Keep to itself what PyTorch has to say while it traces."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
