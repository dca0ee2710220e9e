"""Operations that Python writes in a form of their own: slices, sizes, layers with other arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from prunectl.channels.torch.code.text import call, literal, short
from prunectl.channels.torch.seen import op, variant

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
    word = op(node).removeprefix("_").removeprefix("upsample_").rstrip("123d")
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
    if isinstance(said.get("dtype"), torch.dtype) and variant(node) in {"dtype", "default", "dtype_layout"}:
        return f"{write(said.get('self', said.get('input')))}.to({said['dtype']})"
    return ""


def _same(_: torch.fx.Node, said: dict[str, Any], write: Write, __: Any) -> str:
    return write(said["self"])


def _fresh(node: torch.fx.Node, said: dict[str, Any], write: Write, _: Any) -> str:
    words = [write(one) for one in node.args]
    named = [(name, write(said[name])) for name in ("dtype", "device") if said.get(name) is not None]
    return call(f"torch.{op(node)}", words, named)


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
