"""Python expressions for ATen operations: an operator, a method, or a function of torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from prunectl.channels.graph import Shapes
from prunectl.channels.torch.fx import arguments, op_name, overload_name
from prunectl.errors import WorkError


def literal(value: Any) -> str:
    """A plain Python value, or a dtype, layout, memory format or device of torch, as code."""
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
    raise WorkError(f"the network contains a {type(value).__name__}, which cannot be written as code")


def _letter(letter: str) -> str:
    """A character of a string literal, escaped so that it is safe in single and triple double quotes.

    JSON is used only for ASCII: it writes a character beyond the BMP as two surrogates, which Python does not join.
    """
    if letter.isascii():
        return json.dumps(letter)[1:-1]
    return letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode()


def sequence(parts: Iterable[str]) -> str:
    """The code of a tuple, from the code of its items."""
    items = list(parts)
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


def collapse_equal(numbers: Any) -> Any:
    """A single number in place of a list of equal numbers, which layers accept too."""
    if isinstance(numbers, list | tuple) and numbers and len(set(map(str, numbers))) == 1:
        return numbers[0]
    return numbers


def call(function: str, args: Iterable[str] = (), named: Iterable[tuple[str, str]] = ()) -> str:
    """The code of a call, from the code of its arguments."""
    return f"{function}({', '.join([*args, *(f'{name}={value}' for name, value in named)])})"


def numbers(tensor: torch.Tensor) -> str:
    """The code of a small tensor, with all its values."""
    return f"torch.tensor({_listed(tensor.tolist())}, dtype={tensor.dtype})"


def _listed(value: Any) -> str:
    return f"[{', '.join(map(_listed, value))}]" if isinstance(value, list) else literal(value)


Write = Callable[[Any], str]
"""From an argument, a constant or a node of the graph, to code."""
Form = Callable[[torch.fx.Node, dict[str, Any], Write, Shapes], str]
COLLAPSIBLE = frozenset({"kernel_size", "stride", "padding", "dilation", "output_size", "output_padding"})
"""The arguments that may be a single number in place of a list of equal numbers."""
_END = (1 << 63) - 1
_SIZES = """upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_linear1d
upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"""


def _slice(_: torch.fx.Node, args: dict[str, Any], write: Write, shapes: Shapes) -> str:
    axis = args["dim"] % len(shapes[args["self"].name])
    start = "" if args["start"] in {None, 0} else write(args["start"])
    end = "" if args["end"] is None or args["end"] == _END else write(args["end"])
    step = "" if args["step"] == 1 else f":{write(args['step'])}"
    return f"{write(args['self'])}[{':, ' * axis}{start}:{end}{step}]"


def _select(_: torch.fx.Node, args: dict[str, Any], write: Write, shapes: Shapes) -> str:
    axis = args["dim"] % len(shapes[args["self"].name])
    return f"{write(args['self'])}[{':, ' * axis}{write(args['index'])}]"


def _index(_: torch.fx.Node, args: dict[str, Any], write: Write, __: Any) -> str:
    indices = [":" if index is None else write(index) for index in args["indices"]]
    return f"{write(args['self'])}[{', '.join(indices)}]"


def _split(_: torch.fx.Node, args: dict[str, Any], write: Write, __: Any) -> str:
    sizes = args.get("split_sizes", args.get("split_size"))
    return call(f"{write(args['self'])}.split", [write(sizes), write(args["dim"])])


def _dropout(_: torch.fx.Node, args: dict[str, Any], write: Write, __: Any) -> str:
    return f"F.dropout({write(args.get('input', args.get('self')))}, {args['p']}, self.training)"


def _layer_norm(_: torch.fx.Node, args: dict[str, Any], write: Write, __: Any) -> str:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    return call("F.layer_norm", [write(args[name]) for name in names])


def _batch_norm(_: torch.fx.Node, args: dict[str, Any], write: Write, __: Any) -> str:
    names = ("input", "running_mean", "running_var", "weight", "bias")
    named = [(name, write(args[name])) for name in ("training", "momentum", "eps")]
    return call("F.batch_norm", [write(args[name]) for name in names], named)


def _convolution(_: torch.fx.Node, args: dict[str, Any], write: Write, shapes: Shapes) -> str:
    names = ["input", "weight", "bias", "stride", "padding"]
    names += ["output_padding", "groups", "dilation"] if args["transposed"] else ["dilation", "groups"]
    function = "conv_transpose" if args["transposed"] else "conv"
    rank = len(shapes[args["weight"].name]) - 2
    return call(
        f"F.{function}{rank}d",
        [write(collapse_equal(args[name]) if name in COLLAPSIBLE else args[name]) for name in names],
    )


def _interpolate(node: torch.fx.Node, args: dict[str, Any], write: Write, _: Any) -> str:
    method = op_name(node).removeprefix("_").removeprefix("upsample_").rstrip("123d")
    mode = {"nearest_exact": "nearest-exact"}.get(method, method)
    named = []
    if args["output_size"] is not None:
        named.append(("size", write(args["output_size"])))
    elif args.get("scale_factors") is not None:
        named.append(("scale_factor", write(collapse_equal(args["scale_factors"]))))
    named.append(("mode", literal(mode)))
    if "align_corners" in args:
        named.append(("align_corners", write(args["align_corners"])))
    first = args.get("input", args.get("self"))
    # Scales beside a size are left out: the size was computed from them, and they matter only if it was rounded.
    return call("F.interpolate", [write(first)], named)


def _pad(_: torch.fx.Node, args: dict[str, Any], write: Write, __: Any) -> str:
    return call("F.pad", [write(args["self"]), write(args["pad"])], [("value", write(args["value"]))])


def _to(node: torch.fx.Node, args: dict[str, Any], write: Write, _: Any) -> str:
    if isinstance(args.get("dtype"), torch.dtype) and overload_name(node) in {"dtype", "default", "dtype_layout"}:
        return f"{write(args.get('self', args.get('input')))}.to({args['dtype']})"
    return ""


def _factory(node: torch.fx.Node, args: dict[str, Any], write: Write, _: Any) -> str:
    positional = [write(value) for value in node.args]
    named = [(name, write(args[name])) for name in ("dtype", "device") if args.get(name) is not None]
    return call(f"torch.{op_name(node)}", positional, named)


SPECIAL_FORMS: Mapping[str, Form] = {
    "sym_size": lambda _, args, write, __: f"{write(args['self'])}.size({args['dim']})",
    "slice": _slice,
    "select": _select,
    "index": _index,
    "getitem": lambda node, _, write, __: f"{write(node.args[0])}[{write(node.args[1])}]",
    "split": _split,
    "split_with_sizes": _split,
    "dropout": _dropout,
    "embedding": lambda _, args, write, __: f"F.embedding({write(args['indices'])}, {write(args['weight'])})",
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "convolution": _convolution,
    "constant_pad_nd": _pad,
    "to": _to,
    "_to_copy": _to,
    "alias": lambda _, args, write, __: write(args["self"]),
    "lift_fresh_copy": lambda _, args, write, __: f"{write(args['self'])}.clone()",
    **dict.fromkeys(("zeros", "ones", "full", "arange", "empty"), _factory),
    **dict.fromkeys(_SIZES.split(), _interpolate),
}


_OPERATORS = dict(
    word.split("=", 1)
    for word in (
        *("add=+", "sub=-", "mul=*", "div=/", "matmul=@", "mm=@", "bmm=@", "pow=**", "eq===", "ne=!=", "gt=>", "lt=<"),
        *("ge=>=", "le=<=", "floordiv=//", "mod=%", "truediv=/", "bitwise_and=&", "bitwise_or=|"),
    )
)
_UNPACKED = frozenset({"view", "reshape", "permute", "expand", "repeat"})
_METHOD_NAMES = """transpose flatten unsqueeze squeeze contiguous mean sum amax amin softmax log_softmax chunk narrow
unbind index_select masked_fill unflatten t exp sqrt rsqrt abs neg clamp cumsum flip roll argmax std var norm clone
detach type_as expand_as prod max min tensor_split"""
_NN_NAMES = """relu relu6 gelu silu mish hardswish hardsigmoid hardtanh leaky_relu elu selu celu softplus linear conv1d
conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d avg_pool1d
avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d prelu pad group_norm
pixel_shuffle glu scaled_dot_product_attention channel_shuffle"""
_TORCH_NAMES = "cat stack where sigmoid tanh log sin cos erf maximum minimum square reciprocal"
_METHODS, _FUNCTIONS, _TORCH = (frozenset(names.split()) for names in (_METHOD_NAMES, _NN_NAMES, _TORCH_NAMES))


def expression(node: torch.fx.Node, write: Write, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The code of an operation: the right side of its statement."""
    name, args = op_name(node), arguments(node)
    form = SPECIAL_FORMS.get(name)
    if form is not None and (code := form(node, args, write, shapes)):
        return code
    positional, named = _arguments(node, write)
    if name in _OPERATORS and args.get("alpha", 1) == 1 and args.get("rounding_mode") is None:
        return f" {_OPERATORS[name]} ".join(positional[:2])
    if name in _UNPACKED:
        sizes = next(value for value in list(args.values())[1:] if isinstance(value, list | tuple))
        return call(f"{positional[0]}.{name}", map(write, sizes))
    if name in _METHODS:
        return call(f"{positional[0]}.{name}", positional[1:], named)
    if name in _FUNCTIONS:
        return _function(node, positional, named)
    if name in _TORCH:
        return call(f"torch.{name}", positional, named)
    return _raw_operator(node, positional, named)


