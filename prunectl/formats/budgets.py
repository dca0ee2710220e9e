"""All limits on the time and memory that an untrusted file may cost.

Every limit counts what would be *created* (objects, bytes, layers), and is checked before its creation, so that a file
is refused in less than 2 seconds and 300 MB, whatever its content. Each limit exceeds what any real model needs.
"""

from __future__ import annotations

MAX_AXES = 64
"""Axes of a tensor; the limit of NumPy."""
MAX_TENSORFLOW_AXES = 32
"""Axes of a tensor in a file of TensorFlow, TensorFlow Lite or Keras: the limit of NumPy before version 2."""
MAX_ELEMENTS = 1 << 48
"""Elements of a tensor, or of one axis of it; axes of length 0 are left out."""
MAX_COUNT = 1 << 62
"""A product of lengths, such as multiply-accumulates: it must fit into 64 bits."""
MAX_TENSORS = 100_000
"""Tensors, operators, storages or shards in a file."""
MAX_FILES = 10_000
"""Files in the folder of a SavedModel; entries, storages or tensors in a tar of PyTorch."""
MAX_NAME_BYTES = 1 << 16
"""One name, or one line of a pickle; no tensor has a longer name."""
MAX_NAMES_BYTES = 16 << 20
"""All names together, in formats where a name may reuse parts of others, so that a small file can claim many bytes."""
MAX_TEXTS_BYTES = 32 << 20
"""All texts together, in formats where each is stored in full."""
MAX_MARK_BYTES = 1024
"""An identifier, a version or another mark; a number of a pickle."""

MAX_DEFLATE_RATIO = 1100
"""Deflate reaches 1032 to 1 at most, as does any filter of HDF5: a file that claims more is damaged or malicious."""
BOMB_RATIO = 200
"""How many times bigger than the file its decompressed contents may be; the limits in bytes below apply if larger."""
MAX_UNFOLDED_TENSOR_BYTES = 128 << 20
"""Bytes that one compressed tensor may expand to, however small the file."""
MAX_UNFOLDED_BYTES = 256 << 20
"""Bytes that all tensors without a flat extent may expand to together, however small the file."""
MAX_UNFOLDING = 400
"""How many times bigger than their file all tensors without a flat extent may be; MAX_UNFOLDED_BYTES if larger."""
MAX_SPARSE_UNFOLDING = 256
"""How many times bigger than its bytes a sparse tensor of TensorFlow Lite may be."""
MAX_FREE_BYTES = 1 << 20
"""Bytes that sparse tensors, or shared entries of a bundle, may always expand to, whatever the ratios above."""

MAX_TIED = 20_000
"""Tensors that share their storage with another: some frameworks put all parameters into one buffer."""
MAX_REPEATS = 64
"""How often a view may show the elements of its storage, or the tensors of a bundle the bytes of its data."""
MAX_EXPANDED_ELEMENTS = 1 << 28
"""Elements that a view with a stride of zero may expand to."""
MAX_READINGS = 16
"""How many times the bytes on the disk may be read, because different views share them."""

MAX_JSON_BYTES = 64 << 20
"""One JSON text, or all of a file together; the index of half a million tensors fits."""
MAX_JSON_OBJECT_BYTES = 225_000_000
"""Memory of one JSON text once it is parsed; the header of 200,000 tensors fits."""
MAX_JSON_DEPTH = 300
"""Nesting of lists and objects in a JSON text; a layer in a model takes three to eight levels."""
MAX_CONFIG_DEPTH = 100
"""Nesting of a Keras configuration, or of a program of torch.export, where a graph inside a graph takes ten levels."""
MAX_INDEX_NAMES = 500_000
"""Tensors that the index of a sharded checkpoint names; the biggest released have about 100,000."""
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000
"""The header of a safetensors file; the limit of the format's own library."""

MAX_HEADERS_BYTES = 256 << 20
"""All safetensors headers and configs of a model at a URL; the headers of 100,000 tensors take 15 MB."""
MAX_FETCHED_BYTES = 8 << 30
"""Files of a model at a URL that are not safetensors, which are downloaded whole into the temporary folder."""

MAX_ZIP_ENTRIES = 200_000
"""Files in a zip; PyTorch writes one for each tensor."""
MAX_ZIP_DIRECTORY_BYTES = 32 << 20
"""The central directory of a zip, which takes about 100 bytes for each entry."""

