"""An operation as Python writes it: an operator, a method, a function of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prunectl.channels.torch.code.forms import FORMS, LISTED, Write
from prunectl.channels.torch.code.text import call, short
from prunectl.channels.torch.seen import arguments, op
from prunectl.errors import WorkError

_SIGNS = dict(
    word.split("=", 1)
    for word in (
        *("add=+", "sub=-", "mul=*", "div=/", "matmul=@", "mm=@", "bmm=@", "pow=**", "eq===", "ne=!=", "gt=>", "lt=<"),
        *("ge=>=", "le=<=", "floordiv=//", "mod=%", "truediv=/", "bitwise_and=&", "bitwise_or=|"),
    )
)
_STARRED = frozenset({"view", "reshape", "permute", "expand", "repeat"})
_OF_VALUES = """transpose flatten unsqueeze squeeze contiguous mean sum amax amin softmax log_softmax chunk narrow
unbind index_select masked_fill unflatten t exp sqrt rsqrt abs neg clamp cumsum flip roll argmax std var norm clone
detach type_as expand_as prod max min tensor_split"""
_OF_NN = """relu relu6 gelu silu mish hardswish hardsigmoid hardtanh leaky_relu elu selu celu softplus linear conv1d
conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d avg_pool1d
avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d prelu pad group_norm pixel_shuffle glu
scaled_dot_product_attention channel_shuffle"""
_OF_TORCH = "cat stack where sigmoid tanh log sin cos erf maximum minimum square reciprocal"
_METHODS, _FUNCTIONS, _PLAIN = (frozenset(names.split()) for names in (_OF_VALUES, _OF_NN, _OF_TORCH))


def expression(node: torch.fx.Node, write: Write, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the right side of the statement for an operation."""
    name, said = op(node), arguments(node)
    own = FORMS.get(name)
    if own is not None and (found := own(node, said, write, shapes)):
        return found
    words, named = _arguments(node, write)
    if name in _SIGNS and _is_infix(said):
        return f" {_SIGNS[name]} ".join(words[:2])
    if name in _STARRED:
        sizes = next(value for value in list(said.values())[1:] if isinstance(value, list | tuple))
        return call(f"{words[0]}.{name}", map(write, sizes))
    if name in _METHODS:
        return call(f"{words[0]}.{name}", words[1:], named)
    if name in _FUNCTIONS:
        return _function(node, words, named)
    if name in _PLAIN:
        return call(f"torch.{name}", words, named)
    return _plainly(node, words, named)


def in_place(node: torch.fx.Node, write: Write) -> str:
    """Return an operation that changes what goes into it, under its own name."""
    words, named = _arguments(node, write)
    name = str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]
    if hasattr(torch.Tensor, name):
        return call(f"{words[0]}.{name}", words[1:], named)
    return _plainly(node, words, named)


def _function(node: torch.fx.Node, words: list[str], named: list[tuple[str, str]]) -> str:
    """Return a function of torch.nn, what is no value by its name."""
    schema = getattr(node.target, "_schema").arguments  # noqa: B009
    usual = {one.name: one.default_value for one in schema if one.has_default_value()}
    said = arguments(node)
    first = [
        place
        for place, one in enumerate(schema)
        if place < len(words) and (isinstance(said[one.name], torch.fx.Node) or one.name in _FIRST)
    ]
    kept = words[: max(first, default=-1) + 1]
    rest = [
        (one.name, word)
        for one, word in zip(schema[len(kept) :], words[len(kept) :], strict=False)
        if not _is_same(said[one.name], usual.get(one.name))
    ]
    if op(node) == "hardtanh" and dict(rest) == {"min_val": "0.0", "max_val": "6.0"}:
        return call("F.relu6", kept)
    return call(f"F.{op(node)}", kept, [*rest, *named])


def _plainly(node: torch.fx.Node, words: list[str], named: list[tuple[str, str]]) -> str:
    """Return an operation by the name that torch has for it inside."""
    namespace = str(getattr(node.target, "namespace", ""))
    if namespace != "aten":
        raise WorkError(f"the network calls {node.target}, which cannot be written with torch alone")
    return call(f"torch.ops.{node.target}", words, named)


def _arguments(node: torch.fx.Node, write: Write) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the arguments as code, without those that are as they are by default."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [write(one) for one in node.args], [(name, write(value)) for name, value in node.kwargs.items()]
    said = arguments(node)
    usual = {one.name: one.default_value for one in schema.arguments if one.has_default_value()}
    places = [one.name for one in schema.arguments if not one.kwarg_only]
    while places and places[-1] in usual and _is_same(said[places[-1]], usual[places[-1]]):
        places.pop()
    kept = [
        one.name for one in schema.arguments if one.kwarg_only and not _is_same(said[one.name], usual.get(one.name))
    ]
    words = [write(_shortened(name, said[name])) for name in places]
    return words, [(name, write(said[name])) for name in kept]


_FIRST = frozenset({"kernel_size", "output_size", "pad", "dim"})


def _shortened(name: str, value: Any) -> Any:
    is_single = name == "dim" and isinstance(value, list | tuple) and len(value) == 1
    return short(value) if name in LISTED or is_single else value


def _is_same(value: Any, usual: Any) -> bool:
    if isinstance(value, torch.fx.Node):
        return False
    alike = [list(one) if isinstance(one, list | tuple) else one for one in (value, usual)]
    return bool(alike[0] == alike[1]) or (isinstance(alike[0], list) and [short(alike[0])] == [alike[1]])


def _is_infix(said: dict[str, Any]) -> bool:
    return said.get("alpha", 1) == 1 and said.get("rounding_mode") is None
