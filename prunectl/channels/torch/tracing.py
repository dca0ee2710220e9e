"""Tracing a module by torch.export."""

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

from prunectl.channels.lengths import no_shape, parse_input
from prunectl.errors import InputError, UsageError, first_line
from prunectl.training.quiet import ignore_warnings, quiet_logging
from prunectl.training.torch.build import input_specs

_LENGTH, _EXAMPLE = 224, "1,3,224,224 or 1,128:i64"


def examples(specs: tuple[str, ...], module: torch.nn.Module, path: str) -> tuple[torch.Tensor, ...]:
    """An example for each shape, such as `1,3,224,224` or `1,128:i64`."""
    if not specs:
        raise UsageError(
            f"{path} does not say what goes into it, and it has to be run to be followed",
            hint=f"say a shape with a batch of 1: --input {_suggestion(module)}",
        )
    ports = input_specs(module) if len(specs) == 1 else ()
    default = torch.int64 if ports and ports[0].dtype == "int64" else _default_float(module)
    return tuple(_example(spec, default) for spec in specs)


def random_like(example: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Random numbers in place of an example: normal ones, or whole ones small enough for any table of words."""
    if example.is_floating_point():
        return torch.randn(example.shape, generator=random, dtype=torch.float32).to(example.dtype)
    return torch.randint(0, 2, example.shape, generator=random).to(example.dtype)


def with_batch(example: torch.Tensor, size: int) -> torch.Tensor:
    """An example for so many at a time."""
    return torch.zeros((size, *example.shape[1:]), dtype=example.dtype) if example.ndim else example


def _example(spec: str, default: torch.dtype) -> torch.Tensor:
    option = parse_input(spec, _EXAMPLE)
    if option.name or option.lengths != option.shape:
        raise no_shape(spec, _EXAMPLE)
    return torch.zeros(option.lengths, dtype=getattr(torch, option.dtype) if option.dtype else default)


def _default_float(module: torch.nn.Module) -> torch.dtype:
    first = next((weight for weight in module.parameters() if weight.is_floating_point()), None)
    return torch.float64 if first is not None and first.dtype is torch.float64 else torch.float32


def _suggestion(module: torch.nn.Module) -> str:
    ports = input_specs(module)
    shape = ports[0].shape if len(ports) == 1 else None
    if shape is None:
        return "1,128:i64" if ports[0].dtype == "int64" else f"1,3,{_LENGTH},{_LENGTH}"
    return ",".join(map(str, (1, *(length or _LENGTH for length in shape))))


Examples = tuple[torch.Tensor, ...]
_HALF = (torch.float16, torch.bfloat16)
_TRACED_BATCH = 2
"""A batch of 1 would be taken for a length that never changes."""


def trace(module: torch.nn.Module, examples: Examples, path: str) -> tuple[ExportedProgram, Examples]:
    """A module as a program, for a batch of any size where it is written so, and what it was traced on."""
    module.eval()
    if any(weight.dtype in _HALF for weight in module.parameters()):
        # What is proved is proved in single precision; the numbers that are written are those of the file.
        module.float()
    accepted = _accepted_inputs(module, examples, path)
    if isinstance(module, torch.jit.ScriptModule):
        return _convert_script(module, accepted, path), accepted
    open_batch = tuple({0: Dim.AUTO} if value.ndim else None for value in accepted)
    with quiet():
        try:
            return _export(module, accepted, open_batch), accepted
        except Exception as error:  # noqa: BLE001 - PyTorch raises what it likes
            open_error = error
        try:
            return _export(module, accepted, None), accepted
        except Exception as error:
            reason = first_line(open_error)
            raise InputError(
                f"the model of {path} cannot be followed by torch.export: {reason}",
                hint="what runs must not depend on the numbers that come in; or export it to ONNX, and cut that",
            ) from error


def _export(
    module: torch.nn.Module, examples: Examples, axes: tuple[dict[int, Any] | None, ...] | None
) -> ExportedProgram:
    takes_varargs = getattr(getattr(module.forward, "__code__", None), "co_flags", 0) & inspect.CO_VARARGS
    # What goes into one parameter, `*inputs`, is described together.
    dynamic = (axes,) if axes is not None and takes_varargs else axes
    return torch.export.export(module, examples, dynamic_shapes=dynamic, strict=False)


def _accepted_inputs(module: torch.nn.Module, examples: Examples, path: str) -> Examples:
    """Examples that the module accepts: a batch of two, or that of `--input`."""
    batched = tuple(with_batch(value, _TRACED_BATCH) if value.ndim and len(value) == 1 else value for value in examples)
    failure = None
    for inputs in (batched, examples):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module(*inputs)
        except Exception as error:  # noqa: BLE001 - it is the user's code
            failure = error
        else:
            return inputs
    shapes = " and ".join("x".join(map(str, value.shape)) for value in examples)
    raise UsageError(
        f"the model of {path} cannot be run on {shapes}: {first_line(failure) if failure else ''}",
        hint="say another shape with --input; one for each input, as 1,128:i64 where it takes whole numbers",
    ) from failure


def _convert_script(module: torch.jit.ScriptModule, examples: Examples, path: str) -> ExportedProgram:
    from torch._export.converter import TS2EPConverter  # noqa: PLC0415

    with quiet():
        try:
            return TS2EPConverter(module, examples, {}).convert()
        except Exception as error:
            raise InputError(
                f"{path} is a script that PyTorch cannot turn into a graph: {first_line(error)}",
                hint="say what built it: --model package.module:function with a state dict",
            ) from error


@contextmanager
def quiet() -> Generator[None]:
    """Silence warnings, loggers and output of PyTorch, and record no gradients."""
    output = io.StringIO()
    with (
        quiet_logging(logging.CRITICAL),
        ignore_warnings(),
        redirect_stdout(output),
        redirect_stderr(output),
        torch.no_grad(),
    ):
        yield