MAX_CONFIG_COUNT = 1 << 16
"""Heads, experts or classes that the config of a model folder may ask for."""
MAX_MODULE_BUFFER_BYTES = 1 << 30
"""Buffers beside the weights, such as attention masks over all positions, that such a config may ask for."""
MAX_TOKENIZER_BYTES = 256 << 20
"""The files of a tokenizer; those of a million tokens take 40 MB."""
MAX_TEXT_GROWTH = 64
"""How many times longer the normalizer of a tokenizer may make a text by insertions; real ones: a few times."""
MAX_TEXT_BYTES = 256 << 20
"""Text that is tokenised; calibration needs a few megabytes."""

MAX_KERAS_OBJECT_BYTES = 100_000_000
"""Memory of the configuration of a Keras model once it is parsed; a vocabulary of a million words fits."""
MAX_KERAS_OBJECTS = 50_000
"""Layers, initializers and other objects with a class in a Keras configuration; the biggest have about 10,000."""
MAX_KERAS_NAME_CHARACTERS = 32_000_000
"""Characters of names and classes in a Keras configuration, each prefixed with those of all enclosing models."""
MAX_KERAS_METADATA_BYTES = 8 << 20
"""The metadata of one Keras object in a SavedModel; once parsed it takes many times as much."""
MAX_KERAS_DEPTH = 40
"""Nesting of Keras models."""
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
"""Nesting of groups in an HDF5 file."""
MAX_ATTRIBUTE_ELEMENTS = 500_000
"""Names and numbers in all attributes of an HDF5 file; texts, as in its config, count to MAX_TEXTS_BYTES."""

MAX_PROTOBUF_FIELDS = 1_000_000
"""Fields of a protobuf file that are looked at, however they are nested."""
MAX_GRAPH_FIELDS = 2_000_000
"""Fields of all nodes in the graph of a SavedModel, when its operations are checked against the allow-list."""
MAX_OBJECT_GRAPH_BYTES = 16 << 20
"""The object graph of a TensorFlow checkpoint, in which a variable takes about 250 bytes."""
MAX_OBJECT_GRAPH_FIELDS = 300_000
"""Its fields and messages; a variable takes about a dozen."""
MAX_TABLE_BYTES = 3 << 20
"""The index of a TensorFlow checkpoint."""
MAX_SNAPPY_BYTES = 4 << 20
"""All compressed blocks of such an index together, and what one of them may decompress to."""
MAX_BROKEN_TEXT_BYTES = 256
"""A name that is not UTF-8, which is shown byte by byte."""
MAX_SAVING_FUNCTIONS = 100
"""Functions of a SavedModel that save or restore variables, directly or through other functions."""
MAX_PASSED_OPERATORS = 4
"""Operators of ONNX or TensorFlow Lite that a weight is followed through: quantise, dequantise, transpose, reshape."""
MAX_OPERATOR_KINDS = 1000
"""Kinds of operators, or descriptions, in a TensorFlow Lite model."""
MAX_OPERANDS = 32
"""Inputs or outputs of a TensorFlow Lite operator that are read; no operator with weights needs more."""

MAX_ONNX_FIELDS = 400_000
"""Fields of an ONNX graph that are read."""
MAX_ONNX_NAME_BYTES = 1 << 12
"""One name in an ONNX graph."""
MAX_ONNX_LIST_BYTES = 4096
"""A short list of numbers in an ONNX graph, such as a shape or the pads of a convolution."""
MAX_ONNX_DEPTH = 32
"""Nesting of ONNX subgraphs; real models have a few levels."""
MAX_ONNX_PREFIX = 2048
"""Characters of the name prefix of an ONNX subgraph, which each of its tensors repeats."""
MAX_ONNX_FOLDED = 1 << 24
"""Elements of one constant-folded value in an ONNX graph: an attention mask has 1 M."""
MAX_ONNX_USES = 8
"""Uses of one ONNX tensor that are followed: a tied weight has two, a shared constant hundreds."""
MAX_ONNX_VISITS = 500_000
"""Uses of all ONNX tensors that are followed in one model; after that, weights are no longer followed."""

