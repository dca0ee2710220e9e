"""Repeated forward passes of one batch, of which each goes on where the last one stopped.

Layers are fitted one after the other, each with what goes into it by then. A new pass for each would compute everything
before it again, which for a deep network is most of the work. The code of the model runs from its beginning all the
same; but operations before the first weight that has changed are skipped. They give what they gave or, where no
operation uses that any more, a tensor of its form whose numbers nobody has set.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from prunectl.training.backend import InputCallback, LayerInput
from prunectl.training.data.source import Arrays
from prunectl.training.torch._compat import tree_flatten, tree_unflatten, written_arguments

Run = Callable[[Collection[str], Arrays, InputCallback, "CachedPass | None"], None]
"""Runs a batch through, and tells a cache of each operation."""
_Place = tuple[int, int]
"""An output: the number of its operation, and its own among what that gave."""


class _DivergedError(Exception):
    """A pass does other operations than the first one did."""


class _Form(NamedTuple):
    """A tensor without its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> torch.Tensor:
        # On the same device, by which PyTorch chooses operations. What is not written to takes no memory.
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class _Argument(int):
    """The number of a tensor among the arguments, where an operation gives back what it was given."""


@dataclass(frozen=True, slots=True)
class _Operation:
    """What is known of an operation since the first pass."""

    func: Any
    outputs: list[Any]
    """A form or an argument for each tensor; what is no tensor as it is."""
    structure: Any
    """How the outputs are nested."""
    last_uses: list[_Place] = field(default_factory=list)
    """What nobody uses any more after it."""


