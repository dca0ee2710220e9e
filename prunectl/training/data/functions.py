"""Data from Python code: a user's function (arrays, batches or an indexable data set), or random data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from prunectl.errors import InputError, PrunectlError, UsageError, WorkError
from prunectl.formats.base import Array
from prunectl.plugins import attribute
from prunectl.pruning import RANDOM_PREFIX
from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.readers import TARGETS, IndexedSource, IterableSource, from_arrays
from prunectl.training.data.source import Arrays, Batch, Indices, Source, as_tuple, concatenate, take_rows
from prunectl.training.data.spec import FUNCTION, DataSpec, parse_count, parse_shape

_RETURNS = "return arrays (x, y) or a dictionary of them, an iterable of batches, or a data set with len() and indexing"

_END = object()


class _Indexable(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Any: ...


class _PortNames(NamedTuple):
    """The names of a model's inputs and outputs, by which a dictionary's arrays are looked up."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @classmethod
    def of(cls, signature: ModelSignature | None) -> _PortNames:
        if signature is None:
            return cls()
        return cls(tuple(port.name for port in signature.inputs), tuple(port.name for port in signature.outputs))


def open_function(spec: DataSpec, signature: ModelSignature | None, *_: object) -> Source:
    """Open the data that `package.module:function` or `./file.py:function` returns."""
    make = _resolve_function(spec)
    examples = make()
    names = _PortNames.of(signature)
    if _is_complete(examples):
        batch = _batch(spec.where, _parts(examples), names)
        y = {} if batch.y is None else _named_arrays(_target_name(examples, names) or "y", batch.y)
        return from_arrays(spec.text, _named_arrays("x", batch.x), y)
    if _is_indexable(examples):
        return _from_examples(spec, cast("_Indexable", examples), names)
    if isinstance(examples, Iterable) or _is_keras(examples):
        return _from_batches(spec, make, examples, names)
    raise InputError(f"{spec.where} returns an object of type {type(examples).__name__}", hint=_RETURNS)


def function_names(spec: DataSpec) -> list[str]:
    """The keys of the dictionary that a function returns for its first examples, if it returns one."""
    examples = _resolve_function(spec)()
    item = examples
    if _is_indexable(examples) or _is_keras(examples):
        item = _with_error_report(spec.where, lambda: examples[0])() if len(examples) else ()
    elif not _is_complete(examples) and isinstance(examples, Iterable):
        item = _with_error_report(spec.where, lambda: next(iter(examples), ()))()
    return [str(name) for part in _parts(item) if isinstance(part, Mapping) for name in part]


def _resolve_function(spec: DataSpec) -> Callable[[], Any]:
    """Import the function that a SPEC names."""
    named = FUNCTION.fullmatch(spec.where)
    function = attribute(*named.groups()) if named else None
    if not callable(function):
        raise UsageError(f"{spec.where} is not a function", hint=_RETURNS)
    return _with_error_report(spec.where, function)


def _with_error_report(where: str, function: Callable[[], Any]) -> Callable[[], Any]:
    """Wrap a user's function so that its exceptions are reported as its own."""

    def call() -> Any:
        try:
            return function()
        except PrunectlError:
            raise
        except Exception as error:
            raise WorkError(f"{where} raised {type(error).__name__}: {error}") from error

    return call


def _from_batches(
    spec: DataSpec, make: Callable[[], Any], examples: Iterable[Any], names: _PortNames
) -> IterableSource:
    def items_of(batches: Iterable[Any]) -> Iterator[Any]:
        # Keras data sets (PyDataset) are indexed by batch, and iterating over them never ends.
        numbered = cast("Any", batches)
        each = (numbered[index] for index in range(len(numbered))) if _is_keras(batches) else iter(batches)
        advance = _with_error_report(spec.where, lambda: next(each, _END))
        while (item := advance()) is not _END:
            yield item

    def items() -> Iterator[Any]:
        # An iterator can be read only once, so the function is called again for the next pass.
        return items_of(make() if isinstance(examples, Iterator) else examples)

    def read() -> Iterator[Batch]:
        for item in items():
            yield _batch(spec.where, _parts(item), names)

    first = next(items(), _END)
    if first is _END:
        raise InputError(f"{spec.where} returns no batches", hint=_RETURNS)
    has_targets = _batch(spec.where, _parts(first), names).y is not None
    return IterableSource(spec.text, None, has_targets, read, target_name=_target_name(first, names))


