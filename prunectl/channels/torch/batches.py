"""Does a program take a batch of any size, as the module does that it was traced from?"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch

from prunectl.channels.proof import apart
from prunectl.channels.torch.inputs import random_like, with_batch
from prunectl.channels.torch.run import Network, outcome
from prunectl.channels.torch.seen import arguments, set_argument
from prunectl.channels.torch.tracing import Examples, quietly
from prunectl.training.torch.arrays import to_numpy
from prunectl.training.torch.outputs import leaves

_CLOSE = 1e-4
_SIZES = ("size", "shape")


def any_batch(
    module: torch.fx.GraphModule, original: torch.nn.Module, examples: Examples
) -> torch.fx.GraphModule | None:
    """Return a program that says for one at a time what the module says; None if it was traced for so many only.

    `len(x)` is a number like any other once it was traced: where a size is as long as the batch was, it may be that.
    Whether it is so is seen when it runs.
    """
    sizes = {len(one) for one in examples if one.ndim}
    if len(sizes) != 1 or sizes == {1} or not all(one.ndim for one in examples):
        return None
    generator = torch.Generator().manual_seed(0)
    single = [random_like(with_batch(one, 1), generator) for one in examples]
    try:
        with quietly():
            expected = leaves(original(*(one.clone() for one in single)))
    except Exception:  # noqa: BLE001 - it is the user's code
        return None
    (size,) = sizes
    return next((one for one in (module, _open(module, size)) if _says(one, single, expected)), None)


def _says(module: torch.fx.GraphModule, inputs: Iterable[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    try:
        found = outcome(Network(module), inputs, lambda *_: None)
        return all(apart(to_numpy(one), to_numpy(other)) <= _CLOSE for one, other in zip(found, expected, strict=True))
    except Exception:  # noqa: BLE001 - PyTorch raises what it likes
        return False


def _open(module: torch.fx.GraphModule, size: int) -> torch.fx.GraphModule:
    """Return a program with the size of the batch measured wherever a shape begins with it."""
    with quietly():
        graph = copy.deepcopy(module.graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        measured = graph.call_function(torch.ops.aten.sym_size.int, (inputs[0], 0))
    for node in graph.nodes:
        for name in _SIZES if node.op == "call_function" else ():
            said = arguments(node).get(name)
            if isinstance(said, list | tuple) and said and said[0] == size and type(said[0]) is int:
                set_argument(node, name, [measured, *said[1:]])
    return torch.fx.GraphModule(module, graph)
