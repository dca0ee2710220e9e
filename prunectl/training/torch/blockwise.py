"""The model of a folder, run one block at a time: only the weights of that block are loaded from the file."""

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
from prunectl.training.quiet import quiet_logging
from prunectl.training.torch.cached_pass import CachedPass
from prunectl.training.torch.folder import FolderModule, FolderNetwork, names_network, open_network
from prunectl.training.torch.layer_inputs import capture_layer_inputs
from prunectl.training.torch.tensors import to_numpy, to_torch, view_as_torch

_OUTPUT_CACHE_BYTES = 256 << 20
"""Most bytes of outputs of a dense block that are cached rather than computed again."""


class _BlockStub(torch.nn.Module):
    """Replaces a block: records its arguments, and returns the hidden states or their replacement."""

    def __init__(self, block: torch.nn.Module, calls: list[_Call], out_type: type | None) -> None:
        super().__init__()
        # Not a submodule: it only provides attributes that the model reads, such as the kind of attention.
        object.__setattr__(self, "block", block)
        self._calls, self._out_type = calls, out_type
        self.replacement: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **more: Any) -> Any:
        hidden = args[0] if args else more.pop("hidden_states")
        self._calls.append(_Call(hidden, args[1:], more))
        if self._out_type is None:
            raise _ReachedBlocks
        hidden = hidden if self.replacement is None else self.replacement
        return (hidden,) if self._out_type is tuple else hidden


class _ReachedBlocks(Exception):  # noqa: N818 - it is no error
    """Raised where the first block would run."""


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of a call of a block."""

    hidden: torch.Tensor
    args: tuple[Any, ...]
    more: Mapping[str, Any]

    def run(self, block: torch.nn.Module, hidden: torch.Tensor) -> Any:
        """Call a block with these arguments, but other hidden states."""
        with quiet_logging():
            return block(hidden, *self.args, **self.more)


class TorchBlockwise:
    """The model of a folder with the weights of one block in memory at a time, for methods such as SparseGPT.

    Between two blocks the hidden states of all batches are kept: those of the dense model, and those of the model with
    all earlier blocks pruned. The last part is everything outside the blocks, and stays in memory throughout.
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
        """The recorded calls by batch, then by block."""
        self._out_type: type = torch.Tensor  # or a tuple, with the hidden states first
        self._dense: list[torch.Tensor] = []
        self._pruned: list[torch.Tensor] = []
        self._open: tuple[_Part, _Part | None] | None = None
        self.signature = ModelSignature(network.inputs, (), is_channels_first=True, text=network.text)

    @property
    def parts(self) -> int:
        """The number of parts: the blocks, and the rest of the model."""
        return len(self._blocks) + 1

    def part_of(self, name: str) -> int:
        """The number of the part that holds a tensor."""
        return self._numbers.get(name, len(self._blocks))

    def begin(self, batches: Sequence[Arrays]) -> None:
        """Run the batches through the model without its blocks, and record the arguments of each block."""
        self._batches = tuple(tuple(map(to_torch, as_tuple(batch))) for batch in batches)
        self._network.fill(name for name in self._network.names if name not in self._numbers)
        self._load(0)
        with torch.no_grad():
            (call,) = self._record_calls(self._batches[0], None)[0]
            self._out_type = tuple if isinstance(call.run(self._blocks[0], call.hidden), tuple) else torch.Tensor
            self._calls = [self._record_calls(batch, self._out_type) for batch in self._batches]
        self._unload(0)
        self._dense = [calls[0][0].hidden for calls in self._calls]
        self._pruned = list(self._dense)

    def open(self, number: int, *, has_copy: bool) -> tuple[InspectableModel, InspectableModel | None]:
        """A part with its weights, and with `has_copy` a second copy that is not pruned."""
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
        """Run an open part, unload it, and return the mean cosine similarity of its inputs and outputs."""
        assert self._open is not None
        (first, second), self._open = self._open, None
        if number == len(self._blocks):
            return 1.0
        total = count = 0.0
        with torch.no_grad():
            for index, before in enumerate(self._dense):
                cached = second.outputs.pop(index, None) if second is not None and second.outputs is not None else None
                after = self._run_block(number, (second or first).module, index, before) if cached is None else cached
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

    def _record_calls(self, batch: tuple[torch.Tensor, ...], out_type: type | None) -> list[list[_Call]]:
        """The calls of each block for a batch; of the first block only if their output type is not known yet."""
        calls: list[list[_Call]] = [[] for _ in self._blocks]
        with self._stubbed(self._network.module.inner, calls, out_type), suppress(_ReachedBlocks):
            self._network.module(*batch)
        return calls

    @contextmanager
    def _stubbed(
        self, inner: torch.nn.Module, calls: list[list[_Call]], out_type: type | None, last: torch.Tensor | None = None
    ) -> Generator[None]:
        """Replace all blocks by stubs within the context; the last one returns `last`, if that is given."""
        blocks = inner.get_submodule(self._path)
        assert isinstance(blocks, torch.nn.ModuleList)
        originals = list(blocks)
        for index, block in enumerate(originals):
            blocks[index] = _BlockStub(block, calls[index], out_type)
        blocks[-1].replacement = last  # type: ignore[assignment]
        try:
            yield
        finally:
            for index, block in enumerate(originals):
                blocks[index] = block

    def _run_block(self, number: int, block: torch.nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        out = self._calls[index][number][0].run(block, hidden)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def _run_rest(self, inner: torch.nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        calls: list[list[_Call]] = [[] for _ in self._blocks]
        with self._stubbed(inner, calls, self._out_type, hidden):
            result: torch.Tensor = FolderModule(inner, self._network.module.names)(*self._batches[index])
        return result


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a model; its inputs are the hidden states of a batch, given by the number of the batch."""

    signature: ModelSignature
    module: torch.nn.Module
    names: Mapping[str, str]
    run: Callable[[torch.nn.Module, int, torch.Tensor], torch.Tensor]
    hidden: Sequence[torch.Tensor]
    outputs: dict[int, torch.Tensor] | None = None
    """Cached outputs by batch number, from complete passes; None for a part whose weights change."""

    def observe(self, names: Collection[str], x: Arrays, callback: InputCallback) -> None:
        self._observe(names, x, callback, None)

    def _observe(self, names: Collection[str], x: Arrays, callback: InputCallback, cache: CachedPass | None) -> None:
        index = int(as_tuple(x)[0].flat[0])
        with capture_layer_inputs(self._parameters(names), callback, cache=cache):
            output = self.run(self.module, index, self.hidden[index])
        # Only the output of the first pass: a later one may have skipped the operations that compute it.
        if self.outputs is not None and index not in self.outputs:
            if sum(cached.nbytes for cached in self.outputs.values()) + output.nbytes <= _OUTPUT_CACHE_BYTES:
                self.outputs[index] = output

    def cached_pass(self) -> CachedPass:
        """A cached pass, for a batch that is run repeatedly."""
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
        own = dict(self.module.named_parameters(remove_duplicate=False))
        return {name: own[self.names[name]] for name in names if self.names.get(name) in own}


def open_blockwise(model: ModelFile, origin: LoadOptions) -> TorchBlockwise | None:
    """Open a model to run one block at a time; None if its family or inputs do not allow it."""
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
