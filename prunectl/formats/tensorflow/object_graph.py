"""The graph of objects that TensorFlow 2 stores beside its variables: what it called each of them."""

from __future__ import annotations

from prunectl.errors import InputError
from prunectl.formats.protobuf import BYTES, Field, WireError, text
from prunectl.formats.tensorflow.bundle import Bundle
from prunectl.formats.walk import Walk

KEY = b"_CHECKPOINTABLE_OBJECT_GRAPH"
MAX_BYTES = 64 << 20
_NODES, _ATTRIBUTES, _FULL_NAME, _CHECKPOINT_KEY = 1, 2, 2, 3


def full_names(bundle: Bundle) -> dict[str, str]:
    """Return TensorFlow's own name of each variable, by its key in the checkpoint."""
    walk = Walk(memoryview(bundle.text(KEY, MAX_BYTES)))
    try:
        nodes = walk.messages(None, _NODES)
        attributes = (attribute for node in nodes for attribute in walk.messages(node, _ATTRIBUTES))
        return dict(_key_and_name(walk, attribute) for attribute in attributes)
    except WireError as error:
        raise InputError(f"{bundle.index} is damaged: its graph of objects holds {error}") from error


def _key_and_name(walk: Walk, attribute: Field) -> tuple[str, str]:
    texts = {field.number: text(walk.data, field) for field in walk.fields(attribute) if field.wire == BYTES}
    return texts.get(_CHECKPOINT_KEY, ""), texts.get(_FULL_NAME, "")
