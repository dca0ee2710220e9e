"""What `saved_model.pb` says around the variables: who wrote it, its Keras layers, its constants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.mapped import map_file
from prunectl.formats.protobuf import BYTES, Field, WireError, text
from prunectl.formats.walk import Walk

MAX_METADATA_BYTES = 8 << 20
"""Of one object; once parsed it takes many times as much."""
MAX_ALL_METADATA_BYTES = 64 << 20
MAX_IDENTIFIER_BYTES = 1 << 10

_META_GRAPHS = 2
_INFO, _GRAPH, _SIGNATURES, _ASSETS, _OBJECTS = 1, 2, 5, 6, 7
_SIGNATURE_NAME = 1
_VERSION = 5
_OBJECT_NODES, _USER_OBJECT = 1, 4
_IDENTIFIER, _METADATA = 1, 3
_KERAS_NODES, _KERAS_IDENTIFIER, _KERAS_METADATA = 1, 4, 5


@dataclass(frozen=True, slots=True)
class KerasObject:
    """A Keras model, layer or metric, as TensorFlow describes it."""

    identifier: str
    """What kind it is; nothing if that is not said, or in a text too long to be one."""
    metadata: bytes
    """A JSON object."""


@dataclass(frozen=True, slots=True)
class SavedGraph:
    """The facts of a SavedModel, and the walk through its bytes."""

    path: Path
    walk: Walk
    version: str
    objects: tuple[KerasObject, ...]
    graphs: tuple[Field, ...]
    """Where each GraphDef lies."""
    signatures: tuple[str, ...] = ()
    assets: int = 0
    """Files that the graph reads, such as vocabularies."""


def read_graph(path: Path) -> SavedGraph:
    """Read `saved_model.pb`, the nodes of its graphs left alone."""
    walk = Walk(map_file(path))
    try:
        metas = tuple(walk.messages(None, _META_GRAPHS))
        infos = [info for meta in metas for info in walk.messages(meta, _INFO)]
        graphs = tuple(graph for meta in metas for graph in walk.messages(meta, _GRAPH))
        versions = [text(walk.data, version) for info in infos for version in walk.messages(info, _VERSION)]
        parts = [part for meta in metas for part in walk.messages(meta, _OBJECTS)]
        nodes = (node for part in parts for node in walk.messages(part, _OBJECT_NODES))
        users = (user for node in nodes for user in walk.messages(node, _USER_OBJECT))
        objects = _keras_objects(walk, users, _IDENTIFIER, _METADATA)
        signed = [signature for meta in metas for signature in walk.messages(meta, _SIGNATURES)]
        signatures = [text(walk.data, name) for found in signed for name in walk.messages(found, _SIGNATURE_NAME)]
        assets = sum(1 for meta in metas for _ in walk.messages(meta, _ASSETS))
    except WireError as error:
        raise InputError(f"{path} is truncated or damaged: it is not a SavedModel ({error})") from error
    if not graphs:
        raise InputError(f"{path} is damaged: it holds no graph")
    return SavedGraph(path, walk, next(iter(versions), ""), objects, graphs, tuple(signatures), assets)


def read_keras_metadata(path: Path) -> tuple[KerasObject, ...]:
    """Read `keras_metadata.pb`, where Keras 2.5 and later describe their layers."""
    walk = Walk(map_file(path))
    try:
        return _keras_objects(walk, walk.messages(None, _KERAS_NODES), _KERAS_IDENTIFIER, _KERAS_METADATA)
    except WireError as error:
        raise InputError(f"{path} is truncated or damaged: it is not Keras metadata ({error})") from error


def _keras_objects(walk: Walk, nodes: Iterable[Field], identifier: int, metadata: int) -> tuple[KerasObject, ...]:
    found, total = [], 0
    for node in nodes:
        texts = {field.number: field for field in walk.fields(node) if field.wire == BYTES}
        nbytes = texts[metadata].value if metadata in texts else 0
        total += nbytes
        if nbytes > MAX_METADATA_BYTES or total > MAX_ALL_METADATA_BYTES:
            raise WireError(f"a description of {nbytes} bytes")
        if nbytes:
            # Keras rebuilds what is described in a file of its own, whatever it is called there, or if it is not.
            is_named = identifier in texts and texts[identifier].value <= MAX_IDENTIFIER_BYTES
            name = text(walk.data, texts[identifier]) if is_named else ""
            found.append(KerasObject(name, bytes(walk.data[texts[metadata].begin : texts[metadata].end])))
    return tuple(found)
