"""Finds the torch.nn layer that does the same as an operation with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunectl.channels.graph import Shape, Shapes
from prunectl.channels.torch.attention import is_zeros
from prunectl.channels.torch.code.expressions import call, collapse_equal, literal
from prunectl.channels.torch.fx import arguments, op_name
from prunectl.formats.torch.usage import RECURRENT

_NO_MOMENTUM = 0.1


@dataclass(frozen=True, slots=True)
class LayerCode:
    """A layer of the generated class, and a call of it."""

    path: str
    emit: str
    """The constructor call, such as nn.Linear(8, 4)."""
    inputs: tuple[torch.fx.Node, ...]


@dataclass(frozen=True, slots=True)
class StateShapes:
    """The shapes of all tensors in a state dict."""

    shapes: Shapes
    shared: Mapping[str, tuple[str, ...]]
    """All names of a weight that has several."""

    def under(self, path: str) -> dict[str, Shape]:
        """The shapes of the tensors in a module, by their names without its path."""
        return {name[len(path) + 1 :]: shape for name, shape in self.shapes.items() if name.startswith(f"{path}.")}

    def names(self, node: Any) -> tuple[str, ...]:
        """All names of the weight that a node reads; none if the node is not a weight."""
        if not isinstance(node, torch.fx.Node) or node.op != "get_attr":
            return ()
        return self.shared.get(str(node.target), (str(node.target),))


@dataclass(frozen=True, slots=True)
class _LayerRow:
    weights: Mapping[str, str]
    """The attributes of the layer that hold the weights, by argument of the operation."""
    emit: Callable[[dict[str, Any], Shapes, int], str]
    """From arguments, shapes of the weights and rank of the data to the constructor call; empty if impossible."""
    data: str = "input"
    """The argument of the operation that is the input of the layer."""
    also_holds: frozenset[str] = frozenset()
    """Other tensors of the layer, which the operation does not read."""


def as_layer(node: torch.fx.Node, state: StateShapes, rank: int) -> LayerCode | None:
    """The layer for an operation, if a module holds exactly the weights of the operation; else None."""
    kind = _LAYER_ROWS.get(op_name(node))
    if kind is None:
        return None
    args = arguments(node)
    if op_name(node) in RECURRENT:
        return _recurrent(node, state)
    first_argument = next(iter(kind.weights))
    for name in state.names(args.get(first_argument)):
        path, _, last = name.rpartition(".")
        if not path or last != kind.weights[first_argument]:
            continue
        expected = {
            attribute: args[argument] for argument, attribute in kind.weights.items() if args.get(argument) is not None
        }
        names_in_module = state.under(path)
        is_complete = names_in_module.keys() - kind.also_holds == expected.keys()
        if is_complete and all(f"{path}.{attribute}" in state.names(value) for attribute, value in expected.items()):
            constructor = kind.emit(args, names_in_module, rank)
            return LayerCode(path, constructor, (args[kind.data],)) if constructor else None
    return None


def _convolution(args: dict[str, Any], shapes: Shapes, _: int) -> str:
    kernel = shapes["weight"]
    groups = args["groups"]
    options = {
        "stride": collapse_equal(args["stride"]),
        "padding": collapse_equal(args["padding"]),
        "dilation": collapse_equal(args["dilation"]),
    }
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "bias": True, "output_padding": 0}
    is_transposed = bool(args.get("transposed")) or ("output_padding" in args and "transposed" not in args)
    inputs, outputs = (kernel[0], kernel[1] * groups) if is_transposed else (kernel[1] * groups, kernel[0])
    if is_transposed:
        options["output_padding"] = collapse_equal(args["output_padding"])
    options |= {"groups": groups, "bias": "bias" in shapes}
    layer = f"nn.Conv{'Transpose' if is_transposed else ''}{len(kernel) - 2}d"
    return _call(layer, (inputs, outputs, collapse_equal(kernel[2:])), options, defaults)


def _linear(_: dict[str, Any], shapes: Shapes, __: int) -> str:
    outputs, inputs = shapes["weight"]
    return _call("nn.Linear", (inputs, outputs), {"bias": "bias" in shapes}, {"bias": True})


def _batch_norm(args: dict[str, Any], shapes: Shapes, rank: int) -> str:
    if "running_mean" not in shapes or args.get("training") or ("weight" in shapes) != ("bias" in shapes):
        return ""
    dimensions = {2: 1, 3: 1, 4: 2, 5: 3}.get(rank)
    options = {"eps": args["eps"], "momentum": args["momentum"], "affine": "weight" in shapes}
    defaults = {"eps": 1e-5, "momentum": _NO_MOMENTUM, "affine": True}
    return _call(f"nn.BatchNorm{dimensions}d", shapes["running_mean"], options, defaults) if dimensions else ""


def _layer_norm(args: dict[str, Any], shapes: Shapes, _: int) -> str:
    shape = tuple(args["normalized_shape"])
    options = {"eps": args["eps"], "bias": "bias" in shapes}
    return _call("nn.LayerNorm", (shape[0] if len(shape) == 1 else shape,), options, {"eps": 1e-5, "bias": True})


def _group_norm(args: dict[str, Any], shapes: Shapes, _: int) -> str:
    if "bias" not in shapes:
        return ""
    return _call("nn.GroupNorm", (args["num_groups"], *shapes["weight"]), {"eps": args["eps"]}, {"eps": 1e-5})


def _embedding(args: dict[str, Any], shapes: Shapes, _: int) -> str:
    padding = args["padding_idx"]
    return _call("nn.Embedding", shapes["weight"], {"padding_idx": padding}, {"padding_idx": -1})


def _prelu(_: dict[str, Any], shapes: Shapes, __: int) -> str:
    return _call("nn.PReLU", shapes["weight"], {}, {})


def _recurrent(node: torch.fx.Node, state: StateShapes) -> LayerCode | None:
    """The recurrent layer for an operation whose initial states are zeros, as those of the layer are by default."""
    args, name = arguments(node), op_name(node)
    params, states = args.get("params"), args.get("hx")
    states = states if isinstance(states, list | tuple) else [states]
    if not isinstance(params, list | tuple) or "batch_sizes" in args:
        return None
    if not all(isinstance(state_node, torch.fx.Node) and is_zeros(state_node) for state_node in states):
        return None
    paths = {weight_name.rpartition(".")[0] for weight_name in state.names(params[0])}
    for path in sorted(filter(None, paths)):
        shapes = state.under(path)
        names = _recurrent_weight_names(args)
        if shapes.keys() != set(names) or not all(
            f"{path}.{attribute}" in state.names(param) for attribute, param in zip(names, params, strict=False)
        ):
            continue
        gates = {"lstm": 4, "gru": 3}.get(name, 1)
        units = shapes["weight_hh_l0"]
        if units[1] * gates != units[0]:
            return None
        options = {
            "num_layers": args["num_layers"],
            "nonlinearity": name.removeprefix("rnn_"),
            "bias": args["has_biases"],
            "batch_first": args["batch_first"],
            "dropout": args["dropout"],
            "bidirectional": args["bidirectional"],
        }
        defaults = {
            "num_layers": 1,
            "nonlinearity": options["nonlinearity"] if name != "rnn_relu" else "tanh",
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
        }
        layer = {"lstm": "nn.LSTM", "gru": "nn.GRU"}.get(name, "nn.RNN")
        return LayerCode(path, _call(layer, (shapes["weight_ih_l0"][1], units[1]), options, defaults), (args["input"],))
    return None


def _recurrent_weight_names(args: dict[str, Any]) -> list[str]:
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if args["has_biases"] else ("weight_ih", "weight_hh")
    ends = ("", "_reverse") if args["bidirectional"] else ("",)
    return [f"{part}_l{layer}{end}" for layer in range(args["num_layers"]) for end in ends for part in parts]


def _call(layer: str, positional: Sequence[Any], options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    keywords = ((name, literal(value)) for name, value in options.items() if value != defaults[name])
    return call(layer, map(literal, positional), keywords)


_AFFINE = {"weight": "weight", "bias": "bias"}
_NORM = _AFFINE | {"running_mean": "running_mean", "running_var": "running_var"}
_CONVOLUTIONS = "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d"
_LAYER_ROWS: Mapping[str, _LayerRow] = {
    **{name: _LayerRow(_AFFINE, _convolution) for name in _CONVOLUTIONS.split()},
    "linear": _LayerRow(_AFFINE, _linear),
    "batch_norm": _LayerRow(_NORM, _batch_norm, also_holds=frozenset({"num_batches_tracked"})),
    "layer_norm": _LayerRow(_AFFINE, _layer_norm),
    "group_norm": _LayerRow(_AFFINE, _group_norm),
    "embedding": _LayerRow({"weight": "weight"}, _embedding, data="indices"),
    "prelu": _LayerRow({"weight": "weight"}, _prelu, data="self"),
    **{name: _LayerRow({}, _prelu) for name in RECURRENT},
}
