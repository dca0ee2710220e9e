"""The limits on what a stranger's file may cost, all in one place.

Every limit counts what would be *made* (objects, bytes, layers), and is asked before it is made: a file is refused in
less than 2 seconds and 300 MB, whatever stands in it. Beyond any real model, and little enough to refuse at once.
"""

from __future__ import annotations

MAX_AXES = 64
"""Axes of a tensor; the limit of NumPy."""
MAX_TENSORFLOW_AXES = 32
"""Axes of a tensor in a file of TensorFlow, TensorFlow Lite or Keras: the limit of NumPy before version 2."""
MAX_ELEMENTS = 1 << 48
"""Elements of a tensor, or of one axis of it; axes of length 0 are left out."""
MAX_COUNT = 1 << 62
"""A product of lengths, such as multiply-accumulates: no more than 64 bits hold."""
MAX_TENSORS = 100_000
"""Tensors, operators, storages or shards in a file."""
MAX_FILES = 10_000
"""Files in the folder of a SavedModel; entries, storages or tensors in a tar of PyTorch."""
MAX_NAME_BYTES = 1 << 16
"""One name, or one line of a pickle; what is longer is no name of a tensor."""
MAX_NAMES_BYTES = 16 << 20
"""All names together, where each may repeat parts of others, so that few bytes of a file claim many."""
MAX_TEXTS_BYTES = 32 << 20
"""All texts together, where each stands in the file by itself."""
MAX_MARK_BYTES = 1024
"""An identifier, a version or another mark; a number of a pickle."""

MAX_DEFLATE_RATIO = 1100
"""Deflate cannot do better than 1032 to 1, nor any filter of HDF5: what claims more lies."""
BOMB_RATIO = 200
"""How many times bigger than the file its compressed contents may be, where that is more than the limits below."""
MAX_UNFOLDED_TENSOR_BYTES = 128 << 20
"""What one compressed tensor may unfold to, in however small a file."""
MAX_UNFOLDED_BYTES = 256 << 20
"""What all that does not lie flat may unfold to, in however small a file."""
MAX_UNFOLDING = 400
"""How many times bigger than their file all tensors that do not lie flat may be together, where that is more."""
MAX_SPARSE_UNFOLDING = 256
"""How many times bigger than its bytes a sparse tensor of TensorFlow Lite may be."""
MAX_FREE_BYTES = 1 << 20
"""What sparse tensors, or bytes that entries of a bundle share, may come to in any case."""

MAX_TIED = 20_000
"""Tensors whose bytes are, or are among, those of another: some frameworks lay all parameters into one buffer."""
MAX_REPEATS = 64
"""How often a view may show the elements of its storage, or the tensors of a bundle the bytes of its data."""
MAX_EXPANDED_ELEMENTS = 1 << 28
"""Elements that a view may make out of few by a stride of zero."""
MAX_READINGS = 16
"""How many times the bytes on the disk may be read, because tensors share them, each in its own way."""

MAX_JSON_BYTES = 64 << 20
"""One JSON text, or all of a file together; the index of half a million tensors fits."""
MAX_JSON_OBJECT_BYTES = 225_000_000
"""What one JSON text may become once it is parsed; the header of 200,000 tensors fits."""
MAX_JSON_DEPTH = 300
"""Lists and objects of a JSON text that stand in each other; a layer in a model takes three to eight."""
MAX_CONFIG_DEPTH = 100
"""Nesting of a Keras configuration, or of a program of torch.export, where a graph inside a graph takes ten levels."""
MAX_INDEX_NAMES = 500_000
"""Tensors that the index of a sharded checkpoint names; the biggest released have about 100,000."""
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000
"""The header of a safetensors file; the limit of the format's own library."""

MAX_HEADERS_BYTES = 256 << 20
"""The headers of all safetensors of a model at a URL, and what tells of it; those of 100,000 tensors take 15 MB."""
MAX_FETCHED_BYTES = 8 << 30
"""Files of a model at a URL that are no safetensors, and are fetched whole into the temporary folder."""

MAX_ZIP_ENTRIES = 200_000
"""Files in a zip; PyTorch writes one for each tensor."""
MAX_ZIP_DIRECTORY_BYTES = 32 << 20
"""The directory of a zip, of about 100 bytes for each of them."""

