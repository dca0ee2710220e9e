"""Operations of PyTorch that are layers of several steps: attention, gates, recurrent layers."""

from __future__ import annotations

import torch

from prunectl.channels.graph import OpKind, OpNode
from prunectl.channels.torch.fx import OpContext, op_name

Lowering = tuple[OpNode, ...]
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_STATES = {"lstm": 2, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}


def scaled_dot_product(seen: OpContext) -> Lowering:
    """Read an attention: keys turned, multiplied, a softmax, multiplied."""
    query, key, value = (seen.name(name) for name in ("query", "key", "value"))
    if seen.arg("enable_gqa", default=False) or len({len(seen.shapes[name]) for name in (query, key, value)}) > 1:
        return ()
    rank = len(seen.shapes[query])
    order = (*range(rank - 2), rank - 1, rank - 2)
    turned = seen.between("turned", tuple(seen.shapes[key][axis] for axis in order))
    table = (*seen.shapes[query][:-1], seen.shapes[key][-2])
    alike, weighed = seen.between("alike", table), seen.between("weighed", table)
    found = [
        seen.made(OpKind.TRANSPOSE, (key,), (turned,), order=order),
        seen.made(OpKind.PRODUCT, (query, turned), (alike,)),
    ]
    if mask := seen.name("attn_mask"):
        masked = seen.between("masked", table)
        found.append(seen.made(OpKind.EACH, (alike, mask), (masked,)))
        alike = masked
    found.append(seen.made(OpKind.STRETCH, (alike,), (weighed,), axes=(rank - 1,)))
    return (*found, seen.made(OpKind.PRODUCT, (weighed, value)))


def glu(seen: OpContext) -> Lowering:
    """Read two halves, of which one opens or closes the other."""
    before = seen.shapes[seen.tensors[0]]
    axis = seen.arg("dim", -1) % len(before)
    halves = [seen.between(half, seen.result) for half in ("half", "gate")]
    sizes = (before[axis] // 2,) * 2
    return (
        seen.made(OpKind.SPLIT, seen.tensors[:1], halves, axis=axis, sizes=sizes),
        seen.made(OpKind.EACH, halves),
    )


def recurrent(seen: OpContext) -> Lowering:
    """Read layers one on the other, each in one direction or in both; all have as many units."""
    name, arguments = op_name(seen.node), seen.arguments
    if "batch_sizes" in arguments or not isinstance(arguments.get("params"), list | tuple):
        return ()
    has_biases, directions = seen.arg("has_biases"), 1 + bool(seen.arg("bidirectional"))
    weights = [one.name for one in arguments["params"]]
    each = 4 if has_biases else 2
    layers = seen.arg("num_layers")
    if len(weights) != layers * directions * each or not all(one in seen.views for one in weights):
        return ()
    units = seen.shapes[weights[1]][-1]
    data = seen.name("input")
    states: list[str] = []
    found: list[OpNode] = []
    begun = _begun(seen, name)
    for layer in range(layers):
        whole = (*seen.shapes[data][:-1], units)
        sides = []
        for side in range(directions):
            at = (layer * directions + side) * each
            kernel, inner, *biases = weights[at : at + each]
            out = seen.between(f"out{layer}.{side}", whole)
            state = seen.between(f"state{layer}.{side}", (1, whole[1 - seen.arg("batch_first")], units))
            inputs = (data, kernel, inner, *(biases or [""]), *begun)
            found.append(seen.made(OpKind.RECURRENT, inputs, (out, state), units=units, gates=_GATES[name]))
            sides.append(out)
            states.append(state)
        data = seen.between(f"both{layer}", (*whole[:-1], units * directions))
        found.append(seen.made(OpKind.CONCAT, sides, (data,), axis=len(whole) - 1))
    outputs = seen.outputs
    found.append(seen.made(OpKind.EACH, (data,), outputs[:1]))
    # All layers have as many units, so that the same of each go.
    stacked = seen.between("states", (len(states), *seen.shapes[states[0]][1:]))
    found.append(seen.made(OpKind.CONCAT, states, (stacked,), axis=0))
    return (*found, *(seen.made(OpKind.EACH, (stacked,), (output,)) for output in outputs[1:] if output in seen.shapes))


def _begun(seen: OpContext, name: str) -> list[str]:
    """Return the first states, unless they are zeros, of which there are as many as units."""
    states = seen.arguments["hx"]
    states = states if isinstance(states, list | tuple) else [states]
    if len(states) != _STATES[name]:
        raise LookupError(name)
    return [one.name for one in states if not is_zeros(one)]


def is_zeros(node: torch.fx.Node) -> bool:
    """Whether a value is nothing but zeros."""
    return op_name(node) in {"zeros", "new_zeros"}
