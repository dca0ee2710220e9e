"""The limits on what a stranger's file may cost, all in one place.

Every limit counts what would be *made* (objects, bytes, layers), and is asked before it is made: a file is refused in
less than 2 seconds and 300 MB, whatever stands in it. Beyond any real model, and little enough to refuse at once.
"""

from __future__ import annotations

MAX_GRAPH_FIELDS = 2_000_000
"""Fields of all nodes in the graph of a SavedModel, when its operations are held against what is allowed."""
MAX_JSON_BYTES = 64 << 20
"""One JSON text; the index of half a million tensors fits."""
MAX_JSON_OBJECT_BYTES = 225_000_000
"""What one JSON text may become once it is parsed; the header of 200,000 tensors fits."""
MAX_JSON_DEPTH = 300
"""Lists and objects of a JSON text that stand in each other; a layer in a model takes three to eight."""
MAX_INDEX_NAMES = 500_000
"""Tensors that the index of a sharded checkpoint names; the biggest released have about 100,000."""

MAX_KERAS_OBJECT_BYTES = 100_000_000
"""What the configuration of a Keras model may become once it is parsed; a vocabulary of a million words fits."""
MAX_KERAS_OBJECTS = 50_000
"""Layers, initializers and all else in a Keras configuration that has a class; the biggest have about 10,000."""
MAX_KERAS_NAME_CHARACTERS = 32_000_000
"""Names and classes in a Keras configuration, each with those of all models around it."""
