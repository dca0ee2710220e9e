"""Find the tensors in the value of a pickle, and name them by their paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.budgets import (
    MAX_CHECKPOINT_DEPTH,
    MAX_CHECKPOINT_PLACES,
    MAX_NAMES_BYTES,
    MAX_TENSORS,
    MAX_WRAPPERS,
)
from prunectl.formats.torch import views
from prunectl.formats.torch.pickle.opcodes import Global, OpaqueCall, Persistent, PickleDict

_PARAMETERS = frozenset(
    {
        *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
        *("torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"),
        *("torch._utils._rebuild_device_tensor_from_cpu_tensor", "torch._utils._rebuild_device_tensor_from_numpy"),
        "torch._utils._rebuild_xla_tensor",
    }
)
"""Calls that wrap the tensor which is their first argument."""
_TYPED = frozenset({"torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type"})
_SPARSE = "torch._utils._rebuild_sparse_tensor"
_QUANTIZED = "torch._utils._rebuild_qtensor"
_LISTED = ("indices", "values")
_COMPRESSED = ("compressed_indices", "plain_indices", "values")
_QUANTIZER = ("qscheme", "scales", "zero_points")


CONSTANTS = "CONSTANTS"
"""The owner, in TorchScript code, of tensors that belong to no module."""


def is_tensor(value: Any) -> bool:
    """Whether a value is a dense tensor or a NumPy array, not something that contains one."""
    if isinstance(value, Persistent):
        return not isinstance(value.id, tuple)
    return isinstance(value, OpaqueCall) and (value.path in views.VIEW_CALLS or views.is_array(value))


def inner_tensor(value: Any) -> Any:
    """The tensor inside a parameter or a subclass; any other value as it is."""
    for _ in range(MAX_WRAPPERS):
        if not isinstance(value, OpaqueCall):
            break
        if value.arg(0) is not None and (value.path in _PARAMETERS or value.path.startswith("torch.jit._pickle.")):
            value = value.arg(0)
        elif value.path in _TYPED and isinstance(value.arg(2), tuple):
            inner = OpaqueCall(value.arg(0), value.arg(2), value.arg(3))
            if not is_tensor(inner) and inner.path != _SPARSE:
                break
            value = inner
        else:
            break
    return value


def component_tensors(call: OpaqueCall) -> tuple[tuple[str, Any], ...]:
    """The tensors that a sparse or quantized tensor consists of, with their names."""
    if call.path == _QUANTIZED:
        settings = call.arg(4)
        return tuple(zip(_QUANTIZER, settings, strict=False)) if isinstance(settings, tuple) else ()
    data = call.arg(1)
    if call.path != _SPARSE or not isinstance(data, tuple):
        return ()
    is_compressed = len(data) > 2 and isinstance(inner_tensor(data[2]), OpaqueCall)
    return tuple(zip(_COMPRESSED if is_compressed else _LISTED, data, strict=False))


Parameters = Mapping[str, frozenset[str]]
"""The trained attributes of each class that declares them, by its dotted path."""


@dataclass(slots=True, eq=False)
class TensorEntry:
    """A tensor in the value of a pickle, with its name and its owner."""

    name: str
    value: Any
    kind: str
    """Class of the module that owns it."""
    is_buffer: bool
    """Whether the file marks it as not trained."""
    owner: str = ""
    """The dotted path of the class that has it as an attribute, alone or in a list."""
    attribute: str = ""


@dataclass(slots=True, eq=False)  # Not frozen: a frozen instance takes three times as long to create.
class _Node:
    """A value with the path to it: its parents up to the root."""

    parent: _Node | None
    key: str
    value: Any
    depth: int = 0
    kind: str = ""
    is_buffer: bool = False
    excluded: Sequence[Any] = ()
    """Keys of it to skip, such as those of buffers that are not saved."""

    def child(
        self, key: str, value: Any, *, kind: str = "", is_buffer: bool = False, excluded: Sequence[Any] = ()
    ) -> _Node:
        return _Node(self, key, inner_tensor(value), self.depth + 1, kind, is_buffer, excluded)

    def name(self) -> str:
        keys: list[str] = []
        node: _Node | None = self
        while node is not None:
            if node.key:
                keys.append(node.key)
            node = node.parent
        return ".".join(reversed(keys))

    def owner(self) -> tuple[str, str]:
        """The class of the object around the value, and the attribute; empty if there is no such object."""
        attribute, node = self.key, self.parent
        while node is not None:
            if isinstance(node.value, OpaqueCall):
                return node.value.path, attribute
            attribute = node.key or attribute
            node = node.parent
        return "", ""

    def is_inside_itself(self) -> bool:
        node = self.parent
        while node is not None:
            if node.value is self.value:
                return True
            node = node.parent
        return False

    def cost(self) -> int:
        value = self.value.state if isinstance(self.value, OpaqueCall) else self.value
        items = value.items if isinstance(value, PickleDict) else value if isinstance(value, list | tuple) else ()
        return 1 + len(items) + len(self.excluded)


def list_tensors(path: Path, root: Any, parameters: Parameters) -> list[TensorEntry]:
    """Every tensor that a value holds, in the order of the program."""
    entries: list[TensorEntry] = []
    # The values are kept alive, so that no new one can get the id of a value that was visited.
    seen: dict[int, Any] = {}
    work, characters = 0, 0
    todo = [iter((_Node(None, "", inner_tensor(root)),))]
    while todo:
        node = next(todo[-1], None)
        if node is None:
            todo.pop()
            continue
        work += node.cost()
        if is_tensor(node.value):
            entries.append(
                TensorEntry(
                    node.name() or "tensor",
                    node.value,
                    node.kind,
                    node.is_buffer,
                    *(node.owner() if parameters else ()),
                )
            )
            characters += len(entries[-1].name)
        elif id(node.value) in seen:
            work += node.depth
            if not _may_be_shared(node.value) or node.is_inside_itself():
                continue
        seen[id(node.value)] = node.value
        if work > MAX_CHECKPOINT_PLACES or characters > MAX_NAMES_BYTES or len(entries) > MAX_TENSORS:
            raise InputError(f"{path} is refused: its values refer to each other without end, or are too many")
        if node.depth > MAX_CHECKPOINT_DEPTH:
            raise InputError(f"{path} is refused: its values are nested more than {MAX_CHECKPOINT_DEPTH} deep")
        todo.append(_children(node, parameters))
    return entries


def _may_be_shared(value: Any) -> bool:
    """Whether a value that was visited before is visited again: dictionaries and modules are."""
    return isinstance(value, PickleDict) or (isinstance(value, OpaqueCall) and _is_module(value.state))


def _children(node: _Node, parameters: Parameters) -> Iterator[_Node]:
    value = node.value
    if isinstance(value, PickleDict):
        yield from _of_pairs(node, value, parameters)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if _is_container(item):
                yield node.child(str(index), item, kind=node.kind, is_buffer=node.is_buffer)
    elif isinstance(value, OpaqueCall):
        kind = value.function.name if isinstance(value.function, Global) else ""
        parts = component_tensors(value)
        if parts or is_tensor(value):
            yield from (node.child(name, part) for name, part in parts if _is_container(part))
        elif _is_module(value.state):
            yield from _of_module(node, value.state.plain(), kind)
        else:
            contents = (value.state, value.pairs, value.items, value.args)
            yield from (node.child("", content, kind=kind) for content in contents if _is_container(content))


def _of_pairs(node: _Node, pairs: PickleDict, parameters: Parameters) -> Iterator[_Node]:
    owner = node.parent.value if node.parent is not None else None
    trained = parameters.get(owner.path) if isinstance(owner, OpaqueCall) else None
    excluded = {key for key in node.excluded if isinstance(key, str)}
    for index, (key, item) in enumerate(pairs.items):
        if _is_container(item) and not (isinstance(key, str) and key in excluded):
            name = str(key) if isinstance(key, str | int) or key is None else f"key{index}"
            is_buffer = node.is_buffer or (trained is not None and name not in trained)
            yield node.child(name, item, kind=node.kind, is_buffer=is_buffer)


def _is_module(state: Any) -> bool:
    return isinstance(state, PickleDict) and {"_parameters", "_modules"} <= state.plain().keys()


def _of_module(node: _Node, state: dict[str, Any], kind: str) -> Iterator[_Node]:
    """Yield the parts of a module that state_dict() saves: parameters, persistent buffers and submodules."""
    unsaved = state.get("_non_persistent_buffers_set")
    excluded = unsaved if isinstance(unsaved, list) else ()
    for part in ("_parameters", "_buffers", "_modules"):
        if isinstance(state.get(part), PickleDict):
            is_buffer = part == "_buffers"
            yield node.child("", state[part], kind=kind, is_buffer=is_buffer, excluded=excluded if is_buffer else ())


def _is_container(value: Any) -> bool:
    """Whether there may be a tensor in a value: empty containers are skipped, however many there are."""
    kind = type(value)
    if kind is list or kind is tuple:
        return bool(value)
    if kind is PickleDict:
        return bool(value.items)
    if kind is OpaqueCall:
        contents = value.args, value.state, value.pairs, value.items
        return any(content is not None and content != () for content in contents) or is_tensor(value)
    return kind is Persistent
