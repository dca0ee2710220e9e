"""An operation as Python writes it: an operator, a method, a function of torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from prunectl.channels.torch.fx import arguments, op_name, overload_name
from prunectl.errors import WorkError


def literal(value: Any) -> str:
    """Return a value of plain Python, or a word of torch, as code."""
    if isinstance(value, str):
        return f'"{"".join(map(_letter, value))}"'
    if isinstance(value, bool | int) or value is None:
        return repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, list | tuple):
        return sequence(map(literal, value))
    raise WorkError(f"the network holds a {type(value).__name__}, which cannot be written as code")


def _letter(letter: str) -> str:
    """Return a letter as it stands in a text in double quotes, also in one of three: no quote is ever bare.

    JSON writes what lies beyond the BMP as two halves, which are two other characters in Python.
    """
    if letter.isascii():
        return json.dumps(letter)[1:-1]
    return letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode()


def sequence(parts: Iterable[str]) -> str:
    """Return a tuple of what is code already."""
    words = list(parts)
    return f"({words[0]},)" if len(words) == 1 else f"({', '.join(words)})"


def short(numbers: Any) -> Any:
    """Return one number for several that are equal, as layers take them."""
    if isinstance(numbers, list | tuple) and numbers and len(set(map(str, numbers))) == 1:
        return numbers[0]
    return numbers


def call(function: str, words: Iterable[str] = (), named: Iterable[tuple[str, str]] = ()) -> str:
    """Return a call."""
    return f"{function}({', '.join([*words, *(f'{name}={value}' for name, value in named)])})"


def numbers(tensor: torch.Tensor) -> str:
    """Return a small tensor as code."""
    return f"torch.tensor({_listed(tensor.tolist())}, dtype={tensor.dtype})"


def _listed(value: Any) -> str:
    return f"[{', '.join(map(_listed, value))}]" if isinstance(value, list) else literal(value)


Write = Callable[[Any], str]
"""From an argument, which may be a value of the network, to code."""
Shapes = Mapping[str, tuple[int, ...]]
Form = Callable[[torch.fx.Node, dict[str, Any], Write, Shapes], str]
LISTED = frozenset({"kernel_size", "stride", "padding", "dilation", "output_size", "output_padding"})
"""Arguments that say one number for several."""
_END = (1 << 63) - 1
_SIZES = """upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_linear1d
upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"""


def _size(_: torch.fx.Node, said: dict[str, Any], write: Write, __: Any) -> str:
    return f"{write(said['self'])}.size({said['dim']})"


def _slice(_: torch.fx.Node, said: dict[str, Any], write: Write, shapes: Shapes) -> str:
    axis = said["dim"] % len(shapes[said["self"].name])
    start = "" if said["start"] in {None, 0} else write(said["start"])
    end = "" if said["end"] is None or said["end"] == _END else write(said["end"])
    step = "" if said["step"] == 1 else f":{write(said['step'])}"
    return f"{write(said['self'])}[{':, ' * axis}{start}:{end}{step}]"


def _select(_: torch.fx.Node, said: dict[str, Any], write: Write, shapes: Shapes) -> str:
    axis = said["dim"] % len(shapes[said["self"].name])
    return f"{write(said['self'])}[{':, ' * axis}{write(said['index'])}]"


def _index(_: torch.fx.Node, said: dict[str, Any], write: Write, __: Any) -> str:
    words = [":" if one is None else write(one) for one in said["indices"]]
    return f"{write(said['self'])}[{', '.join(words)}]"


def _item(node: torch.fx.Node, _: Any, write: Write, __: Any) -> str:
    return f"{write(node.args[0])}[{write(node.args[1])}]"


def _split(_: torch.fx.Node, said: dict[str, Any], write: Write, __: Any) -> str:
    sizes = said.get("split_sizes", said.get("split_size"))
    return call(f"{write(said['self'])}.split", [write(sizes), write(said["dim"])])


def _dropout(_: torch.fx.Node, said: dict[str, Any], write: Write, __: Any) -> str:
    return f"F.dropout({write(said.get('input', said.get('self')))}, {said['p']}, self.training)"


def _embedding(_: torch.fx.Node, said: dict[str, Any], write: Write, __: Any) -> str:
    return f"F.embedding({write(said['indices'])}, {write(said['weight'])})"


def _layer_norm(_: torch.fx.Node, said: dict[str, Any], write: Write, __: Any) -> str:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    return call("F.layer_norm", [write(said[name]) for name in names])


def _batch_norm(_: torch.fx.Node, said: dict[str, Any], write: Write, __: Any) -> str:
    names = ("input", "running_mean", "running_var", "weight", "bias")
    named = [(name, write(said[name])) for name in ("training", "momentum", "eps")]
    return call("F.batch_norm", [write(said[name]) for name in names], named)


def _convolution(_: torch.fx.Node, said: dict[str, Any], write: Write, shapes: Shapes) -> str:
    places = ["input", "weight", "bias", "stride", "padding"]
    places += ["output_padding", "groups", "dilation"] if said["transposed"] else ["dilation", "groups"]
    word = "conv_transpose" if said["transposed"] else "conv"
    axes = len(shapes[said["weight"].name]) - 2
    return call(f"F.{word}{axes}d", [write(short(said[name]) if name in LISTED else said[name]) for name in places])


def _interpolate(node: torch.fx.Node, said: dict[str, Any], write: Write, _: Any) -> str:
    word = op_name(node).removeprefix("_").removeprefix("upsample_").rstrip("123d")
    mode = {"nearest_exact": "nearest-exact"}.get(word, word)
    named = []
    if said["output_size"] is not None:
        named.append(("size", write(said["output_size"])))
    elif said.get("scale_factors") is not None:
        named.append(("scale_factor", write(short(said["scale_factors"]))))
    named.append(("mode", literal(mode)))
    if "align_corners" in said:
        named.append(("align_corners", write(said["align_corners"])))
    first = said.get("input", said.get("self"))
    # Scales beside a size are only how the size came about, unless they were rounded.
    return call("F.interpolate", [write(first)], named)


def _edges(_: torch.fx.Node, said: dict[str, Any], write: Write, __: Any) -> str:
    return call("F.pad", [write(said["self"]), write(said["pad"])], [("value", write(said["value"]))])


def _to(node: torch.fx.Node, said: dict[str, Any], write: Write, _: Any) -> str:
    if isinstance(said.get("dtype"), torch.dtype) and overload_name(node) in {"dtype", "default", "dtype_layout"}:
        return f"{write(said.get('self', said.get('input')))}.to({said['dtype']})"
    return ""


def _same(_: torch.fx.Node, said: dict[str, Any], write: Write, __: Any) -> str:
    return write(said["self"])


def _fresh(node: torch.fx.Node, said: dict[str, Any], write: Write, _: Any) -> str:
    words = [write(one) for one in node.args]
    named = [(name, write(said[name])) for name in ("dtype", "device") if said.get(name) is not None]
    return call(f"torch.{op_name(node)}", words, named)


FORMS: Mapping[str, Form] = {
    "sym_size": _size,
    "slice": _slice,
    "select": _select,
    "index": _index,
    "getitem": _item,
    "split": _split,
    "split_with_sizes": _split,
    "dropout": _dropout,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "convolution": _convolution,
    "constant_pad_nd": _edges,
    "to": _to,
    "_to_copy": _to,
    "alias": _same,
    "lift_fresh_copy": lambda _, said, write, __: f"{write(said['self'])}.clone()",
    **dict.fromkeys(("zeros", "ones", "full", "arange", "empty"), _fresh),
    **dict.fromkeys(_SIZES.split(), _interpolate),
}


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
    name, said = op_name(node), arguments(node)
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
    if op_name(node) == "hardtanh" and dict(rest) == {"min_val": "0.0", "max_val": "6.0"}:
        return call("F.relu6", kept)
    return call(f"F.{op_name(node)}", kept, [*rest, *named])


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
