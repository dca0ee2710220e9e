"""Repeated forward passes of one batch, each of which resumes where the last one stopped.

Layers are fitted one after the other, each with the inputs that the pruned layers before it give. A new pass for each
would recompute all earlier layers, which for a deep network is most of the work. The code of the model still runs from
its beginning, but operations before the first changed weight are skipped. They return their cached output or, if no
later operation uses it, an uninitialised tensor of the same shape.
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
"""Runs a batch through the model, and passes each operation to the cache."""
_OutputId = tuple[int, int]
"""The number of an operation, and the index of one of its outputs."""


class _DivergedError(Exception):
    """A pass runs other operations than the first one."""


class _TensorForm(NamedTuple):
    """The metadata of a tensor, without its values."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _TensorForm:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def empty(self) -> torch.Tensor:
        # On the same device, since PyTorch dispatches by device. Memory that is never written to is not committed.
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class _ArgumentIndex(int):
    """The index of a tensor among the arguments, for an operation that returns one of them."""


@dataclass(frozen=True, slots=True)
class _Operation:
    """An operation as recorded in the first pass."""

    func: Any
    options: list[Any]
    """The arguments that are not tensors."""
    outputs: list[Any]
    """A form or an argument index for each tensor; other outputs as they are."""
    structure: Any
    """How the outputs are nested."""
    last_uses: list[_OutputId] = field(default_factory=list)
    """The outputs that no later operation uses."""


class _Origin(NamedTuple):
    """The operation output that a tensor is."""

    tensor: weakref.ref[torch.Tensor]
    output: _OutputId
    is_new: bool
    """Whether its storage was allocated in this pass."""
    address: int
    form: _TensorForm


