"""Which layer of torch does what an operation does, with the weights that it has?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunectl.channels.torch.code.expressions import call, literal, short
from prunectl.channels.torch.fx import arguments, op_name

Shape = tuple[int, ...]
_NO_MOMENTUM = 0.1


@dataclass(frozen=True, slots=True)
class LayerCode:
    """A layer: how it is made, and what it is called with."""

    path: str
    made: str
    inputs: tuple[torch.fx.Node, ...]


@dataclass(frozen=True, slots=True)
class StateShapes:
    """What a file has, by the names in the class."""

    shapes: Mapping[str, Shape]
    shared: Mapping[str, tuple[str, ...]]
    """All names of a weight that has several."""

    def under(self, path: str) -> dict[str, Shape]:
        """Return what lies in a module, by its name there."""
        return {name[len(path) + 1 :]: shape for name, shape in self.shapes.items() if name.startswith(f"{path}.")}

    def names(self, node: Any) -> tuple[str, ...]:
        """Return all names of a weight that goes into an operation; none if it is no weight."""
        if not isinstance(node, torch.fx.Node) or node.op != "get_attr":
            return ()
        return self.shared.get(str(node.target), (str(node.target),))


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of layer: what its weights are called, by the arguments of the operation, and what else it holds."""

    weights: Mapping[str, str]
    made: Callable[[dict[str, Any], Mapping[str, Shape], int], str]
    data: str = "input"
    more: frozenset[str] = frozenset()


def layer_of(node: torch.fx.Node, state: StateShapes, rank: int) -> LayerCode | None:
    """Return the layer that an operation is, if its weights lie in one module together and alone."""
    kind = _KINDS.get(op_name(node))
    if kind is None:
        return None
    said = arguments(node)
    if op_name(node) in _RECURRENT:
        return _recurrent(node, state)
    first = next(iter(kind.weights))
    for name in state.names(said.get(first)):
        path, _, last = name.rpartition(".")
        if not path or last != kind.weights[first]:
            continue
        wanted = {own: said[argument] for argument, own in kind.weights.items() if said.get(argument) is not None}
        held = state.under(path)
        is_whole = held.keys() - kind.more == wanted.keys()
        if is_whole and all(f"{path}.{own}" in state.names(value) for own, value in wanted.items()):
            made = kind.made(said, held, rank)
            return LayerCode(path, made, (said[kind.data],)) if made else None
    return None


def _convolution(said: dict[str, Any], held: Mapping[str, Shape], _: int) -> str:
    kernel = held["weight"]
    groups = said["groups"]
    named = {"stride": short(said["stride"]), "padding": short(said["padding"]), "dilation": short(said["dilation"])}
    usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "bias": True, "output_padding": 0}
    is_transposed = bool(said.get("transposed")) or ("output_padding" in said and "transposed" not in said)
    inputs, outputs = (kernel[0], kernel[1] * groups) if is_transposed else (kernel[1] * groups, kernel[0])
    if is_transposed:
        named["output_padding"] = short(said["output_padding"])
    named |= {"groups": groups, "bias": "bias" in held}
    word = f"nn.Conv{'Transpose' if is_transposed else ''}{len(kernel) - 2}d"
    return _call(word, (inputs, outputs, short(kernel[2:])), named, usual)


def _linear(_: dict[str, Any], held: Mapping[str, Shape], __: int) -> str:
    outputs, inputs = held["weight"]
    return _call("nn.Linear", (inputs, outputs), {"bias": "bias" in held}, {"bias": True})


def _batch_norm(said: dict[str, Any], held: Mapping[str, Shape], rank: int) -> str:
    if "running_mean" not in held or said.get("training") or ("weight" in held) != ("bias" in held):
        return ""
    axes = {2: 1, 3: 1, 4: 2, 5: 3}.get(rank)
    named = {"eps": said["eps"], "momentum": said["momentum"], "affine": "weight" in held}
    usual = {"eps": 1e-5, "momentum": _NO_MOMENTUM, "affine": True}
    return _call(f"nn.BatchNorm{axes}d", held["running_mean"], named, usual) if axes else ""


