"""The private APIs of PyTorch that prunectl needs, except those that only the recorder in `channels.torch` uses."""
# ruff: noqa: SLF001

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch._C import DisableTorchFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

__all__ = [
    "DisableTorchFunction",
    "TorchDispatchMode",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
]

BatchNorm = torch.nn.modules.batchnorm._BatchNorm
"""The base class of all batch normalisation layers."""
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
"""Whether the network is being exported, as far as PyTorch before 2.7 tells."""
ADDMM_ACTIVATION = torch.ops.aten._addmm_activation.default
CONVOLUTION = torch.ops.aten._convolution.default


def convert_script(module: torch.jit.ScriptModule, examples: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """Convert a TorchScript module to an exported program."""
    converter = importlib.import_module("torch._export.converter").TS2EPConverter
    program: torch.export.ExportedProgram = converter(module, examples, {}).convert()
    return program


def written_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation changes in place."""
    if func is torch.ops.aten.native_batch_norm.default and args[5]:
        # The schema of this operation does not say that it updates the running statistics.
        return [statistic for statistic in args[3:5] if statistic is not None]
    if not func._schema.is_mutable:
        return []
    written = [
        args[index] if index < len(args) else kwargs.get(argument.name)
        for index, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, torch.Tensor)]