def _from_examples(spec: DataSpec, examples: _Indexable, names: _PortNames) -> IndexedSource:
    count = len(examples)
    if not count:
        raise InputError(f"{spec.where} returns a data set without examples")

    def batch_of(item: Any) -> Batch:
        parts = [_map(lambda array: np.asarray(array)[None], part) for part in _parts(item)]
        return _batch(spec.where, parts, names)

    def take(numbers: Indices) -> Batch:
        batches = [batch_of(item(int(number))) for number in numbers]
        return concatenate(batches) if batches else take_rows(batch_of(first), slice(0, 0))

    def item(number: int) -> Any:
        return _with_error_report(spec.where, lambda: examples[number])()

    first = item(0)
    has_targets = batch_of(first).y is not None
    return IndexedSource(spec.text, count, has_targets, take, target_name=_target_name(first, names))


def _batch(where: str, parts: Sequence[Any], names: _PortNames) -> Batch:
    """Convert what a function returned to a batch."""
    if not 1 <= len(parts) <= 2:
        raise InputError(f"{where} returns batches of {len(parts)} parts", hint="a batch must be (x, y), or only x")
    x = _arrays(where, parts[0], "inputs", names.inputs)
    name = _target_name(parts, names)
    given = parts[-1][name] if name else parts[1] if len(parts) == 2 else None
    y = None if given is None else _arrays(where, given, "outputs", names.outputs)
    lengths = [len(array) for array in (*as_tuple(x), *(() if y is None else as_tuple(y)))]
    if len(set(lengths)) > 1:
        raise InputError(f"{where}: the arrays of a batch have different numbers of examples: {lengths}")
    return Batch(x, y)


def _parts(item: Any) -> Sequence[Any]:
    return item if isinstance(item, tuple | list) else (item,)


def _target_name(item: Any, names: _PortNames) -> str:
    """The key of the targets in a dictionary: the inputs' own, as in Hugging Face data sets, or a second one."""
    part, *others = _parts(item) or ((),)
    if others:
        # Targets of named outputs are looked up by the names of the outputs.
        part = () if names.outputs else others[0]
    if not isinstance(part, Mapping):
        return ""
    return next((name for name in TARGETS if name in part and (others or name not in names.inputs)), "")


def _arrays(where: str, part: Any, side: str, names: Sequence[str]) -> Arrays:
    if isinstance(part, Mapping):
        missing = [name for name in names if name not in part]
        if missing or not names:
            raise InputError(
                f"{where} returns a dictionary of {', '.join(map(str, part))}",
                hint=f"the model's {side} are {', '.join(names) or 'not named'}; or return a tuple in their order",
            )
        arrays = tuple(_array(where, part[name]) for name in names)
        return arrays[0] if len(arrays) == 1 else arrays
    if isinstance(part, tuple | list) and part and all(map(_is_array, part)):
        return tuple(_array(where, array) for array in part)
    return _array(where, part)


def _array(where: str, value: Any) -> Array:
    try:
        array: Array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{where} returns an object of type {type(value).__name__}, which is not an array: {error}"
        ) from error
    if array.ndim == 0:
        raise InputError(f"{where} returns a single {type(value).__name__} instead of a batch", hint=_RETURNS)
    return array


