"""Linear layers of PyTorch that store their weight without its zeros, where that is measured to be faster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.nn import functional

from prunectl.analysis.timing import Verdict, measure
from prunectl.channels.torch.code.expressions import literal
from prunectl.channels.torch.code.module import LinearLayer, ReplacedLayers
from prunectl.errors import WorkError
from prunectl.formats.base import ModelFile

LEAST_SPEEDUP = 1.2
_SECONDS = 2.0
"""Longest time for each layer."""
_FEW_ZEROS = 0.5
"""Below this share of zeros no kernel is faster, and none is tried."""
_CODE = '''
class SparseLinear(nn.Module):
    """A linear layer whose weight is stored by rows, without its zeros (CSR)."""

    def __init__(self, inputs: int, outputs: int, nonzeros: int, bias: bool = True) -> None:
        super().__init__()
        self.shape = (outputs, inputs)
        self.register_buffer("rows", torch.zeros(outputs + 1, dtype=torch.int32))
        self.register_buffer("columns", torch.zeros(nonzeros, dtype=torch.int32))
        self.values = nn.Parameter(torch.zeros(nonzeros))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.checked = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch says once that such tensors are new
            torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), check_invariants=True)

    def weight(self) -> torch.Tensor:
        """The weight; PyTorch checks its indices when they have changed, as a wrong one would read anywhere."""
        parts = (self.rows, self.columns)
        state = [(part.data_ptr(), part._version) for part in parts]
        weight = torch.sparse_csr_tensor(*parts, self.values, self.shape, check_invariants=state != self.checked)
        self.checked = state
        return weight

    def forward(self, x: torch.Tensor):
        weight = self.weight()
        flat = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu" and not torch.backends.mkl.is_available():
            y = flat @ weight.to_dense().t()  # a PyTorch without kernels for it
        else:
            y = torch.sparse.mm(weight, flat.t()).t()
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.shape[0])
'''
"""What stands in the file of the class after it."""


def replace_layers(
    layers: Sequence[LinearLayer], *, file: ModelFile, batch_size: int, notes: list[str]
) -> ReplacedLayers:
    """Put sparse layers where they are faster on this processor; what was measured becomes a note.

    In a batch of some size, as the ratio of times for one layer on random inputs.
    """
    faster: dict[str, str] = {}
    slower: dict[str, str] = {}
    chosen = []
    for layer in layers:
        if not layer.weight.numel():
            continue
        zeros = 1 - float(torch.count_nonzero(layer.weight)) / layer.weight.numel()
        if zeros < _FEW_ZEROS:
            slower[layer.path] = f"{100 * zeros:.0f} % zeros"
            continue
        speedup, is_faster = _speedup(layer, layer.rows * batch_size)
        (faster if is_faster else slower)[layer.path] = f"{speedup:.2f} times as fast"
        if is_faster:
            chosen.append(layer)
    if not chosen:
        why = f": {_listed(slower)}" if slower else ", as it has no linear layers with weights of their own"
        raise WorkError(
            f"no layer of {file.path} is {LEAST_SPEEDUP:g} times as fast without its zeros{why}; nothing was written",
            hint="leave out --sparse; more zeros or a larger --batch-size may change that",
        )
    on = f"in batches of {batch_size}, on one thread of this processor"
    notes.append(f"Stored without zeros, since measured as faster {on}: {_listed(faster)}.")
    if slower:
        notes.append(f"Left dense: {_listed(slower)}.")
    return ReplacedLayers(
        {layer.path: _constructor(layer) for layer in chosen},
        {layer.path: _state(layer) for layer in chosen},
        _CODE,
        ("import warnings",),
    )


def _listed(layers: dict[str, str]) -> str:
    return ", ".join(f"{path} ({what})" for path, what in layers.items())


def _constructor(layer: LinearLayer) -> str:
    outputs, inputs = layer.weight.shape
    options = "" if layer.has_bias else ", bias=False"
    return f"SparseLinear({literal(inputs)}, {literal(outputs)}, {int(torch.count_nonzero(layer.weight))}{options})"


def _state(layer: LinearLayer) -> dict[str, torch.Tensor]:
    compressed = layer.weight.detach().to_sparse_csr()
    return {
        "rows": compressed.crow_indices().to(torch.int32),
        "columns": compressed.col_indices().to(torch.int32),
        "values": compressed.values(),
    }


def _speedup(layer: LinearLayer, rows: int) -> tuple[float, bool]:
    """How many times as fast the sparse layer is for so many rows, and whether that is surely enough."""
    names: dict[str, object] = {}
    exec(compile(f"import torch, warnings\nfrom torch import nn\n{_CODE}", "<written>", "exec"), names)  # noqa: S102 - it is our own text
    sparse = eval(_constructor(layer), names)  # noqa: S307 - it is our own text
    bias = torch.zeros(layer.weight.shape[0]) if layer.has_bias else None
    sparse.load_state_dict({**_state(layer), **({} if bias is None else {"bias": bias})})
    x = torch.randn(rows, layer.weight.shape[1], generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    # Threads wait for each other, and what else the machine does is measured then.
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            dense = partial(functional.linear, x, layer.weight.detach(), bias)
            _, latency = measure([dense, partial(sparse, x)], seconds=_SECONDS)
    finally:
        torch.set_num_threads(threads)
    is_faster = latency.verdict is Verdict.FASTER and latency.speedup.low >= LEAST_SPEEDUP
    return latency.speedup.middle, is_faster
