"""Allow-lists for untrusted Keras files and TensorFlow graphs: names that only compute, read from two TOML files."""

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
"""Classes of Keras that are built from plain settings."""
FUNCTIONS = _names(*_KERAS["functions"].values())
"""Functions of Keras that only compute on tensors."""
MODULES = _names(_KERAS["modules"])
"""Modules of Keras that contain these classes and functions."""
TYPES = _names(_KERAS["types"])
"""Type specs of TensorFlow for tensors."""
RAGGED_CLASS_METHODS = _names(_KERAS["ragged_class_methods"])
"""Class methods of ragged tensors that may be called."""
MEMBERS = _names(_KERAS["members"])
"""Attributes and methods of ragged and sparse tensors that may be used."""
FUNCTIONS_OF_TENSORFLOW = frozenset(
    f"{module}.{name}".lstrip(".") for module, names in _KERAS["tensorflow"].items() for name in names.split()
)
"""Functions of TensorFlow on tensors that Keras 2 wraps into layers."""

OPERATIONS = _names(*_read("pure_tensorflow.toml").values())
"""Operations that affect nothing but tensors and variables in memory, whatever their inputs and attributes are."""
BY_ATTRIBUTE = {
    "PrintV2": ("output_stream", r"stdout|stderr|log\((info|warning|error)\)"),
    "EncodeProto": ("descriptor_source", r"|local://|bytes://.*"),
    "DecodeProtoV2": ("descriptor_source", r"|local://|bytes://.*"),
    "FixedUnigramCandidateSampler": ("vocab_file", ""),
}
"""Operations with an attribute that may name a file, and the pattern of the attribute's harmless values."""
SAVING = frozenset({"MergeV2Checkpoints", "RestoreV2", "SaveV2", "ShardedFilename", "ShardedFilespec"})
"""Operations with which a SavedModel saves and restores its variables; allowed in its saving functions only."""
FROM_FILES = frozenset({"InitializeTableFromTextFile", "InitializeTableFromTextFileV2"})
"""Operations that fill a table with the lines of a file, which must be an asset of the SavedModel."""
