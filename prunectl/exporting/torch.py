"""PyTorch modules as sources: state dicts with their class, TorchScript, exported programs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from prunectl.errors import InputError, UsageError, first_line
from prunectl.exporting.job import InputSpec
from prunectl.formats.base import Array, ModelFile
from prunectl.training import user_code
from prunectl.training.backend import LoadOptions
from prunectl.training.quiet import quiet_conversion
from prunectl.training.torch.build import BuiltModule, FixedBatchModule, build_module, input_specs
from prunectl.training.torch.tensors import error_line, tensor_leaves, to_numpy, to_torch


def frozen_script(model: ModelFile, origin: LoadOptions) -> torch.nn.Module | None:
    """A frozen TorchScript, which has no parameters, in eval mode; None for any other model."""
    if origin.model or not user_code.is_script(model):
        return None
    user_code.check(model, origin)
    try:
        with quiet_conversion():
            loaded: Any = torch.jit.load(str(model.path), map_location="cpu")  # type: ignore[no-untyped-call]
            script: torch.nn.Module = loaded.eval()
    except Exception as error:
        raise InputError(f"{model.path} cannot be loaded by this PyTorch: {first_line(error)}") from error
    if any(True for _ in script.parameters()):
        return None
    if not hasattr(script, "forward"):
        raise InputError(f"{model.path} is a script without forward, and nothing says how it is called")
    return script


def frozen_inputs(module: Any) -> tuple[InputSpec, ...]:
    """The inputs of a frozen script, which declares only their names."""
    arguments = module.forward.schema.arguments[1:]
    return tuple(
        InputSpec(argument.name, None, "", is_declared=False)
        for argument in arguments
        if not argument.has_default_value()
    )


@dataclass(frozen=True, slots=True)
class TorchRunnable:
    """A module in eval mode with its inputs."""

    built: BuiltModule
    inputs: tuple[InputSpec, ...]
    is_channels_first: bool = True
    notes: tuple[str, ...] = ()

    @property
    def module(self) -> torch.nn.Module:
        """The module itself."""
        module = self.built.module
        return module.inner if isinstance(module, FixedBatchModule) else module

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """The outputs for one batch."""
        return run_module(self.module, inputs)


def open_runnable(model: ModelFile, origin: LoadOptions) -> TorchRunnable:
    """Build the module of a file, in eval mode."""
    script = frozen_script(model, origin)
    if script is not None:
        return TorchRunnable(BuiltModule(script, {}), frozen_inputs(script))
    with quiet_conversion():
        built = build_module(model, origin)
    if built.has_modes:
        built.module.eval()
    size = built.module.size if isinstance(built.module, FixedBatchModule) else None
    inputs = tuple(
        InputSpec(
            port.name, None if port.shape is None else (size, *port.shape), port.dtype, is_declared=bool(built.shapes)
        )
        for port in input_specs(built.module, built.shapes)
    )
    return TorchRunnable(built, inputs)


@contextmanager
def without_mha_fastpath() -> Iterator[None]:
    """Disable the fused fast path of transformer encoders, an operator that no other runtime has."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def run_module(module: Any, inputs: tuple[Array, ...]) -> dict[str, Array]:
    """The outputs of a module for arrays, nested containers flattened to tensors."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # What its authors would do otherwise today is not for who only holds the file.
            warnings.simplefilter("ignore")
            outputs = tensor_leaves(module(*map(to_torch, inputs)))
    except Exception as error:
        shapes = ", ".join("x".join(map(str, array.shape)) for array in inputs)
        raise UsageError(
            f"the model does not take inputs of {shapes}: {error_line(error)}",
            hint="--input x:1,3,224,224:f32 says what it takes, or --data SPEC shows it",
        ) from error
    return dict(zip(output_names(len(outputs)), [to_numpy(tensor) for tensor in outputs], strict=True))


def output_names(count: int) -> list[str]:
    """Default names of outputs."""
    return ["output"] if count == 1 else [f"output{index}" for index in range(count)]