def _layer_norm(said: dict[str, Any], held: Mapping[str, Shape], _: int) -> str:
    shape = tuple(said["normalized_shape"])
    named = {"eps": said["eps"], "bias": "bias" in held}
    return _call("nn.LayerNorm", (shape[0] if len(shape) == 1 else shape,), named, {"eps": 1e-5, "bias": True})


def _group_norm(said: dict[str, Any], held: Mapping[str, Shape], _: int) -> str:
    if "bias" not in held:
        return ""
    return _call("nn.GroupNorm", (said["num_groups"], *held["weight"]), {"eps": said["eps"]}, {"eps": 1e-5})


def _embedding(said: dict[str, Any], held: Mapping[str, Shape], _: int) -> str:
    padding = said["padding_idx"]
    return _call("nn.Embedding", held["weight"], {"padding_idx": padding}, {"padding_idx": -1})


def _prelu(_: dict[str, Any], held: Mapping[str, Shape], __: int) -> str:
    return _call("nn.PReLU", held["weight"], {}, {})


def _recurrent(node: torch.fx.Node, state: StateShapes) -> LayerCode | None:
    """Return a recurrent layer that begins with zeros, as it does by itself."""
    said, name = arguments(node), op_name(node)
    params, states = said.get("params"), said.get("hx")
    states = states if isinstance(states, list | tuple) else [states]
    if not isinstance(params, list | tuple) or "batch_sizes" in said:
        return None
    if not all(isinstance(one, torch.fx.Node) and op_name(one) in {"zeros", "new_zeros"} for one in states):
        return None
    paths = {found.rpartition(".")[0] for found in state.names(params[0])}
    for path in sorted(filter(None, paths)):
        held = state.under(path)
        names = _names(said)
        if held.keys() != set(names) or not all(
            f"{path}.{own}" in state.names(one) for own, one in zip(names, params, strict=False)
        ):
            continue
        gates = {"lstm": 4, "gru": 3}.get(name, 1)
        units = held["weight_hh_l0"]
        if units[1] * gates != units[0]:
            return None
        named = {
            "num_layers": said["num_layers"],
            "nonlinearity": name.removeprefix("rnn_"),
            "bias": said["has_biases"],
            "batch_first": said["batch_first"],
            "dropout": said["dropout"],
            "bidirectional": said["bidirectional"],
        }
        usual = {
            "num_layers": 1,
            "nonlinearity": named["nonlinearity"] if name != "rnn_relu" else "tanh",
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
        }
        word = {"lstm": "nn.LSTM", "gru": "nn.GRU"}.get(name, "nn.RNN")
        return LayerCode(path, _call(word, (held["weight_ih_l0"][1], units[1]), named, usual), (said["input"],))
    return None


def _names(said: dict[str, Any]) -> list[str]:
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if said["has_biases"] else ("weight_ih", "weight_hh")
    ends = ("", "_reverse") if said["bidirectional"] else ("",)
    return [f"{part}_l{layer}{end}" for layer in range(said["num_layers"]) for end in ends for part in parts]


def _call(word: str, first: Sequence[Any], named: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    more = ((name, literal(value)) for name, value in named.items() if value != usual[name])
    return call(word, map(literal, first), more)


_PLAIN = {"weight": "weight", "bias": "bias"}
_NORM = _PLAIN | {"running_mean": "running_mean", "running_var": "running_var"}
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_CONVOLUTIONS = "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d"
_KINDS: Mapping[str, _Kind] = {
    **{name: _Kind(_PLAIN, _convolution) for name in _CONVOLUTIONS.split()},
    "linear": _Kind(_PLAIN, _linear),
    "batch_norm": _Kind(_NORM, _batch_norm, more=frozenset({"num_batches_tracked"})),
    "layer_norm": _Kind(_PLAIN, _layer_norm),
    "group_norm": _Kind(_PLAIN, _group_norm),
    "embedding": _Kind({"weight": "weight"}, _embedding, data="indices"),
    "prelu": _Kind({"weight": "weight"}, _prelu, data="self"),
    **{name: _Kind({}, _prelu) for name in _RECURRENT},
}