MAX_CONFIG_COUNT = 1 << 16
"""Heads, experts or classes that the config of a model folder may ask for."""
MAX_MODULE_BUFFER_BYTES = 1 << 30
"""Tables beside the weights, such as masks of all positions, that such a config may ask for."""
MAX_TOKENIZER_BYTES = 256 << 20
"""The files of a tokenizer; those of a million tokens take 40 MB."""
MAX_TEXT_GROWTH = 64
"""How many times as long the normalizer of a tokenizer may make a text by what it puts in; those in use: a few."""
MAX_TEXT_BYTES = 256 << 20
"""Text that is tokenised; calibration looks at a few megabytes."""

MAX_KERAS_OBJECT_BYTES = 100_000_000
"""What the configuration of a Keras model may become once it is parsed; a vocabulary of a million words fits."""
MAX_KERAS_OBJECTS = 50_000
"""Layers, initializers and all else in a Keras configuration that has a class; the biggest have about 10,000."""
MAX_KERAS_NAME_CHARACTERS = 32_000_000
"""Names and classes in a Keras configuration, each with those of all models around it."""
MAX_KERAS_METADATA_BYTES = 8 << 20
"""What a SavedModel says of one Keras object; once parsed it takes many times as much."""
MAX_KERAS_DEPTH = 40
"""Keras models inside each other."""
MAX_KERAS_CALLS = 50_000
"""Calls of layers and their inputs that are followed through a Keras model."""
MAX_INBOUND_DEPTH = 12
"""Lists and dictionaries around an input of a Keras layer."""
MAX_SHAPE_DEPTH = 4
"""Lists and dictionaries around the shape of an input."""
MAX_NAME_SLASHES = 8
"""Slashes in the name of a Keras layer."""
MAX_LISTED = 4096
"""Items of a list in the settings of a layer."""
MAX_LAYER_WEIGHTS = 256
"""Weights of one layer, or cells of a recurrent one."""
MAX_EINSUM_LABELS = 64
"""Characters of the equation of an EinsumDense layer."""

MAX_HDF5_OBJECTS = 1_000_000
"""Groups and datasets of an HDF5 file."""
MAX_HDF5_DEPTH = 200
"""Groups of an HDF5 file inside each other."""
MAX_ATTRIBUTE_ELEMENTS = 500_000
"""Names and numbers in all attributes of an HDF5 file; its texts, the model's configuration, are MAX_TEXTS_BYTES."""

MAX_PROTOBUF_FIELDS = 1_000_000
"""Fields of a protobuf file that are looked at, however they are nested."""
MAX_GRAPH_FIELDS = 2_000_000
"""Fields of all nodes in the graph of a SavedModel, when its operations are held against what is allowed."""
MAX_OBJECT_GRAPH_BYTES = 16 << 20
"""The graph of objects of a TensorFlow checkpoint; a variable takes about 250 bytes of it."""
MAX_OBJECT_GRAPH_FIELDS = 300_000
"""Its fields and messages; a variable takes about a dozen."""
MAX_TABLE_BYTES = 3 << 20
"""The index of a TensorFlow checkpoint."""
MAX_SNAPPY_BYTES = 4 << 20
"""All compressed blocks of such an index together, and what one of them may decompress to."""
MAX_BROKEN_TEXT_BYTES = 256
"""A name that is not UTF-8, which is shown byte by byte."""
MAX_SAVING_FUNCTIONS = 100
"""Functions of a SavedModel that save or restore variables, in turn by others."""
MAX_PASSED_OPERATORS = 4
"""Operators of ONNX or TensorFlow Lite that a weight is followed through: quantise, dequantise, transpose, reshape."""
MAX_OPERATOR_KINDS = 1000
"""Kinds of operators, or descriptions, in a TensorFlow Lite model."""
MAX_OPERANDS = 32
"""Inputs or outputs of a TensorFlow Lite operator that are looked at; none with weights has more that matter."""

