"""The model of a folder run one block at a time: the weights of the others stay in the file until their turn comes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from prunectl.formats.base import Array, ModelFile
from prunectl.formats.families import CONFIG, family_of, read_config
from prunectl.training.backend import InputCallback, InspectableModel, LoadOptions, ModelSignature
from prunectl.training.data.source import Arrays, as_tuple
from prunectl.training.torch.cached_pass import CachedPass
from prunectl.training.torch.folder import FolderModule, FolderNetwork, names_network, open_network
from prunectl.training.torch.layer_inputs import capture_layer_inputs
from prunectl.training.torch.tensors import to_numpy, to_torch, view_as_torch

_AFTER_BYTES = 256 << 20
"""Of what comes out of a dense block, which is not computed again."""


class _Passing(torch.nn.Module):
    """Stands in the place of a block: keeps what it is called with, and hands on the hidden states that it gets."""

    def __init__(self, block: torch.nn.Module, calls: list[_Call], form: type | None) -> None:
        super().__init__()
        # Not as a part of this one: only what the model asks the block for, such as its kind of attention.
        object.__setattr__(self, "block", block)
        self._calls, self._form = calls, form
        self.replacement: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **more: Any) -> Any:
        hidden = args[0] if args else more.pop("hidden_states")
        self._calls.append(_Call(hidden, args[1:], more))
        if self._form is None:
            raise _ReachedBlocks
        hidden = hidden if self.replacement is None else self.replacement
        return (hidden,) if self._form is tuple else hidden


class _ReachedBlocks(Exception):  # noqa: N818 - it is no error
    """Raised where the first block would begin."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What a block is called with."""

    hidden: torch.Tensor
    args: tuple[Any, ...]
    more: Mapping[str, Any]

    def run(self, block: torch.nn.Module, hidden: torch.Tensor) -> Any:
        """What comes out of a block for other hidden states."""
        return block(hidden, *self.args, **self.more)