def in_place(node: torch.fx.Node, write: Write) -> str:
    """The code of an in-place operation, with its underscore."""
    positional, named = _arguments(node, write)
    name = str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]
    if hasattr(torch.Tensor, name):
        return call(f"{positional[0]}.{name}", positional[1:], named)
    return _raw_operator(node, positional, named)


def _function(node: torch.fx.Node, positional: list[str], named: list[tuple[str, str]]) -> str:
    """A call of a function of torch.nn.functional, with its trailing constant arguments as keywords."""
    schema = getattr(node.target, "_schema").arguments  # noqa: B009
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    args = arguments(node)
    required = [
        position
        for position, argument in enumerate(schema)
        if position < len(positional) and (isinstance(args[argument.name], torch.fx.Node) or argument.name in _FIRST)
    ]
    kept = positional[: max(required, default=-1) + 1]
    rest = [
        (argument.name, code)
        for argument, code in zip(schema[len(kept) :], positional[len(kept) :], strict=False)
        if not _is_default(args[argument.name], defaults.get(argument.name))
    ]
    if op_name(node) == "hardtanh" and dict(rest) == {"min_val": "0.0", "max_val": "6.0"}:
        return call("F.relu6", kept)
    return call(f"F.{op_name(node)}", kept, [*rest, *named])