MAX_ONNX_FIELDS = 400_000
"""Fields of an ONNX graph that are read."""
MAX_ONNX_NAME_BYTES = 1 << 12
"""One name in an ONNX graph."""
MAX_ONNX_LIST_BYTES = 4096
"""A short list of numbers in an ONNX graph, such as a shape or the pads of a convolution."""
MAX_ONNX_DEPTH = 32
"""ONNX graphs inside each other: a few in real models."""
MAX_ONNX_PREFIX = 2048
"""Characters that say where an ONNX graph stands: each of its tensors repeats them."""
MAX_ONNX_FOLDED = 1 << 24
"""Elements that are worked out at a time where an ONNX graph is the same in every run: a mask of attention has 1 M."""
MAX_ONNX_USES = 8
"""Uses of one ONNX tensor that are looked at: a tied weight has two, a shared constant hundreds."""
MAX_ONNX_VISITS = 500_000
"""Uses of ONNX tensors that are looked at, before weights are no longer followed."""

MAX_EXPORTED_GRAPH_BYTES = 12 << 20
"""The graph of a program of torch.export that is read for its facts: a model of a hundred layers takes 5 MB."""
MAX_EXPORTED_GRAPH_DEPTH = 20
"""Graphs inside each other in such a program."""
MAX_EXPORTED_NODES = 1_000_000
"""Operations of one of its graphs."""
MAX_PASSED_NODES = 8
"""Operations of such a program that only hand a weight on."""
MAX_SIZE_CHARACTERS = 256
"""A symbolic size whose value is computed here."""
MAX_EXPRESSION_CHARACTERS = 2000
"""A symbolic size in a program of torch.export, which PyTorch has sympy evaluate."""
MAX_SAMPLE_INPUTS_BYTES = 256 << 20
"""Example inputs in a program of torch.export: bigger ones are left out when it is loaded."""
MAX_SCRIPT_CODE_BYTES = 16 << 20
"""The code of TorchScript, whose operators are looked at before it is loaded: a detector takes 2 MB."""
MAX_READ_CODE_BYTES = 4 << 20
"""The code that is read for what it does with its weights; beyond it, names alone tell their roles."""
MAX_SCRIPT_TOKENS = 300_000
"""Words and signs of such code."""
MAX_SCRIPT_DEPTH = 60
"""How deep calls stand in each other in one line of such code."""
MAX_ORIGINS = 16
"""Tensors that one value is followed back to; what comes from more is no weight."""

MAX_PICKLE_BYTES = 64 << 20
"""A compressed pickle; one that is stored is mapped instead."""
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
PICKLE_SCALE_BYTES = 32 << 20
"""Bytes on the disk for which the metadata of a distributed checkpoint may take the usual steps once more."""
MAX_PICKLE_SCALE = 16
"""How often it may do so: for 400,000 parts of tensors, each of which takes 1,100 bytes and 70 steps at least."""
PART_BYTES = 256
"""Bytes on the disk for each part of a tensor that such a metadata lists; PyTorch writes 1,100 for the smallest."""
MAX_BOX_PIECES = 1_000_000
"""Pieces that the parts of a tensor are read in, each cut where another begins or ends; a mesh of ranks cuts none."""
MAX_SMALL_PARTS = 20_000
"""Parts of tensors in a distributed checkpoint of any size."""
MAX_SMALL_VALUES = 2_500
"""Different values beside the tensors in a distributed checkpoint of any size, each of which is a zip by itself."""
MAX_VALUE_ENTRIES = 10
"""Entries that such a zip has in the mean: PyTorch writes four, and one more for each tensor."""
MAX_CHECKPOINT_DEPTH = 400
"""Values of a checkpoint inside each other."""
MAX_CHECKPOINT_PLACES = 3_000_000
"""Places of values in a checkpoint: a value may stand in several, as a tied layer does; a web of them is a trap."""
MAX_CHECKPOINT_VALUES = 8_000_000
"""Values of a checkpoint that is stripped, each looked at once."""
MAX_WRAPPERS = 16
"""Calls around a tensor, each of which wraps the one before."""
MAX_SEARCHED = 1000
"""Entries of a checkpoint that are looked at for facts."""
MAX_VERSION_BYTES = 64
"""The version or the alignment of a file of PyTorch; the key of a storage before 1.6."""
MAX_ALIGNMENT = 1 << 16
"""Bytes to which a file of PyTorch aligns its storages."""
MAX_LEGACY_FACT_BYTES = 4096
"""Where the pickles before the object end in a file of PyTorch before 1.6."""
MAX_TAR_FACT_BYTES = 512
"""The pickle before a storage or a tensor in a tar of PyTorch."""
