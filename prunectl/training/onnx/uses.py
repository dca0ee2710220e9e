"""Where the numbers of each tensor stand in an ONNX message, under the name that the file handler gives it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.errors import InputError, first_line
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.onnx.model import Names
from prunectl.formats.onnx.tensors import CODES, STRING
from prunectl.formats.onnx.usage import CELLS
from prunectl.formats.safe_json import require
from prunectl.training.layer_inputs import WeightUse

STANDARD = ("", "ai.onnx")
MICROSOFT = "com.microsoft"
"""Operators that onnxruntime brings along."""


def get_attribute(node: Any, name: str, default: Any) -> Any:
    """An attribute as a plain value."""
    for attribute in node.attribute:
        if attribute.name == name:
            return _plain(attribute)
    return default


def input_of(node: Any, place: int) -> str:
    """The name of an input; empty if it is left out."""
    return str(node.input[place]) if place < len(node.input) else ""


def output_of(node: Any, place: int) -> str:
    """The name of an output; empty if it is left out."""
    return str(node.output[place]) if place < len(node.output) else ""


def label(node: Any) -> str:
    """What the file handler calls a node: its name, else that of its first output."""
    return str(node.name or output_of(node, 0) or node.op_type)


def subgraphs(node: Any) -> Iterable[tuple[str, Any]]:
    """Yield the graphs inside a node, with the names that the file handler gives them."""
    for attribute in node.attribute:
        found = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
        for number, graph in enumerate(found):
            yield (attribute.name if len(found) == 1 else f"{attribute.name}_{number}"), graph


def _plain(attribute: Any) -> Any:
    match attribute.type:
        case 1:
            return float(attribute.f)
        case 3:
            return attribute.s.decode()
        case 7:
            return tuple(attribute.ints)
        case 8:
            return tuple(text.decode() for text in attribute.strings)
        case _:
            return int(attribute.i)


_FLOAT = 1


@dataclass(frozen=True, slots=True)
class WeightLocation:
    """A tensor of numbers, in a graph or in a Constant node of it."""

    name: str
    """Its name in the model."""
    inner: str
    """Its name in that graph."""
    data_type: int
    scope: Any
    """The graph or the function around it."""
    is_main: bool
    node: Any = None
    """The Constant node that makes it."""
    dense: Any = None
    """The message of its numbers."""
    sparse: Any = None
    """The message of its numbers without the zeros."""


def tensor_locations(model: Any) -> Iterator[WeightLocation]:
    """Yield all tensors in the order in which the file handler names them."""
    names = Names()
    waiting: list[tuple[str, Any]] = [("", model.graph)]
    waiting += [(f"{function.name}/", function) for function in model.functions]
    training = [graph for part in model.training_info for graph in _of_training(part)]
    waiting += [(f"training_{number}/", graph) for number, graph in enumerate(training)]
    for number, (prefix, scope) in enumerate(waiting):
        for place in _inside(scope, is_main=number == 0):
            yield _named(place, names.unique(prefix + place.inner))
        for node in scope.node:
            waiting.extend((f"{prefix}{label(node)}/{name}/", graph) for name, graph in subgraphs(node))


def _of_training(part: Any) -> Iterator[Any]:
    yield from (getattr(part, field) for field in ("initialization", "algorithm") if part.HasField(field))


def _named(place: WeightLocation, name: str) -> WeightLocation:
    return WeightLocation(
        name, place.inner, place.data_type, place.scope, place.is_main, place.node, place.dense, place.sparse
    )


def _inside(scope: Any, *, is_main: bool) -> Iterator[WeightLocation]:
    for tensor in getattr(scope, "initializer", ()):
        if tensor.data_type != STRING:
            yield WeightLocation("", tensor.name, tensor.data_type, scope, is_main, dense=tensor)
    for sparse in getattr(scope, "sparse_initializer", ()):
        yield WeightLocation("", sparse.values.name, sparse.values.data_type, scope, is_main, sparse=sparse)
    for node in scope.node:
        place = _constant(node, scope, is_main=is_main)
        if place is not None and place.data_type != STRING:
            yield place


def _constant(node: Any, scope: Any, *, is_main: bool) -> WeightLocation | None:
    """The array that a Constant node makes; none for a scalar or a list of whole numbers, as in the handler."""
    if node.op_type != "Constant" or not node.output:
        return None
    name = node.output[0]
    for attribute in node.attribute:
        if attribute.name == "value" and attribute.t.dims:
            return WeightLocation("", name, attribute.t.data_type, scope, is_main, node=node, dense=attribute.t)
        if attribute.name == "sparse_value":
            data_type = attribute.sparse_tensor.values.data_type
            return WeightLocation("", name, data_type, scope, is_main, node=node, sparse=attribute.sparse_tensor)
        if attribute.name == "value_floats":
            return WeightLocation("", name, _FLOAT, scope, is_main, node=node)
    return None


INLINE_BYTES = 1 << 12
"""Up to this a tensor stays in the message, where onnxruntime looks for shapes and axes."""
_LISTED_BEFORE = 4
"""Version of the format before which a tensor had to be listed among the inputs."""
_TENSOR, _EXTERNAL = 4, 1
_STATES = "prunectl/states_"


@dataclass(frozen=True, slots=True)
class InitializerLayout:
    """The tensors of a message by their names in the model."""

    inside: Mapping[str, Any]
    """Those whose numbers it holds."""
    outside: frozenset[str]
    """Those whose numbers are given beside it: they are not copied, and a message has no room for 2 GB."""
    main: frozenset[str]
    """Those of the main graph."""


def normalize_initializers(proto: Any, tensors: Mapping[str, Tensor]) -> InitializerLayout:
    """Let every tensor be dense, each of the main graph an initializer, large ones outside; none is filled."""
    inside, outside, main = {}, set(), set()
    for place in list(tensor_locations(proto)):
        tensor = tensors.get(place.name)
        if tensor is None:
            continue
        slot = _slot(place)
        slot.Clear()
        slot.name, slot.data_type = place.inner, place.data_type
        slot.dims.extend(tensor.shape)
        if place.is_main:
            main.add(place.name)
        if place.is_main and tensor.nbytes > INLINE_BYTES and _is_plain(tensor):
            outside.add(place.name)
            _refer(slot, tensor)
        else:
            inside[place.name] = slot
    proto.ClearField("training_info")
    _delist(proto, main)
    _name_states(proto.graph)
    return InitializerLayout(inside, frozenset(outside), frozenset(main))


def set_tensor_data(slot: Any, array: Array) -> None:
    """Write the numbers of a tensor into the message."""
    if CODES[slot.data_type].bits >= 8:
        slot.raw_data = np.ascontiguousarray(array).tobytes()
        return
    packed = require("onnx.numpy_helper", extra="onnx").from_array(array)
    slot.raw_data = packed.raw_data


def _slot(place: WeightLocation) -> Any:
    """An empty message of a tensor in the place of what was there."""
    if place.node is None and place.dense is not None:
        return place.dense
    if place.node is None:
        place.scope.sparse_initializer.remove(place.sparse)
        return place.scope.initializer.add()
    if place.is_main:
        place.scope.node.remove(place.node)
        return place.scope.initializer.add()
    del place.node.attribute[:]
    attribute = place.node.attribute.add()
    attribute.name, attribute.type = "value", _TENSOR
    return attribute.t


def _is_plain(tensor: Tensor) -> bool:
    """Whether NumPy itself knows its numbers, as onnxruntime asks of what it is given."""
    return tensor.dtype.isbuiltin == 1 and tensor.dtype.kind in "fiu"


def _refer(slot: Any, tensor: Tensor) -> None:
    """Mark a tensor as one that is given beside the message; the file that is named is never looked for."""
    slot.data_location = _EXTERNAL
    for key, value in (("location", "beside"), ("offset", "0"), ("length", str(tensor.nbytes))):
        entry = slot.external_data.add()
        entry.key, entry.value = key, value


def _delist(proto: Any, main: set[str]) -> None:
    """Leave only what really goes in among the inputs."""
    proto.ir_version = max(proto.ir_version, _LISTED_BEFORE)
    given = [port for port in proto.graph.input if port.name not in main]
    del proto.graph.input[:]
    proto.graph.input.extend(given)


def _name_states(graph: Any) -> None:
    """Let every recurrent layer give its states, which its weights meet one step later."""
    for number, node in enumerate(graph.node):
        if node.op_type in CELLS and not output_of(node, 0):
            rest = list(node.output[1:])
            del node.output[:]
            node.output.extend([f"{_STATES}{number}", *rest])


class LoadedWeights:
    """A model whose tensors can be changed; what was not stays in the file."""

    def __init__(self, model: ModelFile, proto: Any) -> None:
        self.model = model
        self.proto = proto
        """What onnxruntime is given, together with what stands outside."""
        self._tensors = {tensor.name: tensor for tensor in model.tensors}
        self._slots = normalize_initializers(proto, self._tensors)
        self._assigned: dict[str, Array] = {}
        for name, slot in self._slots.inside.items():
            set_tensor_data(slot, self.value(name))

    @property
    def weights(self) -> frozenset[str]:
        """The tensors of the main graph."""
        return self._slots.main

    @property
    def outside(self) -> dict[str, Array]:
        """The numbers that are not in the message."""
        return {name: self.value(name) for name in self._slots.outside}

    def tensor(self, name: str) -> Tensor:
        """What the file says of a tensor."""
        return self._tensors[name]

    def value(self, name: str) -> Array:
        """The numbers of a tensor, not to be written to."""
        found = self._assigned.get(name)
        return found if found is not None else self.model.read(self._tensors[name])

    def copies(self, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Copies of some tensors, or of all."""
        return {name: np.array(self.value(name)) for name in (self._tensors if names is None else names)}

    def assign(self, values: Mapping[str, Array]) -> None:
        """Replace the numbers of tensors, and of those that share their bytes in the file."""
        for name, value in values.items():
            tensor = self._tensors[name]
            if tensor.shape != np.shape(value):
                raise ValueError(f"{name} has the shape {tensor.shape}, not {np.shape(value)}")
            for tied in self._tensors.values():
                if tied.storage.key == tensor.storage.key:
                    self._put(tied, value)

    def _put(self, tensor: Tensor, value: Array) -> None:
        array = np.array(value, tensor.dtype).reshape(tensor.shape)
        self._assigned[tensor.name] = array
        if tensor.name not in self._slots.outside:
            set_tensor_data(self._slots.inside[tensor.name], array)


