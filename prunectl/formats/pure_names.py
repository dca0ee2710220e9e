"""Allow-lists of names in untrusted Keras files and TensorFlow graphs: what only computes, in two files of TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _read(name: str) -> Mapping[str, Any]:
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _names(*texts: str) -> frozenset[str]:
    return frozenset(name for text in texts for name in text.split())


_KERAS = _read("pure_keras.toml")
CLASSES = _names(*_KERAS["classes"].values())
"""Classes of Keras that are built of plain settings."""
FUNCTIONS = _names(*_KERAS["functions"].values())
"""Functions of Keras on tensors alone."""
ROOMS = _names(_KERAS["rooms"])
"""Modules of Keras that these stand in."""
TYPES = _names(_KERAS["types"])
"""Types of tensors that TensorFlow describes."""
RAGGED_CLASS_METHODS = _names(_KERAS["ragged_class_methods"])
"""What may be called on the class of ragged tensors."""
MEMBERS = _names(_KERAS["members"])
"""Attributes and methods of ragged and sparse tensors that may be used."""
FUNCTIONS_OF_TENSORFLOW = frozenset(
    f"{module}.{name}".lstrip(".") for module, names in _KERAS["tensorflow"].items() for name in names.split()
)
"""Functions on tensors that Keras 2 wraps into layers."""

OPERATIONS = _names(*_read("pure_tensorflow.toml").values())
"""Whatever its inputs and attributes are, such an operation changes nothing but numbers and variables in memory."""
BY_ATTRIBUTE = {
    "PrintV2": ("output_stream", r"stdout|stderr|log\((info|warning|error)\)"),
    "EncodeProto": ("descriptor_source", r"|local://|bytes://.*"),
    "DecodeProtoV2": ("descriptor_source", r"|local://|bytes://.*"),
    "FixedUnigramCandidateSampler": ("vocab_file", ""),
}
"""Operations that may name a file in an attribute, and the pattern of its values that name none."""
SAVING = frozenset({"MergeV2Checkpoints", "RestoreV2", "SaveV2", "ShardedFilename", "ShardedFilespec"})
"""What every SavedModel keeps its variables with; nobody else may call it."""
FROM_FILES = frozenset({"InitializeTableFromTextFile", "InitializeTableFromTextFileV2"})
"""Fill a table with the lines of a file, which has to be an asset of the SavedModel."""
