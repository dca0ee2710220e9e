"""Passes that go on where the last one stopped show what whole passes show, to the last bit."""

from __future__ import annotations

import io
import random as chance
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prunectl.training.backend import InputCallback, LayerInput, PassEnd
from prunectl.training.torch._compat import TorchDispatchMode
from prunectl.training.torch.cached_pass import CachedPass
from prunectl.training.torch.layer_inputs import capture_layer_inputs
from tests.contract import Array

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated", "ignore:.*nested tensors")
PRODUCTS = {torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.convolution.default}


class Block(nn.Module):
    """Convolutions around which the input is led, added and activated in place."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.two, self.act = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.two(self.act(self.norm(self.one(x))))
        y += x
        return self.act(y)


class Residual(nn.Module):
    """Two such blocks, the first of which goes to the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(12, 4, 1), Block(), Block()
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.stem(x.view(-1, 12, 1, 1).expand(-1, -1, 5, 5)))
        return self.head(torch.cat([x, self.second(x)], dim=1).mean((2, 3)))


class Tied(nn.Module):
    """One layer is called twice, and the transposed weight of another once more."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(torch.tanh(self.one(x)))
        return self.three(torch.tanh(self.two(x)) @ self.two.weight)


class Centring(nn.Module):
    """Writes to its own input, which a later layer meets as well."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= x.mean(1, keepdim=True)
        return self.two(torch.relu(self.one(x)) + x)


class CentringHalf(Centring):
    """Writes to a part of its own input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x[:, :6].sub_(x.mean(1, keepdim=True))
        return self.two(torch.relu(self.one(x)) + x)


class Turning(nn.Module):
    """Transposes a square matrix where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.one(x))
        y = self.two(x.t_())
        return self.three(torch.relu(y) + x)


class ByNumbers(nn.Module):
    """Looks at numbers: by NumPy, and to choose a way."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        if x.sum() > 0:
            x = -x
        x = self.two(torch.from_numpy(np.tanh(x.numpy())))
        return self.three(torch.relu(x))


class Remembering(nn.Module):
    """Hands hidden states on in an attribute, which is empty before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(24, 2)
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(torch.relu(self.one(x)))
        x = torch.relu(self.two(self.kept[0]))
        return self.three(torch.cat([x, self.kept.pop()], 1))


class Growing(nn.Module):
    """Adds to a buffer in each pass."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 2)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        self.count += 1
        return self.two(x + self.count)


class Text(nn.Module):
    """Attention, whose softmax and reshaping lie between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x[:, None].expand(-1, 5, -1) * torch.arange(1, 6)[:, None]).mean(1))


class Steps(nn.Module):
    """A recurrent layer between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.cell, self.head = nn.Linear(12, 12), nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.one(x)[:, None].expand(-1, 4, -1))[0][:, -1])


class Scaled(nn.Module):
    """A weight is multiplied before it meets its inputs: it is shown nowhere, and read before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.two.weight * 2
        return self.three(nn.functional.linear(torch.relu(self.one(x)), weight))


class Chain(nn.Module):
    """Four layers, with something done in their middle to what the first and the second give."""

    def __init__(self, mix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(12, 12) for _ in range(4))
        self.mix = mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return self.four(self.three(self.mix(x, self.two(x))))