def _raw_operator(node: torch.fx.Node, positional: list[str], named: list[tuple[str, str]]) -> str:
    """A call of an ATen operation through torch.ops."""
    namespace = str(getattr(node.target, "namespace", ""))
    if namespace != "aten":
        raise WorkError(f"the network calls {node.target}, which cannot be written with torch alone")
    return call(f"torch.ops.{node.target}", positional, named)


def _arguments(node: torch.fx.Node, write: Write) -> tuple[list[str], list[tuple[str, str]]]:
    """The code of positional and keyword arguments, without those that equal their defaults."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [write(argument) for argument in node.args], [
            (name, write(value)) for name, value in node.kwargs.items()
        ]
    args = arguments(node)
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    while names and names[-1] in defaults and _is_default(args[names[-1]], defaults[names[-1]]):
        names.pop()
    kept = [
        argument.name
        for argument in schema.arguments
        if argument.kwarg_only and not _is_default(args[argument.name], defaults.get(argument.name))
    ]
    positional = [write(_collapsed(name, args[name])) for name in names]
    return positional, [(name, write(args[name])) for name in kept]


_FIRST = frozenset({"kernel_size", "output_size", "pad", "dim"})


def _collapsed(name: str, value: Any) -> Any:
    is_single = name == "dim" and isinstance(value, list | tuple) and len(value) == 1
    return collapse_equal(value) if name in COLLAPSIBLE or is_single else value


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, torch.fx.Node):
        return False
    pair = [list(item) if isinstance(item, list | tuple) else item for item in (value, default)]
    return bool(pair[0] == pair[1]) or (isinstance(pair[0], list) and [collapse_equal(pair[0])] == [pair[1]])