def load_weights(model: ModelFile) -> LoadedWeights:
    """Read the message of a model; the handler has checked where its numbers lie, and reads them."""
    onnx = require("onnx", extra="onnx")
    try:
        proto = onnx.load(model.path, load_external_data=False)
    except Exception as error:
        line = first_line(error)
        raise InputError(f"{model.path} cannot be read by onnx: {line}") from error
    return LoadedWeights(model, proto)


_REAL = frozenset({1, 10, 11, 16})
"""Types of element that a cast may lead to."""


@dataclass(frozen=True, slots=True)
class WeightSite:
    """A tensor at an input of a node."""

    name: str
    node: Any
    at: int
    """Number of the node in its graph."""
    place: int
    """Number of the input."""
    order: tuple[int, ...]
    """Which axis of the tensor each axis is that the node sees."""
    shape: tuple[int, ...]
    """As the node sees it."""


class WeightUses:
    """The users of every value of a graph."""

    def __init__(self, held: LoadedWeights) -> None:
        self._held = held
        self._users: dict[str, list[tuple[int, Any, int]]] = defaultdict(list)
        for at, node in enumerate(held.proto.graph.node):
            for place, name in enumerate(node.input):
                self._users[name].append((at, node, place))

    def of(self, names: Collection[str]) -> list[WeightSite]:
        """Where these tensors are used, in the order of the graph."""
        found = [
            meeting
            for name in dict.fromkeys(names)
            if name in self._held.weights and self._held.tensor(name).is_float
            for meeting in self._of(name)
        ]
        return sorted(found, key=lambda meeting: meeting.at)

    def _of(self, name: str) -> list[WeightSite]:
        shape = self._held.tensor(name).shape
        waiting = [(name, tuple(range(len(shape))))]
        found = []
        # A value has one maker, so that none is seen twice.
        for value, order in waiting:
            for at, node, place in self._users[value]:
                behind = _behind(node, order)
                if behind is None:
                    seen = tuple(shape[axis] for axis in order)
                    found.append(WeightSite(name, node, at, place, order, seen))
                elif output_of(node, 0):
                    waiting.append((output_of(node, 0), behind))
        return found


