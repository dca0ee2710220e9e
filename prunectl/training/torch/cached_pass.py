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

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Form:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def empty(self) -> torch.Tensor:
        # On the same device, by which PyTorch chooses operations. What is not written to takes no memory.
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class _Argument(int):
    """The number of a tensor among the arguments, where an operation gives back what it was given."""


@dataclass(frozen=True, slots=True)
class _Operation:
    """What is known of an operation since the first pass."""

    func: Any
    options: list[Any]
    """The arguments that are no tensors."""
    outputs: list[Any]
    """A form or an argument for each tensor; what is no tensor as it is."""
    structure: Any
    """How the outputs are nested."""
    last_uses: list[_Place] = field(default_factory=list)
    """What nobody uses any more after it."""


class _Maker(NamedTuple):
    """Where a tensor comes from."""

    tensor: weakref.ref[torch.Tensor]
    place: _Place
    is_made: bool
    """Whether its storage was made in this pass."""
    address: int
    form: _Form


@dataclass(slots=True)
class _Trace:
    """What the first pass tells: it has to reach the end of the module.

    It is sound if the same operations on the same tensors follow from it whatever the weights are: if no number decides
    what is done, all is done by operations, and a pass leaves what it begins with as it is.
    """

    operations: list[_Operation] = field(default_factory=list)
    uses: dict[_Place, int] = field(default_factory=dict)
    """The last operation that uses an output."""
    reads: dict[int, int] = field(default_factory=dict)
    """The first operation that reads a storage, by its address."""
    is_sound: bool = True
    _makers: dict[int, _Maker] = field(default_factory=dict)
    """By the identity of a tensor."""
    _made: set[int] = field(default_factory=set)
    """The addresses of storages that were made in this pass."""

    def add(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note an operation that was run."""
        number = len(self.operations)
        given, options = _parted(args, kwargs)
        outputs, structure = tree_flatten(result)
        makers = [self.maker(tensor) for tensor in given]
        if not self._is_known(func, given, makers, outputs):
            self.is_sound = False
            return
        for tensor, maker in zip(given, makers, strict=True):
            if maker is not None:
                self.uses[maker.place] = number
            if not func.is_view:
                self.reads.setdefault(_address(tensor), number)
        # What is written to what was there before is there in the next pass, which does not write it again.
        written = map(self.maker, written_arguments(func, args, kwargs))
        self.is_sound = all(maker is not None and maker.is_made for maker in written)
        is_made = not func.is_view or all(maker is not None and maker.is_made for maker in makers)
        ids = {id(tensor): _Argument(index) for index, tensor in enumerate(given)}
        known: list[Any] = []
        for index, output in enumerate(outputs):
            if not isinstance(output, torch.Tensor):
                known.append(output)
            elif id(output) in ids:
                known.append(ids[id(output)])
            else:
                form, address = _Form.of(output), _address(output)
                known.append(form)
                self._makers[id(output)] = _Maker(weakref.ref(output), (number, index), is_made, address, form)
                if is_made:
                    self._made.add(address)
        self.operations.append(_Operation(func, options, known, structure))

    def _is_known(
        self, func: Any, given: Sequence[torch.Tensor], makers: Sequence[_Maker | None], outputs: Sequence[Any]
    ) -> bool:
        """Whether all of an operation can be told from what was seen before."""
        tensors = (*given, *(output for output in outputs if isinstance(output, torch.Tensor)))
        if any(tensor.layout is not torch.strided or tensor.is_nested for tensor in tensors):
            return False
        numbers = [output for output in outputs if not isinstance(output, torch.Tensor | None)]
        if numbers and given and not func.name().startswith("aten::sym_"):
            return False
        for tensor, maker in zip(given, makers, strict=True):
            address = _address(tensor)
            if maker is not None:
                # It was given another storage, or another shape where it lies.
                if (maker.address, maker.form) != (address, _Form.of(tensor)):
                    return False
            elif address in self._made and func not in _FROM_PYTHON:
                # Something without an operation has made it of what one gave: a parameter, fused code.
                return False
        return True

    def maker(self, tensor: torch.Tensor) -> _Maker | None:
        """Where a tensor comes from; None if it was there before."""
        maker = self._makers.get(id(tensor))
        # A tensor may have the identity of one that is gone.
        return maker if maker is not None and maker.tensor() is tensor else None

    def finish(self) -> None:
        """Tell each operation what nobody uses after it."""
        self._makers.clear()
        self._made.clear()
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


_FROM_PYTHON = frozenset({torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default})
"""What begins with a tensor that was made of numbers of Python."""


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

    def __init__(self, run: Run, weights: Callable[[], Mapping[str, torch.Tensor]], *, may_fuse: bool = False) -> None:
        self._run, self._weights = run, weights
        # Of operations that a script fuses nobody is told.
        self._trace = _Trace(is_sound=not may_fuse)
        self._is_traced = False
        self._done = self._next = 0
        """How many operations need not be run again, and the number of the next one."""
        self._values: dict[_Place, torch.Tensor] = {}
        """Outputs that later operations use."""
        self._versions: set[tuple[int, int]] = set()
        """Of the weights in the last pass."""

    @property
    def nbytes(self) -> int:
        """How much memory the outputs take that are held, beside the weights of which some are views."""
        storages = {_address(value): value.untyped_storage() for value in self._values.values()}
        weights = {address for address, _ in self._versions}
        return sum(storage.nbytes() for address, storage in storages.items() if address not in weights)

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
        versions = _versions(weights)
        # What reads a weight that has changed, or is to be shown, has to be run.
        wanted = {address for address, _ in versions ^ self._versions} | {
            _address(weights[name]) for name in names if name in weights
        }
        if any(self._trace.reads[address] < self._done for address in wanted & self._trace.reads.keys()):
            self.clear()
        self._versions, self._next = versions, 0

    def _end(self, *, is_complete: bool) -> None:
        if _versions(self._weights()) != self._versions:
            # The module has changed itself.
            self._give_up()
        elif self._is_traced:
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
        operation, (given, options) = self._known(), _parted(args, kwargs)
        if operation is None or (operation.func, operation.options) != (func, options):
            raise _DivergedError
        outputs: list[Any] = []
        for index, output in enumerate(operation.outputs):
            if isinstance(output, _Argument):
                outputs.append(given[output])
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
            try:
                self._trace.add(func, args, kwargs, result)
            except Exception:  # noqa: BLE001 - of a kind of tensor that nobody thought of
                self._trace.is_sound = False
            return
        operation, outputs = self._known(), tree_flatten(result)[0]
        if operation is None or not _is_same(operation, func, _parted(args, kwargs)[1], outputs):
            if self._done:
                raise _DivergedError
            self._give_up()
            return
        for index, output in enumerate(outputs):
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


def _is_same(operation: _Operation, func: Any, options: list[Any], outputs: list[Any]) -> bool:
    """Whether an operation is that of the first pass, with outputs of the same forms."""
    forms = zip(operation.outputs, outputs, strict=True)
    return (operation.func, operation.options, len(operation.outputs)) == (func, options, len(outputs)) and all(
        form == _Form.of(output) for form, output in forms if isinstance(form, _Form)
    )


def _parted(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[torch.Tensor], list[Any]]:
    """The tensors among the arguments, and the others."""
    tensors: list[torch.Tensor] = []
    others: list[Any] = []
    # By hand, as PyTorch's own way for any structure takes ten times as long, for each operation again.
    rest: list[Any] = [args, *kwargs.values()]
    for item in rest:
        if isinstance(item, tuple | list):
            rest += item
        elif isinstance(item, torch.Tensor):
            tensors.append(item)
        else:
            others.append(item)
    return tensors, others


def _versions(weights: Mapping[str, torch.Tensor]) -> set[tuple[int, int]]:
    """Where weights lie, and how often each was written to."""
    return {(_address(weight), weight._version) for weight in weights.values()}  # noqa: SLF001


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
