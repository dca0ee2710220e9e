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

MAX_AXES = 64
"""Axes of a tensor; the limit of NumPy."""
MAX_ELEMENTS = 1 << 48
"""Elements of a tensor, its axes of length 0 left out."""
MAX_UNFOLDED_BYTES = 256 << 20
"""What all tensors that do not lie flat may unfold to, in however small a file."""
MAX_UNFOLDING = 400
"""How many times bigger than its file they may be together, where that is more."""
MAX_TIED = 10_000
"""Tensors whose bytes are, or are among, those of another; each is looked at by itself."""
MAX_READINGS = 16
"""How many times tensors that share bytes, each in its own way, may show those that a disk has."""

MAX_PROTOBUF_FIELDS = 1_000_000
"""Fields of a protobuf file that are looked at, however they are nested."""
MAX_OBJECT_GRAPH_BYTES = 16 << 20
"""The graph of objects of a TensorFlow checkpoint; a variable takes about 250 bytes of it."""
MAX_OBJECT_GRAPH_FIELDS = 300_000
"""Its fields and messages; a variable takes about a dozen."""
MAX_BROKEN_TEXT_BYTES = 256
"""A name that is not UTF-8, which is shown byte by byte."""

MAX_ZIP_ENTRIES = 200_000
"""Files in a zip; PyTorch writes one for each tensor."""
MAX_ZIP_DIRECTORY_BYTES = 32 << 20
"""The directory of a zip, of about 100 bytes for each of them."""
MAX_ATTRIBUTE_ELEMENTS = 500_000
"""Names and numbers in all attributes of an HDF5 file."""
MAX_ATTRIBUTE_CHARACTERS = 32 << 20
"""Texts in all attributes of an HDF5 file, the configuration of its model among them."""

MAX_EXPORTED_JSON_BYTES = 64 << 20
"""The JSON of a program of torch.export: a model of a hundred layers takes 5 MB, most of it remarks."""
MAX_EXPORTED_DEPTH = 100
"""Nesting in the JSON of a program of torch.export: a graph inside a graph takes ten levels."""
MAX_EXPRESSION_CHARACTERS = 2000
"""A symbolic size in a program of torch.export, which PyTorch has sympy evaluate."""
MAX_SAMPLE_INPUTS_BYTES = 256 << 20
"""Example inputs in a program of torch.export: bigger ones are left out when it is loaded."""
MAX_SCRIPT_CODE_BYTES = 16 << 20
"""The code of TorchScript, whose operators are looked at before it is loaded: a detector takes 2 MB."""

MAX_PICKLE_STEPS = 2_000_000
"""Opcodes of a pickle: ten thousand tensors take half a million."""
MAX_PICKLE_OBJECTS = 500_000
"""Dictionaries, calls and storages that a pickle makes."""
MAX_PICKLE_NAMES = 20_000
"""Distinct functions and classes that a pickle names."""
MAX_PICKLE_COPIES = 1_000_000
"""Elements that calls such as `list(x)` copy while a pickle is followed: a tensor of a checkpoint copies none."""
MAX_PICKLE_TEXT_BYTES = 64 << 20
"""Memory for the text of a pickle: 100,000 tensors with names of a hundred letters take 10 MB."""
MAX_PICKLE_NAME_CHARACTERS = 2000
"""A function or class that a pickle names, with its module."""
BROKEN_TEXT_COST = 32
"""How much more than its bytes a text counts that is not UTF-8: each bad byte takes as long as many good ones."""
MAX_VIEWED_TIMES = 8
"""How often the different views of one storage may show its bytes: tied weights and their transposes take two."""
MAX_VIEWED_BYTES = 64 << 20
"""Bytes that views may show in any case, however small their storage."""
MAX_STORAGE_TENSORS = 20_000
"""Tensors that see one storage of a pickle: the biggest buffers of parameters are shared by some thousands."""

MAX_SCRIPT_TOKENS = 300_000
"""Words and signs of TorchScript code that are read for what it does with its weights; longer code is not."""
MAX_SCRIPT_DEPTH = 60
"""How deep calls stand in each other in one line of such code."""
