"""Attention of Keras with several heads."""

from __future__ import annotations

from collections.abc import Sequence

from prunectl.channels.graph import Kind
from prunectl.channels.keras.called import Called
from prunectl.formats.keras.shapes import UnknownShapeError

WORDS = frozenset({"query", "value", "key", "attention_mask", "query_mask", "value_mask", "key_mask"})
_THREE = ("query", "value", "key")
_REFUSED = ("use_gate", "flash_attention", "sliding_window")
"""Settings that put more between the projections than heads that do not know of one another."""
_KERNEL = 3


def in_order(inputs: Sequence[str], words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what an attention takes with query, value and key in front, in this order."""
    count = len(inputs) - len(words)
    named = dict(zip(words, inputs[count:], strict=True))
    if len(named) != len(words):
        return tuple(inputs), tuple(words)
    given = {**dict(zip(_THREE, inputs[:count], strict=False)), **named}
    front = [given.pop(word) for word in _THREE if word in given]
    return (*front, *inputs[len(_THREE) : count], *given.values()), tuple(given)


def attended(call: Called) -> str:
    """Projections, heads, and a projection of what they found."""
    count = len(call.inputs) - len(call.words)
    if count not in {2, 3} or any(call.step.config.get(key) for key in _REFUSED):
        raise UnknownShapeError
    query, value, key = (*call.inputs[:count], call.inputs[1])[:3]
    shapes = {one: call.leaves[f"{one}/kernel"].shape for one in ("query", "key", "value", "output")}
    heads, out = call.step.number("num_heads"), shapes["output"][-1]
    for one, data in (("query", query), ("key", key), ("value", value)):
        if shapes[one][:2] != (call.shape(data)[-1], heads) or len(shapes[one]) != _KERNEL:
            raise UnknownShapeError
    if shapes["output"] != (heads, shapes["value"][-1], out) or shapes["query"][-1] != shapes["key"][-1]:
        raise UnknownShapeError
    order = ("query", "value", "key", "output")
    kernels = [call.weight(f"{one}/kernel", range(_KERNEL)) for one in order]
    biases = [call.weight(f"{one}/bias", (0,) if one == "output" else (0, 1)) for one in order]
    masks = call.inputs[count:]
    return call.does(Kind.HEADS, (query, value, key, *kernels, *biases, *masks), (*call.shape(query)[:-1], out))