@dataclass(slots=True)
class _Trace:
    """What the first pass tells: it has to reach the end of the module."""

    operations: list[_Operation] = field(default_factory=list)
    uses: dict[_Place, int] = field(default_factory=dict)
    """The last operation that uses an output."""
    reads: dict[int, int] = field(default_factory=dict)
    """The first operation that reads a storage, by its address."""
    is_sound: bool = True
    """Whether passes leave what they begin with as it is."""
    _makers: dict[int, tuple[weakref.ref[torch.Tensor], _Place, bool]] = field(default_factory=dict)
    """By the identity of a tensor, where it comes from, and whether its storage was made in this pass."""

    def add(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note an operation that was run."""
        number = len(self.operations)
        given = _tensors(args, kwargs)
        outputs, structure = tree_flatten(result)
        self.is_sound &= all(tensor.layout is torch.strided for tensor in (*given, *_tensors(outputs)))
        # An alias would not know that a tensor has another shape from now on.
        self.is_sound &= torch.Tag.inplace_view not in func.tags
        if not self.is_sound:
            return
        makers = [self.maker(tensor) for tensor in given]
        for tensor, maker in zip(given, makers, strict=True):
            if maker is not None:
                self.uses[maker[0]] = number
            if not func.is_view:
                self.reads.setdefault(tensor.untyped_storage().data_ptr(), number)
        # What is written to what was there before is there in the next pass, which does not write it again.
        written = (self.maker(tensor) for tensor in written_arguments(func, args, kwargs))
        self.is_sound = all(maker is not None and maker[1] for maker in written)
        is_made = not func.is_view or all(maker is not None and maker[1] for maker in makers)
        ids = {id(tensor): _Argument(index) for index, tensor in enumerate(given)}
        known: list[Any] = []
        for index, output in enumerate(outputs):
            if not isinstance(output, torch.Tensor):
                known.append(output)
            elif id(output) in ids:
                known.append(ids[id(output)])
            else:
                known.append(_Form(output.shape, output.stride(), output.dtype, output.device))
                self._makers[id(output)] = weakref.ref(output), (number, index), is_made
        self.operations.append(_Operation(func, known, structure))

    def maker(self, tensor: torch.Tensor) -> tuple[_Place, bool] | None:
        """Where a tensor comes from, and whether its storage was made in this pass; None if it was there before."""
        # A tensor may have the identity of one that is gone.
        reference, place, is_made = self._makers.get(id(tensor), (None, (0, 0), False))
        return (place, is_made) if reference is not None and reference() is tensor else None

    def finish(self) -> None:
        """Tell each operation what nobody uses after it."""
        self._makers.clear()
        for place, last in self.uses.items():
            self.operations[last].last_uses.append(place)


_READS = frozenset(
    {
        torch.Tensor.numpy,
        torch.Tensor.tolist,
        torch.Tensor.data_ptr,
        torch.Tensor.untyped_storage,
        torch.Tensor.__array__,
        torch.Tensor.__dlpack__,
    }
)
"""What reads numbers without an operation, so that nobody would notice that they are not set."""


class _ReadsTold(TorchFunctionMode):
    """Tells a trace that the code of the model reads numbers itself."""

    def __init__(self, trace: _Trace) -> None:
        self._trace = trace

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READS and self._trace.maker(args[0]) is not None:
            self._trace.is_sound = False
        return func(*args, **(kwargs or {}))


class CachedPass:
    """The passes of one batch."""

    def __init__(self, run: Run, weights: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self._run, self._weights = run, weights
        self._trace = _Trace()
        self._is_traced = False
        self._done = self._next = 0
        """How many operations need not be run again, and the number of the next one."""
        self._values: dict[_Place, torch.Tensor] = {}
        """Outputs that later operations use."""
        self._versions: set[tuple[int, int]] = set()
        """Of the weights in the last pass."""

    @property
    def nbytes(self) -> int:
        """How much memory the outputs take that are held."""
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in self._values.values()}
        return sum(storage.nbytes() for storage in storages.values())

    def clear(self) -> None:
        """Hold nothing: the next pass begins at the beginning."""
        self._done = 0
        self._values.clear()

    def observe(self, names: Collection[str], x: Arrays, see: InputCallback) -> None:
        """Run the batch through, and show what these weights meet."""
        if not self._trace.is_sound:
            self._run(names, x, see, None)
            return
        self._begin(names)
        is_resumed, callback = self._done > 0, _Callback(see)
        try:
            with nullcontext() if self._is_traced else _ReadsTold(self._trace):
                self._run(names, x, callback, self)
        except Exception:
            if callback.has_failed:
                self._end(is_complete=False)
                raise
            self._give_up()
            if not is_resumed:
                raise
            self._run(names, x, callback.after_those(), None)
        else:
            self._end(is_complete=True)

    def _give_up(self) -> None:
        """Run whole passes from here on."""
        self._trace.is_sound = False
        self.clear()

    def _begin(self, names: Collection[str]) -> None:
        if not self._is_traced:
            self._trace = _Trace()
        weights = self._weights()
        addresses = {name: weight.untyped_storage().data_ptr() for name, weight in weights.items()}
        versions = {(addresses[name], weight._version) for name, weight in weights.items()}  # noqa: SLF001
        # What reads a weight that has changed, or is to be shown, has to be run.
        wanted = {address for address, _ in versions ^ self._versions} | {addresses[name] for name in names}
        if any(self._trace.reads[address] < self._done for address in wanted & self._trace.reads.keys()):
            self.clear()
        self._versions, self._next = versions, 0

    def _end(self, *, is_complete: bool) -> None:
        if self._is_traced:
            self._done = self._next
        elif is_complete:
            self._is_traced = True
            self._trace.finish()

    @property
    def is_resuming(self) -> bool:
        """Whether the next operation has been run before, with the same weights."""
        return self._next < self._done

    def skip(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What an operation that is not run again has given."""
        operation = self._known()
        if operation is None or operation.func is not func:
            raise _DivergedError
        outputs: list[Any] = []
        for index, output in enumerate(operation.outputs):
            if isinstance(output, _Argument):
                outputs.append(_tensors(args, kwargs)[output])
            elif isinstance(output, _Form):
                value = self._values.get((self._next, index))
                outputs.append(output.empty() if value is None else value.data)
            else:
                outputs.append(output)
        self._next += 1
        return tree_unflatten(outputs, operation.structure)

    def note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note an operation that was run."""
        if not self._trace.is_sound:
            return
        if not self._is_traced:
            self._trace.add(func, args, kwargs, result)
            return
        operation = self._known()
        if operation is None or operation.func is not func:
            if self._done:
                raise _DivergedError
            self._give_up()
            return
        for index, output in enumerate(tree_flatten(result)[0]):
            if (self._next, index) in self._trace.uses:
                # An alias, here and where it is given again: PyTorch does other operations with a tensor that is held.
                self._values[self._next, index] = output.data
        for place in operation.last_uses:
            self._values.pop(place, None)
        self._next += 1

    def _known(self) -> _Operation | None:
        """What the first pass did at this point."""
        operations = self._trace.operations
        return operations[self._next] if self._next < len(operations) else None


class _Callback:
    """Calls a function, and knows how often, and whether it was that which failed."""

    def __init__(self, see: InputCallback, passed_over: int = 0) -> None:
        self._see, self._count, self._passed_over = see, 0, passed_over
        self.has_failed = False

    def __call__(self, shown: LayerInput) -> None:
        self._count += 1
        if self._count <= self._passed_over:
            return
        try:
            self._see(shown)
        except BaseException:
            self.has_failed = True
            raise

    def after_those(self) -> _Callback:
        """The same for what was not shown yet."""
        return _Callback(self._see, self._count)


def _tensors(*trees: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(trees)[0] if isinstance(leaf, torch.Tensor)]
