"""Is a table that is filled from a file filled from an asset of its SavedModel, and from no other file?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from prunectl.formats.protobuf import BYTES, VARINT, Field, packed
from prunectl.formats.walk import Walk

_COLLECTIONS, _ASSETS, _OBJECTS = 4, 6, 7
_KEY, _VALUE = 1, 2
_INFO, _FILE_NAME, _TENSOR_NAME = 1, 2, 1
_ANY_LIST, _ANY_VALUE = 5, 2
_OBJECT_NODES, _CONCRETE_FUNCTIONS, _IS_ASSET, _BOUND_INPUTS = 1, 2, 5, 2
_SIGNATURE, _ARGUMENTS, _NAME, _NODE_INPUTS = 1, 2, 1, 3
_FILE_INPUT = 1
"""Which input of the operation names the file."""


class Assets:
    """The files that a SavedModel brings along, and the tensors that hold their paths once it is loaded."""

    def __init__(self, walk: Walk, meta: Field, folder: Path) -> None:
        self._walk, self._folder = walk, folder
        described = [*walk.messages(meta, _ASSETS), *self._of_old(meta)]
        self._names = [self._text(one, _FILE_NAME) for one in described]
        self._tensors = {
            self._text(info, _TENSOR_NAME).partition(b":")[0] for one in described for info in walk.messages(one, _INFO)
        }
        self._objects: list[bool] = []
        """Of each object whether it is an asset."""
        self._bound: dict[bytes, list[int]] = {}
        """Which objects each function is called with, besides what its caller gives."""
        for objects in walk.messages(meta, _OBJECTS):
            for node in walk.messages(objects, _OBJECT_NODES):
                self._objects.append(any(True for _ in walk.messages(node, _IS_ASSET)))
            for entry in walk.messages(objects, _CONCRETE_FUNCTIONS):
                self._bound[self._text(entry, _KEY)] = [
                    number
                    for value in walk.messages(entry, _VALUE)
                    for field in walk.fields(value)
                    if field.number == _BOUND_INPUTS and field.wire in {BYTES, VARINT}
                    for number in packed(walk.data, field)
                ]

    @property
    def are_inside(self) -> bool:
        """Whether every asset is a file of the folder."""
        return all(self._is_inside(name.decode("utf-8", "replace")) for name in self._names)

    def is_path(self, node: Field) -> bool:
        """Whether a node of the graph itself is given the path of an asset."""
        return self._input(node, _FILE_INPUT).partition(b":")[0] in self._tensors

    def argument(self, function: Field, node: Field) -> int | None:
        """Return which argument of its function a node takes its path from; None where it comes from elsewhere."""
        path = self._input(node, _FILE_INPUT)
        signatures = self._walk.messages(function, _SIGNATURE)
        arguments = [self._text(one, _NAME) for found in signatures for one in self._walk.messages(found, _ARGUMENTS)]
        return arguments.index(path) - len(arguments) if path in arguments else None

    def is_bound(self, function: bytes, argument: int) -> bool:
        """Whether what loading hands to a function for an argument, counted from the end, is an asset."""
        bound = self._bound.get(function, [])
        if -argument > len(bound):
            # Nothing is bound to it: it is the caller's.
            return True
        number = bound[argument]
        return number < len(self._objects) and self._objects[number]

    def is_given(self, call: Field, argument: int) -> bool:
        """Whether a node of the graph itself calls a function with an asset."""
        given = [one for one in self._inputs(call) if not one.startswith(b"^")]
        return -argument <= len(given) and given[argument].partition(b":")[0] in self._tensors

    def _is_inside(self, name: str) -> bool:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            return False
        place = self._folder / "assets" / path
        return place.is_file() and place.resolve().is_relative_to(self._folder.resolve())

    def _of_old(self, meta: Field) -> Iterator[Field]:
        """Yield the assets as TensorFlow 1 lists them."""
        for collection in self._walk.messages(meta, _COLLECTIONS):
            if self._text(collection, _KEY) != b"saved_model_assets":
                continue
            for value in self._walk.messages(collection, _VALUE):
                for listed in self._walk.messages(value, _ANY_LIST):
                    for one in self._walk.messages(listed, 1):
                        yield from self._walk.messages(one, _ANY_VALUE)

    def _input(self, node: Field, number: int) -> bytes:
        inputs = self._inputs(node)
        return inputs[number] if number < len(inputs) else b""

    def _inputs(self, node: Field) -> list[bytes]:
        return [bytes(self._walk.data[one.begin : one.end]) for one in self._walk.messages(node, _NODE_INPUTS)]

    def _text(self, message: Field, number: int) -> bytes:
        found = [bytes(self._walk.data[one.begin : one.end]) for one in self._walk.messages(message, number)]
        return found[-1] if found else b""