@dataclass(slots=True)
class _Trace:
    """The operations of the first pass, which has to reach the end of the module.

    It is sound if the module runs the same operations on the same tensors whatever its weights are: if control flow
    does not depend on values, operations do all work, and a pass does not change tensors that existed before it.
    """

    operations: list[_Operation] = field(default_factory=list)
    uses: dict[_OutputId, int] = field(default_factory=dict)
    """The number of the last operation that uses each output."""
    reads: dict[int, int] = field(default_factory=dict)
    """The number of the first operation that reads each storage, by the address of the storage."""
    is_sound: bool = True
    _origins: dict[int, _Origin] = field(default_factory=dict)
    """By the `id` of a tensor."""
    _new_storages: set[int] = field(default_factory=set)
    """The addresses of storages that were allocated in this pass."""

    def add(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Record an operation that was run."""
        number = len(self.operations)
        tensors, options = _split_tensors(args, kwargs)
        outputs, structure = tree_flatten(result)
        origins = [self.origin(tensor) for tensor in tensors]
        if not self._is_replayable(func, tensors, origins, outputs):
            self.is_sound = False
            return
        for tensor, origin in zip(tensors, origins, strict=True):
            if origin is not None:
                self.uses[origin.output] = number
            if not func.is_view:
                self.reads.setdefault(_address(tensor), number)
        # A write to a tensor that existed before the pass would not be repeated where the operation is skipped.
        written = map(self.origin, written_arguments(func, args, kwargs))
        self.is_sound = all(origin is not None and origin.is_new for origin in written)
        is_new = not func.is_view or all(origin is not None and origin.is_new for origin in origins)
        ids = {id(tensor): _ArgumentIndex(index) for index, tensor in enumerate(tensors)}
        recorded: list[Any] = []
        for index, output in enumerate(outputs):
            if not isinstance(output, torch.Tensor):
                recorded.append(output)
            elif id(output) in ids:
                recorded.append(ids[id(output)])
            else:
                form, address = _TensorForm.of(output), _address(output)
                recorded.append(form)
                self._origins[id(output)] = _Origin(weakref.ref(output), (number, index), is_new, address, form)
                if is_new:
                    self._new_storages.add(address)
        self.operations.append(_Operation(func, options, recorded, structure))

    def _is_replayable(
        self, func: Any, inputs: Sequence[torch.Tensor], origins: Sequence[_Origin | None], outputs: Sequence[Any]
    ) -> bool:
        """Whether an operation depends only on operations and tensors that the trace has recorded."""
        tensors = (*inputs, *(output for output in outputs if isinstance(output, torch.Tensor)))
        if any(tensor.layout is not torch.strided or tensor.is_nested for tensor in tensors):
            return False
        numbers = [output for output in outputs if not isinstance(output, torch.Tensor | None)]
        if numbers and inputs and not func.name().startswith("aten::sym_"):
            return False
        for tensor, origin in zip(inputs, origins, strict=True):
            address = _address(tensor)
            if origin is not None:
                # Its storage or shape was changed without an operation.
                if (origin.address, origin.form) != (address, _TensorForm.of(tensor)):
                    return False
            elif address in self._new_storages and func not in _FROM_PYTHON:
                # It was derived from an output without an operation, as by Parameter() or fused code.
                return False
        return True

    def origin(self, tensor: torch.Tensor) -> _Origin | None:
        """The operation output that a tensor is; None if it existed before the pass."""
        origin = self._origins.get(id(tensor))
        # A tensor may have the `id` of one that was freed.
        return origin if origin is not None and origin.tensor() is tensor else None

    def finish(self) -> None:
        """Set the last uses of each operation."""
        self._origins.clear()
        self._new_storages.clear()
        for output, last in self.uses.items():
            self.operations[last].last_uses.append(output)


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
"""Functions that read values without an operation, and so could read uninitialised tensors unnoticed."""


_FROM_PYTHON = frozenset({torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default})
"""Operations on a tensor that was created from Python numbers."""


class _ReadDetector(TorchFunctionMode):
    """Marks a trace as unsound if the code of the model reads values itself."""

    def __init__(self, trace: _Trace) -> None:
        self._trace = trace

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READS and self._trace.origin(args[0]) is not None:
            self._trace.is_sound = False
        return func(*args, **(kwargs or {}))


class CachedPass:
    """Repeated passes of one batch, with the outputs that later passes need."""

    def __init__(self, run: Run, weights: Callable[[], Mapping[str, torch.Tensor]], *, may_fuse: bool = False) -> None:
        self._run, self._weights = run, weights
        # Operations that TorchScript fuses are not dispatched one by one.
        self._trace = _Trace(is_sound=not may_fuse)
        self._is_traced = False
        self._done = self._next = 0
        """The number of operations that need not be run again, and the number of the next operation."""
        self._values: dict[_OutputId, torch.Tensor] = {}
        """Outputs that later operations use."""
        self._versions: set[tuple[int, int]] = set()
        """Storage address and version of each weight in the last pass."""

    @property
    def nbytes(self) -> int:
        """Bytes of the cached outputs, without those that are views of weights."""
        storages = {_address(value): value.untyped_storage() for value in self._values.values()}
        weights = {address for address, _ in self._versions}
        return sum(storage.nbytes() for address, storage in storages.items() if address not in weights)

    def clear(self) -> None:
        """Drop all cached outputs: the next pass starts from the beginning."""
        self._done = 0
        self._values.clear()

    def observe(self, names: Collection[str], x: Arrays, callback: InputCallback) -> None:
        """Run the batch, and pass the inputs of these weights to the callback."""
        if not self._trace.is_sound:
            self._run(names, x, callback, None)
            return
        self._begin(names)
        is_resumed, counted = self._done > 0, _Callback(callback)
        try:
            with nullcontext() if self._is_traced else _ReadDetector(self._trace):
                self._run(names, x, counted, self)
        except Exception:
            if counted.has_failed:
                self._end(is_complete=False)
                raise
            self._give_up()
            if not is_resumed:
                raise
            self._run(names, x, counted.for_the_rest(), None)
        else:
            self._end(is_complete=True)

    def _give_up(self) -> None:
        """Run only whole passes from now on."""
        self._trace.is_sound = False
        self.clear()

    def _begin(self, names: Collection[str]) -> None:
        if not self._is_traced:
            self._trace = _Trace()
        weights = self._weights()
        versions = _versions(weights)
        # Operations that read a changed or requested weight have to be run.
        rerun = {address for address, _ in versions ^ self._versions} | {
            _address(weights[name]) for name in names if name in weights
        }
        if any(self._trace.reads[address] < self._done for address in rerun & self._trace.reads.keys()):
            self.clear()
        self._versions, self._next = versions, 0

    def _end(self, *, is_complete: bool) -> None:
        if _versions(self._weights()) != self._versions:
            # The module has changed its own weights.
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
        """The outputs of an operation that is not run again."""
        operation, (tensors, options) = self._recorded(), _split_tensors(args, kwargs)
        if operation is None or (operation.func, operation.options) != (func, options):
            raise _DivergedError
        outputs: list[Any] = []
        for index, output in enumerate(operation.outputs):
            if isinstance(output, _ArgumentIndex):
                outputs.append(tensors[output])
            elif isinstance(output, _TensorForm):
                value = self._values.get((self._next, index))
                outputs.append(output.empty() if value is None else value.data)
            else:
                outputs.append(output)
        self._next += 1
        return tree_unflatten(outputs, operation.structure)

    def note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Record an operation that was run, and cache its outputs if later operations use them."""
        if not self._trace.is_sound:
            return
        if not self._is_traced:
            try:
                self._trace.add(func, args, kwargs, result)
            except Exception:  # noqa: BLE001 - an unforeseen kind of tensor
                self._trace.is_sound = False
            return
        operation, outputs = self._recorded(), tree_flatten(result)[0]
        if operation is None or not _is_same(operation, func, _split_tensors(args, kwargs)[1], outputs):
            if self._done:
                raise _DivergedError
            self._give_up()
            return
        for index, output in enumerate(outputs):
            if (self._next, index) in self._trace.uses:
                # `.data`, here and in `skip`: PyTorch runs other operations on a tensor that is referenced elsewhere.
                self._values[self._next, index] = output.data
        for output_id in operation.last_uses:
            self._values.pop(output_id, None)
        self._next += 1

    def _recorded(self) -> _Operation | None:
        """The operation that the first pass ran at this point."""
        operations = self._trace.operations
        return operations[self._next] if self._next < len(operations) else None


class _Callback:
    """Wraps a callback: counts its calls, skips the first of them, and records whether it raised an error."""

    def __init__(self, callback: InputCallback, skipped: int = 0) -> None:
        self._callback, self._count, self._skipped = callback, 0, skipped
        self.has_failed = False

    def __call__(self, capture: LayerInput) -> None:
        self._count += 1
        if self._count <= self._skipped:
            return
        try:
            self._callback(capture)
        except BaseException:
            self.has_failed = True
            raise

    def for_the_rest(self) -> _Callback:
        """A callback that skips the captures that were passed on already."""
        return _Callback(self._callback, self._count)


def _is_same(operation: _Operation, func: Any, options: list[Any], outputs: list[Any]) -> bool:
    """Whether an operation is that of the first pass, with outputs of the same forms."""
    forms = zip(operation.outputs, outputs, strict=True)
    return (operation.func, operation.options, len(operation.outputs)) == (func, options, len(outputs)) and all(
        form == _TensorForm.of(output) for form, output in forms if isinstance(form, _TensorForm)
    )


def _split_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[torch.Tensor], list[Any]]:
    """The tensors among the arguments, and the other arguments."""
    tensors: list[torch.Tensor] = []
    others: list[Any] = []
    # By hand, since PyTorch's own pytree functions take ten times as long, and this runs for each operation.
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
    """Storage address and version of each weight: the version counts in-place writes."""
    return {(_address(weight), weight._version) for weight in weights.values()}  # noqa: SLF001


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