def _behind(node: Any, order: tuple[int, ...]) -> tuple[int, ...] | None:
    """The order of the axes behind a node that hands a tensor on; none if it does something else to it."""
    if node.domain not in STANDARD:
        return None
    match node.op_type:
        case "Identity":
            return order
        case "Cast" if get_attribute(node, "to", 0) in _REAL:
            return order
        case "Transpose":
            turned = get_attribute(node, "perm", tuple(reversed(range(len(order)))))
            return tuple(order[axis] for axis in turned)
        case _:
            return None


@dataclass(frozen=True, slots=True)
class RunValues:
    """What a pass through the graph left behind."""

    values: Mapping[str, Array]
    ran: int | None = None
    """Examples that went through, if some of them only filled up the batch."""
    count: int = 0
    """Those that did not."""

    def __getitem__(self, name: str) -> Array:
        return self.values[name]

    def axis(self, shape: tuple[int, ...]) -> int | None:
        """Which axis counts the examples: the first of that length, else one that counts parts of each."""
        assert self.ran is not None
        exact = (axis for axis, length in enumerate(shape) if length == self.ran)
        parts = (axis for axis, length in enumerate(shape) if length and length % self.ran == 0)
        return next(exact, next(parts, None))

    def real(self, array: Array, axes: int) -> Array | None:
        """An array without what only filled up the batch, where one of the first axes counts the examples."""
        if self.ran is None:
            return array
        axis = self.axis(array.shape[:axes])
        if axis is None:
            return None
        kept = array.shape[axis] // self.ran * self.count
        found: Array = array[(slice(None),) * axis + (slice(kept),)]
        return found


@dataclass(frozen=True, slots=True)
class InputCapture:
    """What must be known, and how it is then shown."""

    needs: tuple[str, ...]
    """Names of values."""
    show: Callable[[RunValues], Iterator[tuple[Array, WeightUse]]]