MAX_EXPORTED_GRAPH_BYTES = 12 << 20
"""The graph of a program of torch.export that is read for its facts: a model of a hundred layers takes 5 MB."""
MAX_EXPORTED_GRAPH_DEPTH = 20
"""Nesting of subgraphs in such a program."""
MAX_EXPORTED_NODES = 1_000_000
"""Operations of one of its graphs."""
MAX_PASSED_NODES = 8
"""Operations of such a program that a weight is followed through, such as transposes."""
MAX_SIZE_CHARACTERS = 256
"""A symbolic size whose value prunectl computes itself."""
MAX_EXPRESSION_CHARACTERS = 2000
"""A symbolic size in a program of torch.export, which PyTorch has sympy evaluate."""
MAX_SAMPLE_INPUTS_BYTES = 256 << 20
"""Example inputs in a program of torch.export: bigger ones are left out when it is loaded."""
MAX_SCRIPT_CODE_BYTES = 16 << 20
"""TorchScript code, whose operators are checked before it is loaded: a detector takes 2 MB."""
MAX_READ_CODE_BYTES = 4 << 20
"""TorchScript code that is parsed for its uses of weights; roles in longer code are judged by names alone."""
MAX_SCRIPT_TOKENS = 300_000
"""Tokens of such code."""
MAX_SCRIPT_DEPTH = 60
"""Nesting of calls in one line of such code."""
MAX_ORIGINS = 16
"""Tensors that one value is traced back to; a value with more origins is not a weight."""

MAX_PICKLE_BYTES = 64 << 20
"""A compressed pickle; one that is stored uncompressed is memory-mapped instead."""
MAX_PICKLE_STEPS = 2_000_000
"""Opcodes of a pickle: ten thousand tensors take half a million."""
MAX_PICKLE_OBJECTS = 500_000
"""Dictionaries, calls and storages that a pickle creates."""
MAX_PICKLE_NAMES = 20_000
"""Distinct functions and classes that a pickle names."""
MAX_PICKLE_COPIES = 1_000_000
"""Elements that calls such as `list(x)` copy in the pickle VM; rebuilding a tensor copies none."""
MAX_PICKLE_TEXT_BYTES = 64 << 20
"""Memory for the text of a pickle: 100,000 tensors with names of a hundred letters take 10 MB."""
MAX_PICKLE_NAME_CHARACTERS = 2000
"""A function or class that a pickle names, with its module."""
BROKEN_TEXT_COST = 32
"""Factor by which the bytes of a text that is not UTF-8 count: a bad byte takes as long as many good ones."""
PICKLE_SCALE_BYTES = 32 << 20
"""Bytes on the disk for each multiple of the pickle limits that the metadata of a distributed checkpoint may take."""
MAX_PICKLE_SCALE = 16
"""The highest such multiple: for 400,000 parts of tensors, each of which takes at least 1,100 bytes and 70 opcodes."""
PART_BYTES = 256
"""Minimal bytes on the disk for each part of a tensor in such metadata; PyTorch writes 1,100 for the smallest."""
MAX_BOX_PIECES = 1_000_000
"""Pieces in which the parts of a tensor are read, split where another begins or ends; a grid of parts is not split."""
MAX_SMALL_PARTS = 20_000
"""Parts of tensors that a distributed checkpoint of any size may have."""
MAX_SMALL_VALUES = 2_500
"""Distinct non-tensor values that a distributed checkpoint of any size may have; each is a zip of its own."""
MAX_VALUE_ENTRIES = 10
"""Mean number of entries in such zips: PyTorch writes four, and one more for each tensor."""
MAX_CHECKPOINT_DEPTH = 400
"""Nesting of the values of a checkpoint."""
MAX_CHECKPOINT_PLACES = 3_000_000
"""References to values in a checkpoint: a value may have several, as a tied layer does, but real ones have few."""
MAX_CHECKPOINT_VALUES = 8_000_000
"""Values of a checkpoint that is stripped, each counted once."""
MAX_WRAPPERS = 16
"""Nested calls that wrap a tensor."""
MAX_SEARCHED = 1000
"""Entries of a checkpoint that are searched for metadata."""
MAX_VERSION_BYTES = 64
"""The version or the alignment of a file of PyTorch; the key of a storage before 1.6."""
MAX_ALIGNMENT = 1 << 16
"""Bytes to which a file of PyTorch aligns its storages."""
MAX_LEGACY_FACT_BYTES = 4096
"""The offset of the object's pickle in a file of PyTorch before 1.6."""
MAX_TAR_FACT_BYTES = 512
"""The pickle before a storage or a tensor in a tar of PyTorch."""
