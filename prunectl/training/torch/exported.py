"""Exported programs, which may take batches of one size only."""

from __future__ import annotations

import io
import tempfile
from typing import Any

import torch
from torch.utils._pytree import tree_map

from prunectl.errors import InputError, first_line
from prunectl.formats.base import ModelFile
from prunectl.formats.torch import exported_trust
from prunectl.training.network import Origin


def load_program(model: ModelFile, origin: Origin) -> torch.export.ExportedProgram:
    """The program in a file; without trust, in an archive of our own that holds what is on the lists and no more."""
    safe = None if origin.is_trusted else exported_trust.checked(model.path)
    try:
        if safe is None:
            return torch.export.load(str(model.path))
        with tempfile.TemporaryFile(prefix="prunectl-") as file:
            safe.write(file, _example_inputs(safe.inputs))
            file.seek(0)
            return torch.export.load(file)
    except Exception as error:
        raise InputError(f"{model.path} cannot be loaded by this PyTorch: {first_line(error)}") from error


def _example_inputs(found: bytes) -> bytes:
    """Example inputs as torch.export.load, which falls back to unpickling anything, does not have to fall back for."""
    try:
        inputs = torch.load(io.BytesIO(found), map_location="cpu", weights_only=True) if found else None
    except Exception:  # noqa: BLE001 - PyTorch raises what it likes; the shapes of the program say what goes in
        return b""
    if not isinstance(inputs, tuple):
        return b""
    whole = io.BytesIO()
    torch.save(inputs, whole)
    return whole.getvalue()


class Pieces(torch.nn.Module):
    """Runs any batch through a module that takes so many examples at a time."""

    def __init__(self, inner: torch.nn.Module, size: int) -> None:
        super().__init__()
        self.inner = inner
        self.size = size
        self.kept = size
        """How many of the examples that go through now are not there to fill up."""

    def state_dict(self, *args: Any, **more: Any) -> Any:
        """Return the inner module's, under its names."""
        return self.inner.state_dict(*args, **more)

    def named_parameters(self, *args: Any, **more: Any) -> Any:
        """Yield the inner module's, under its names."""
        return self.inner.named_parameters(*args, **more)

    def named_buffers(self, *args: Any, **more: Any) -> Any:
        """Yield the inner module's, under its names."""
        return self.inner.named_buffers(*args, **more)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Return what comes out of all pieces, the last filled up with its first example."""
        count = len(inputs[0])
        found = []
        for begin in range(0, count, self.size):
            piece = [one[begin : begin + self.size] for one in inputs]
            missing = self.size - len(piece[0])
            if missing:
                piece = [torch.cat([one, one[:1].expand(missing, *one.shape[1:])]) for one in piece]
            self.kept = self.size - missing
            out = self.inner(*piece)
            found.append(tree_map(lambda one, end=self.size - missing: one[:end], out))
        return found[0] if len(found) == 1 else _joined(found)


def _joined(found: list[Any]) -> Any:
    if isinstance(found[0], torch.Tensor):
        return torch.cat(found)
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def shapes_of(program: Any) -> tuple[tuple[int | None, ...], ...]:
    """Return the shapes that a program takes, the batch first; None for an axis that may have any length."""
    names = set(program.graph_signature.user_inputs)
    shapes = [
        getattr(node.meta.get("val"), "shape", ())
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    ]
    return tuple(tuple(axis if isinstance(axis, int) else None for axis in shape) for shape in shapes)