def _choose(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y if x.sum() > y.sum() else x * 2


def _replace(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.data = torch.clamp(x.data, 0, 2)
    return y * x


def _fill(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    found = torch.empty(0)
    torch.abs(x, out=found)
    return y * found.sum()


def _move(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    mean, variance = x.new_zeros(12), x.new_ones(12)
    nn.functional.batch_norm(x, mean, variance, training=True)
    return y * mean + variance


MIXES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "a number": lambda x, y: y / x.abs().max().item(),
    "a choice": _choose,
    "a count": lambda x, y: y * len(x.round().unique()),
    "other numbers": _replace,
    "a parameter": lambda x, y: y * nn.Parameter(x, requires_grad=False),
    "an empty output": _fill,
    "statistics": _move,
    "nested": lambda x, y: y * torch.nested.nested_tensor([x, x]).to_padded_tensor(0.0)[0],
}


class Scaling(Chain):
    """Gives a weight other numbers, at another place in memory."""

    def __init__(self) -> None:
        super().__init__(lambda _, y: y)
        self.scale = nn.Parameter(3 * torch.ones(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale.data = self.scale.data.clamp(0, 2)
        return self.four(self.three(self.two(self.one(x) * self.scale)))


def scripted() -> nn.Module:
    held = io.BytesIO()
    torch.jit.save(torch.jit.script(Residual().eval()), held)
    held.seek(0)
    return torch.jit.load(held)


def exported() -> nn.Module:
    return torch.export.export(Residual().eval(), (torch.ones(6, 12),)).module()


NETS: dict[str, Callable[[], nn.Module]] = {
    **{net.__name__: net for net in (Residual, Tied, Centring, CentringHalf, Turning, ByNumbers, Remembering)},
    **{net.__name__: net for net in (Growing, Text, Steps, Scaled, Scaling)},
    **{name: partial(Chain, mix) for name, mix in MIXES.items()},
    "scripted": scripted,
    "exported": exported,
}
SKIPPING = ("Residual", "Remembering", "Text", "scripted", "exported")
"""Those of which each layer is one operation, that numbers alone decide."""


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    module = NETS[kind]()
    return module if kind == "exported" else module.eval()


def inputs() -> Array:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(1)).numpy()


def runner(module: nn.Module) -> Any:
    weights = dict(module.named_parameters())

    def run(names: Collection[str], x: Any, see: InputCallback, cache: CachedPass | None) -> None:
        batch = torch.tensor(x)
        with capture_layer_inputs({name: weights[name] for name in names}, see, None, cache):
            module(batch)

    return run


def met(observe: Callable[[InputCallback], None], most: int = 10**6) -> list[tuple[str, Array]]:
    """What is shown first, of so many."""
    shown: list[tuple[str, Array]] = []

    def see(sight: LayerInput) -> None:
        shown.append((sight.name, sight.inputs.copy()))
        if len(shown) == most:
            raise PassEnd

    with suppress(PassEnd):
        observe(see)
    return shown


def same(found: list[tuple[str, Array]], expected: list[tuple[str, Array]]) -> None:
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, mine), (_, theirs) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


class Counter(TorchDispatchMode):
    """Counts the products that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in PRODUCTS
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter]:
    with Counter() as counter:
        yield counter


def change(module: nn.Module, name: str, seed: int) -> None:
    """As networks do it: through the state, in place."""
    state = module.state_dict()
    with torch.no_grad():
        state[name].copy_(torch.randn(state[name].shape, generator=torch.Generator().manual_seed(seed)) / 3)


@pytest.mark.parametrize("kind", NETS)
def test_layer_after_layer_is_shown_what_goes_into_it_by_then(kind: str) -> None:
    module, twin = build(kind), build(kind)
    run, x = runner(module), inputs()
    cached, plain = CachedPass(run, module.state_dict), runner(twin)
    whole = met(lambda see: cached.observe(dict(module.named_parameters()), x, see))
    same(whole, met(lambda see: plain(dict(twin.named_parameters()), x, see, None)))
    counts = {name: sum(shown == name for shown, _ in whole) for name, _ in whole}
    for seed, (name, count) in enumerate(counts.items()):
        found = met(lambda see, name=name: cached.observe([name], x, see), count)  # type: ignore[misc]
        same(found, met(lambda see, name=name: plain([name], x, see, None), count))  # type: ignore[misc]
        for each in (module, twin):
            change(each, name, seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [kind for kind in NETS if kind not in {"Growing", "Scaling"}])
def test_whatever_is_asked_for_and_changed_in_whatever_order(kind: str, seed: int) -> None:
    module, moments = build(kind), chance.Random(seed)
    run, x = runner(module), inputs()
    cached, names = CachedPass(run, module.state_dict), list(dict(module.named_parameters()))
    met(lambda see: cached.observe(names, x, see))
    for step in range(25):
        wanted = moments.sample(names, moments.randint(1, 3))
        expected = met(lambda see, wanted=wanted: run(wanted, x, see, None))  # type: ignore[misc]
        most = moments.randint(1, len(expected)) if expected else 1
        same(met(lambda see, wanted=wanted: cached.observe(wanted, x, see), most), expected[:most])  # type: ignore[misc]
        if moments.random() < 0.1:
            cached.clear()
        for name in moments.sample(names, moments.randint(0, 2)):
            change(module, name, step)


@pytest.mark.parametrize("kind", SKIPPING)
def test_each_product_is_computed_once_and_nothing_is_held_at_the_end(kind: str) -> None:
    module, x = build(kind), inputs()
    cached = CachedPass(runner(module), module.state_dict)
    with counted() as first:
        order = [name for name, _ in met(lambda see: cached.observe(dict(module.named_parameters()), x, see))]
    held = []
    with counted() as rest:
        for seed, name in enumerate(order):
            met(lambda see, name=name: cached.observe([name], x, see), 1)  # type: ignore[misc]
            held.append(cached.nbytes)
            change(module, name, seed)
    # The layer at which a pass ends is run again with its new weights.
    assert rest.count <= first.count + len(order)
    assert max(held) > 0
    cached.clear()
    assert cached.nbytes == 0


def test_what_fails_while_it_looks_fails_and_the_next_pass_is_whole() -> None:
    module, x = build("Residual"), inputs()
    cached, names = CachedPass(runner(module), module.state_dict), list(dict(module.named_parameters()))
    met(lambda see: cached.observe(names, x, see))
    met(lambda see: cached.observe(["first.two.weight"], x, see), 1)

    def see(_: LayerInput) -> None:
        raise ValueError("too much")

    with pytest.raises(ValueError, match="too much"):
        cached.observe(["second.one.weight"], x, see)
    expected = met(lambda see: runner(module)(names, x, see, None))
    same(met(lambda see: cached.observe(names, x, see)), expected)