def _map(change: Callable[[Any], Array], part: Any) -> Any:
    if isinstance(part, Mapping):
        return {name: change(array) for name, array in part.items()}
    if isinstance(part, tuple | list) and part and all(map(_is_array, part)):
        return tuple(change(array) for array in part)
    return change(part)


def _named_arrays(side: str, arrays: Arrays) -> dict[str, Array]:
    many = as_tuple(arrays)
    return {side if len(many) == 1 else f"{side}[{index}]": array for index, array in enumerate(many)}


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "shape")


def _is_complete(value: Any) -> bool:
    """Whether it holds all examples: an array, a dictionary of arrays or lists, or a pair of inputs and targets."""
    if isinstance(value, Mapping):
        return all(_is_array(array) or type(array) is list for array in value.values())
    return _is_array(value) or _is_pair_of_arrays(value)


def _is_pair_of_arrays(value: Any) -> bool:
    """Whether it is (x, y), each of which may be several arrays, rather than a list of batches."""
    return isinstance(value, tuple) and len(value) == 2 and all(_is_side(part) for part in value)


def _is_side(part: Any) -> bool:
    return _is_array(part) or (isinstance(part, tuple | Mapping) and all(map(_is_array, _values(part))))


def _values(part: Any) -> Iterable[Any]:
    return part.values() if isinstance(part, Mapping) else part


def _is_indexable(value: Any) -> bool:
    is_list = isinstance(value, tuple | list | Mapping | str | bytes)
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not is_list and not _is_keras(value)


def _is_keras(value: Any) -> bool:
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and hasattr(value, "on_epoch_end")


def open_random(spec: DataSpec, signature: ModelSignature | None, seed: int) -> IndexedSource:
    """Open `random:64`: normally distributed floats, and labels of every class."""
    count = parse_count("random", spec.where.removeprefix(RANDOM_PREFIX))
    if signature is None or not signature.inputs:
        raise UsageError(f"{spec.where} needs a model whose inputs are known")
    typed = [parse_shape("shape", part) for part in spec.options["shape"].split("+")] if "shape" in spec.options else []
    if typed and len(typed) != len(signature.inputs):
        raise UsageError(
            f"shape={spec.options['shape']} has {len(typed)} shapes, but the model has {len(signature.inputs)} inputs"
        )
    random = np.random.default_rng(seed)
    x = {}
    for index, port in enumerate(signature.inputs):
        shape = typed[index] if typed else _known_shape(port)
        x[f"input {index}"] = random_array(random, (count, *shape), port.dtype)
    y = {f"output {index}": _labels(random, count, port) for index, port in enumerate(signature.outputs)}
    note = f"{spec.where}: the data is random, so that an accuracy or a loss on it would mean nothing"
    return from_arrays(spec.text, x, y, note)


def _known_shape(port: TensorSpec) -> tuple[int, ...]:
    shape = port.shape
    if shape is None or any(length is None for length in shape):
        raise UsageError(
            f"the model does not give the length of every axis of its input {port.name!r}: {_axes_text(port)}",
            hint="write 'random:64?shape=3x224x224' (several inputs: shape=3x224x224+10)",
        )
    return tuple(length for length in shape if length is not None)


def _axes_text(port: TensorSpec) -> str:
    return "unknown" if port.shape is None else str(port.shape).replace("None", "?")


def random_array(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Random zeros and ones for integer types, else normally distributed floats."""
    if dtype.startswith(("int", "uint", "bool")):
        # The range of these integers is unknown, but 0 and 1 are in every vocabulary.
        return random.integers(0, 2, shape).astype(dtype)
    return random.standard_normal(shape, np.float32)


def _labels(random: np.random.Generator, count: int, port: TensorSpec) -> Array:
    """A random label for each vector of outputs; of two classes if there is one output, or their number is unknown."""
    shape = port.shape or (None,)
    inner = tuple(length or 1 for length in shape[:-1])
    classes = shape[-1] or 2
    return random.integers(0, max(2, classes), (count, *inner))
