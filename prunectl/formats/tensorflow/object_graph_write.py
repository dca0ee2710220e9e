"""A graph of objects without some of them, the others numbered anew."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from prunectl.formats.protobuf import BYTES, Field, fields
from prunectl.formats.protobuf_write import head, number
from prunectl.formats.tensorflow.object_graph import (
    CHILDREN,
    NODE_ID,
    NODES,
    ORIGINAL_ID,
    SLOT_ID,
    SLOTS,
    ObjectGraph,
)

_REFERENCES = {CHILDREN: (NODE_ID,), SLOTS: (ORIGINAL_ID, SLOT_ID)}


def without(graph: ObjectGraph, gone: Collection[int]) -> bytes:
    """Return the text of a graph without some objects and all that refers to them."""
    kept = [at for at in range(len(graph.nodes)) if at not in gone]
    numbers = {old: new for new, old in enumerate(kept)}
    out = bytearray()
    for at in kept:
        node = b"".join(_cleaned(graph.text, graph.nodes[at].begin, graph.nodes[at].end, numbers))
        out += head(NODES, len(node)) + node
    return bytes(out)


def _cleaned(text: memoryview, begin: int, end: int, numbers: Mapping[int, int]) -> Iterator[bytes]:
    for raw, found in _raw_fields(text, begin, end):
        ids = _REFERENCES.get(found.number, ()) if found.wire == BYTES else ()
        if not ids:
            yield raw
            continue
        said = dict.fromkeys(ids, 0) | {
            inner.number: inner.value for _, inner in _raw_fields(text, found.begin, found.end) if inner.number in ids
        }
        if all(said[key] in numbers for key in ids):
            rest = b"".join(raw for raw, inner in _raw_fields(text, found.begin, found.end) if inner.number not in ids)
            message = b"".join(number(key, new) for key in ids if (new := numbers[said[key]])) + rest
            yield head(found.number, len(message)) + message


def _raw_fields(text: memoryview, begin: int, end: int) -> Iterator[tuple[bytes, Field]]:
    """Yield the fields of a message, each with all of its bytes."""
    at = begin
    for found in fields(text, begin, end):
        yield bytes(text[at : found.end]), found
        at = found.end