class TorchBlockwise:
    """The model of a folder with the weights of one block in memory, as SparseGPT goes through it.

    The hidden states of all batches are held between two blocks: those of the model as it is, and those of the model
    whose blocks were pruned so far. The last part is what is not in a block, which is in memory throughout.
    """

    def __init__(self, network: FolderNetwork, path: str, blocks: torch.nn.ModuleList) -> None:
        self._network, self._path = network, path
        self._blocks = list(blocks)
        self._numbers = {
            name: int(inner.removeprefix(f"{path}.").partition(".")[0])
            for name, inner in network.names.items()
            if inner.startswith(f"{path}.")
        }
        self._batches: tuple[tuple[torch.Tensor, ...], ...] = ()
        self._calls: list[list[list[_Call]]] = []
        """Of each batch, for each block."""
        self._form: type = torch.Tensor
        self._dense: list[torch.Tensor] = []
        self._pruned: list[torch.Tensor] = []
        self._open: tuple[_Part, _Part | None] | None = None
        self.signature = ModelSignature(network.inputs, (), is_channels_first=True, text=network.text)

    @property
    def parts(self) -> int:
        """How many parts there are: the blocks, and the rest."""
        return len(self._blocks) + 1

    def part_of(self, name: str) -> int:
        """In which part a tensor is."""
        return self._numbers.get(name, len(self._blocks))

    def begin(self, batches: Sequence[Arrays]) -> None:
        """Run some batches as far as the first block, and learn what each block is called with."""
        self._batches = tuple(tuple(map(to_torch, as_tuple(batch))) for batch in batches)
        self._network.fill(name for name in self._network.names if name not in self._numbers)
        self._load(0)
        with torch.no_grad():
            (call,) = self._called(self._batches[0], None)[0]
            self._form = tuple if isinstance(call.run(self._blocks[0], call.hidden), tuple) else torch.Tensor
            self._calls = [self._called(batch, self._form) for batch in self._batches]
        self._unload(0)
        self._dense = [calls[0][0].hidden for calls in self._calls]
        self._pruned = list(self._dense)

    def open(self, number: int, *, has_copy: bool) -> tuple[InspectableModel, InspectableModel | None]:
        """A part with its weights, and where it is wanted a copy that stays as it is."""
        if number == len(self._blocks):
            module: torch.nn.Module = self._network.module.inner
            runs = (self._run_rest, self._run_rest)
        else:
            module = self._load(number)
            runs = (partial(self._run_block, number), partial(self._run_block, number))
        names = {name: inner for name, inner in self._network.names.items() if self.part_of(name) == number}
        copied = copy.deepcopy(module) if has_copy else None
        first = _Part(self.signature, module, self._local(number, names), runs[0], self._pruned)
        second = None
        if copied is not None:
            second = _Part(self.signature, copied, self._local(number, names), runs[1], self._dense, {})
        self._open = (first, second)
        return first, second

    def _local(self, number: int, names: Mapping[str, str]) -> dict[str, str]:
        """The names of tensors within the module of their part."""
        if number == len(self._blocks):
            return dict(names)
        return {name: inner.partition(f".{number}.")[2] for name, inner in names.items()}

    def advance(self, number: int) -> float:
        """Go through an open part, and let go of it; the mean cosine similarity of what goes in and what comes out."""
        assert self._open is not None
        (first, second), self._open = self._open, None
        if number == len(self._blocks):
            return 1.0
        total = count = 0.0
        with torch.no_grad():
            for index, before in enumerate(self._dense):
                known = second.after.pop(index, None) if second is not None and second.after is not None else None
                after = self._run_block(number, (second or first).module, index, before) if known is None else known
                similarity = torch.nn.functional.cosine_similarity(before, after, dim=-1)
                total, count = total + float(similarity.double().sum()), count + similarity.numel()
                self._dense[index] = after
                pruned = self._pruned[index]
                self._pruned[index] = self._run_block(number, first.module, index, pruned) if second else after
        self._unload(number)
        return total / count

    def _load(self, number: int) -> torch.nn.Module:
        self._network.fill(name for name, own in self._numbers.items() if own == number)
        return self._blocks[number]

    def _unload(self, number: int) -> None:
        for module in self._blocks[number].modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False))

    def _called(self, batch: tuple[torch.Tensor, ...], form: type | None) -> list[list[_Call]]:
        """What the blocks are called with for a batch; only the first, where it is not known how they answer."""
        calls: list[list[_Call]] = [[] for _ in self._blocks]
        with self._passed_by(self._network.module.inner, calls, form), suppress(_ReachedBlocks):
            self._network.module(*batch)
        return calls

    @contextmanager
    def _passed_by(
        self, inner: torch.nn.Module, calls: list[list[_Call]], form: type | None, last: torch.Tensor | None = None
    ) -> Generator[None]:
        """Pass by all blocks, the last of which may give other hidden states."""
        blocks = inner.get_submodule(self._path)
        assert isinstance(blocks, torch.nn.ModuleList)
        own = list(blocks)
        for index, block in enumerate(own):
            blocks[index] = _Passing(block, calls[index], form)
        blocks[-1].replacement = last  # type: ignore[assignment]
        try:
            yield
        finally:
            for index, block in enumerate(own):
                blocks[index] = block

    def _run_block(self, number: int, block: torch.nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        out = self._calls[index][number][0].run(block, hidden)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def _run_rest(self, inner: torch.nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        calls: list[list[_Call]] = [[] for _ in self._blocks]
        with self._passed_by(inner, calls, self._form, hidden):
            result: torch.Tensor = FolderModule(inner, self._network.module.names)(*self._batches[index])
        return result


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a model, which runs for the hidden states of a batch by its number."""

    signature: ModelSignature
    module: torch.nn.Module
    names: Mapping[str, str]
    run: Callable[[torch.nn.Module, int, torch.Tensor], torch.Tensor]
    hidden: Sequence[torch.Tensor]
    after: dict[int, torch.Tensor] | None = None
    """What comes out, by the number of the batch, where the weights stay as they are and a pass has reached the end."""

    def observe(self, names: Collection[str], x: Arrays, see: InputCallback) -> None:
        self._observe(names, x, see, None)

    def _observe(self, names: Collection[str], x: Arrays, see: InputCallback, cache: CachedPass | None) -> None:
        index = int(as_tuple(x)[0].flat[0])
        with capture_layer_inputs(self._parameters(names), see, cache=cache):
            after = self.run(self.module, index, self.hidden[index])
        # Of the first pass: a later one may have skipped what gives it.
        if self.after is not None and index not in self.after:
            if sum(each.nbytes for each in self.after.values()) + after.nbytes <= _AFTER_BYTES:
                self.after[index] = after

    def cached_pass(self) -> CachedPass:
        """What a batch that is run through again and again is observed with."""
        return CachedPass(self._observe, partial(self._parameters, self.names))

    def predict(self, x: Arrays) -> Arrays:
        index = int(as_tuple(x)[0].flat[0])
        with torch.no_grad():
            return to_numpy(self.run(self.module, index, self.hidden[index]))

    def assign(self, values: Mapping[str, Array]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters(values).items():
                parameter.copy_(view_as_torch(values[name]))

    def _parameters(self, names: Iterable[str]) -> dict[str, torch.nn.Parameter]:
        inside = dict(self.module.named_parameters(remove_duplicate=False))
        return {name: inside[self.names[name]] for name in names if self.names.get(name) in inside}


def open_blockwise(model: ModelFile, origin: LoadOptions) -> TorchBlockwise | None:
    """A model that is run one block at a time; None where its family or what it takes does not allow it."""
    kind = read_config(model, CONFIG).get("model_type")
    family = family_of(kind) if isinstance(kind, str) else None
    if origin.model or family is None or len(family.stacks) != 1 or not names_network(model):
        return None
    network = open_network(model, origin)
    if not network.text.vocabulary:
        return None
    pattern = re.compile(rf"(?:.*\.)?{family.stacks[0].prefix}")
    lists = [
        (path, module)
        for path, module in network.module.inner.named_modules()
        if isinstance(module, torch.nn.ModuleList) and pattern.fullmatch(path)
    ]
    return TorchBlockwise(network, *lists[0]) if len(lists) == 1 and len(lists[0][1]) else None
