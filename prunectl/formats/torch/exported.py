"""Archives of torch.export: raw weights, a JSON with their dtypes and strides, and the MACs of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from prunectl.errors import InputError
from prunectl.formats import state_dict, zip_read
from prunectl.formats.base import (
    ModelFile,
    ModelInfo,
    Operation,
    RemovedItem,
    Role,
    Shape,
    Storage,
    StripOptions,
    StripPart,
    Tensor,
    numel,
)
from prunectl.formats.budgets import MAX_EXPORTED_GRAPH_BYTES, MAX_EXPORTED_GRAPH_DEPTH
from prunectl.formats.patch import patch_files
from prunectl.formats.safe_json import parse_object
from prunectl.formats.state_dict import StateUse
from prunectl.formats.torch import exported_graph, views
from prunectl.formats.torch import model as torch_model
from prunectl.formats.torch.exported_graph import ExportedGraph, ExportedNode, inner_graph, parameters
from prunectl.formats.torch.pickle.opcodes import describe_value
from prunectl.formats.torch.views import DTYPES, SCALAR_TYPES, StorageInfo
from prunectl.formats.zip_read import Archive, ZipEntry
from prunectl.formats.zip_write import rewrite_zip

PROGRAM = "serialized_exported_program.json"
"""The entry with the graph in an archive of PyTorch 2.7 or earlier, which has no folders."""
EXAMPLES = "serialized_example_inputs.pt"
_PARTS = ("serialized_state_dict", "serialized_constants")


def nested_tensors(archive: Archive, graph: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors of a program of PyTorch 2.7 or earlier."""
    for part in _PARTS:
        # PyTorch 2.1 called them .json, although they were not JSON.
        name = next((f"{part}{end}" for end in (".pt", ".json") if f"{part}{end}" in archive.entries), "")
        if not name:
            raise InputError(f"{archive.path} is damaged: it has no entry {part}.pt")
        yield from inside(archive, name, graph)


def inside(archive: Archive, name: str, graph: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors of one entry that torch.save wrote."""
    entry = archive.entries[name]
    if not entry.nbytes:
        return
    if not entry.is_stored:
        raise InputError(
            f"{archive.path} compresses its entry {name}, a zip inside the zip",
            hint="load it with PyTorch and save it with torch.export.save, or zip it again without compression",
        )
    inner = zip_read.open_inside(archive, entry)
    if any(not inner_entry.is_stored for inner_entry in inner.entries.values()):
        raise InputError(f"{archive.path} compresses the contents of its entry {name}, a zip inside the zip")
    source = torch_model.pickle_source(inner, torch_model.top_folder(inner), "data")
    inner_tensors, _ = torch_model.tensors(archive.path, source, {})
    trained = parameters(graph)
    for tensor in inner_tensors:
        role = tensor.role if tensor.name in trained or not graph else Role.STATE
        storage = replace(tensor.storage, key=f"{name}!{tensor.storage.key}")
        yield replace(tensor, role=role, storage=storage)


STRIDED = 7
"""The number of the strided (dense) layout."""
_CONFIGS = (("data/weights/", "_weights_config.json"), ("data/constants/", "_constants_config.json"))


def open_model(path: Path) -> ModelFile:
    """Open a zip that torch.export.save wrote."""
    archive = zip_read.open_archive(path)
    folder = _top_folder(archive)
    models = [name for name in archive.entries if name.startswith(f"{folder}models/") and name.endswith(".json")]
    is_old = not models and PROGRAM in archive.entries
    models = [PROGRAM] if is_old else models
    if not models:
        raise InputError(f"{path} is damaged: it has no model in its folder models")
    tensors: list[Tensor] = []
    uses: dict[str, StateUse | None] = {}
    programs: dict[str, ExportedGraph | None] = {}
    producer = ""
    for entry in models:
        name = PurePosixPath(entry).stem
        program = _program(archive, entry)
        programs[entry] = graph = exported_graph.main_graph(program) if program is not None else None
        program = program or {}
        producer = exported_graph.producer(program) or producer
        prefix = f"{name}." if len(models) > 1 else ""
        if is_old:
            listed = list(nested_tensors(archive, program))
        else:
            ends = ((part, f"{name}{end}") for part, end in _CONFIGS)
            listed = [tensor for part, end in ends for tensor in _tensors(archive, folder, part, end, program)]
        kinds: dict[str, str] = {}
        if program and graph:
            kinds = exported_graph.tensor_kinds(graph)
            uses |= {prefix + tensor: use for tensor, use in exported_graph.uses(graph, listed).items()}
        tensors += [replace(tensor, name=prefix + tensor.name, kind=kinds.get(tensor.name, "")) for tensor in listed]
    if not tensors:
        raise InputError(f"{path} holds no tensors")
    described = state_dict.describe(tensors, uses=uses)
    code = [entry for entry in archive.entries.values() if entry.name.startswith(f"{folder}data/aotinductor/")]
    return ModelFile(
        path=path,
        format="torch-export",
        tensors=described,
        about=ModelInfo(
            producer=producer or "pytorch",
            wrappers=state_dict.wrappers(described),
            code=("compiled code",) if code else (),
            code_bytes=sum(entry.extent.nbytes for entry in code),
            example_bytes=sum(entry.extent.nbytes for entry in examples(archive)),
            notes=_notes(archive, folder),
            is_compressed=any(tensor.storage.extent is None for tensor in described),
            programs=programs,
        ),
        files=(path,),
        decode=torch_model.decoder(archive),
    )


def examples(archive: Archive) -> tuple[ZipEntry, ...]:
    """The inputs that the programs were exported with, where they are not empty."""
    folder = f"{_top_folder(archive)}data/sample_inputs/"
    starts = (folder, EXAMPLES)
    return tuple(entry for name, entry in archive.entries.items() if name.startswith(starts) and entry.nbytes)


def strip_examples(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write a copy with empty example inputs, as PyTorch saves a program without any; return the removed items."""
    if options.to_half:
        raise InputError(
            f"{model.path} is an exported program, whose graph fixes the type of its weights",
            hint="leave out --half, or export a model in half precision",
        )
    if StripPart.MASKS in options.parts and any(tensor.role is Role.MASK for tensor in model.tensors):
        raise InputError(
            f"{model.path} is an exported program, whose graph multiplies its weights by masks",
            hint="strip the rest with --only examples, or strip the model before exporting it",
        )
    archive = zip_read.open_archive(model.path)
    entries = examples(archive) if StripPart.EXAMPLES in options.parts else ()
    if not entries:
        patch_files(model, targets, ())
        return ()
    rewrite_zip(archive, targets[model.path], {entry.name: (0, ()) for entry in entries})
    return tuple(
        RemovedItem(entry.name.rpartition("data/")[2], StripPart.EXAMPLES, entry.extent.nbytes) for entry in entries
    )


def _top_folder(archive: Archive) -> str:
    formats = [name for name in archive.entries if name == "archive_format" or name.endswith("/archive_format")]
    return min(formats, key=lambda name: (name.count("/"), name), default="").removesuffix("archive_format")


def _program(archive: Archive, entry: str) -> dict[str, Any] | None:
    """The JSON of a program; None if it is too big to parse."""
    if archive.entries[entry].nbytes > MAX_EXPORTED_GRAPH_BYTES:
        return None
    return parse_object(archive.read(entry, MAX_EXPORTED_GRAPH_BYTES), archive.path, f"its entry {entry}")


def _tensors(archive: Archive, folder: str, part: str, config: str, graph: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that one configuration lists."""
    name = f"{folder}{part}{config}"
    if name not in archive.entries:
        # PyTorch 2.8 put all weights into one entry.
        old = f"{folder}{part}{config.removesuffix('_weights_config.json').removesuffix('_constants_config.json')}.pt"
        if old in archive.entries:
            yield from inside(archive, old, graph)
            return
        raise InputError(f"{archive.path} is damaged: it has no entry {name}")
    is_big = archive.entries.get(f"{folder}byteorder") and archive.read(f"{folder}byteorder", 64) == b"big"
    listed = parse_object(archive.read(name, MAX_EXPORTED_GRAPH_BYTES), archive.path, f"its entry {name}").get("config")
    if not isinstance(listed, dict):
        raise InputError(f"{archive.path} is damaged: its entry {name} lists no tensors")
    for tensor, facts in listed.items():
        if isinstance(facts, dict) and facts.get("tensor_meta") is not None and facts.get("use_pickle") is not True:
            yield _tensor(archive, tensor, f"{folder}{part}{facts.get('path_name')}", facts, big_endian=bool(is_big))


def _tensor(archive: Archive, name: str, entry: str, facts: dict[str, Any], *, big_endian: bool) -> Tensor:
    path, meta = archive.path, facts["tensor_meta"]
    try:
        shape, strides = _integers(meta["sizes"]), _integers(meta["strides"])
        start, code, layout = meta["storage_offset"]["as_int"], meta["dtype"], meta["layout"]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged: it does not give the layout of {describe_value(name)} in its entry"
        ) from error
    if type(code) is not int or code not in SCALAR_TYPES or layout != STRIDED:
        raise InputError(f"{path} holds {describe_value(name)} in a type or a layout that prunectl does not read")
    if entry not in archive.entries:
        raise InputError(f"{path} is damaged: it has no entry {describe_value(entry)}")
    dtype = DTYPES[SCALAR_TYPES[code]]
    data = archive.entries[entry]
    count, rest = divmod(data.nbytes, dtype.itemsize)
    if rest:
        raise InputError(
            f"{path} is damaged: {data.nbytes} bytes are not a whole number of elements of {describe_value(name)}"
        )
    view = views.resolve_view(path, name, StorageInfo(entry, dtype, count), dtype, (start, shape, strides))
    extent = data.extent if data.is_stored else None
    storage = Storage(entry, data.nbytes, extent, data.extent.nbytes, big_endian)
    role = Role.OTHER if facts.get("is_param") is True else Role.STATE
    return Tensor(name, "", view.shape, dtype, role, storage, start=view.start, strides=view.strides)


def _integers(values: Any) -> tuple[Any, ...]:
    return tuple(value["as_int"] for value in values)


def _notes(archive: Archive, folder: str) -> tuple[str, ...]:
    pickled = [name for name in archive.entries if name.startswith(f"{folder}data/constants/custom_obj_")]
    return ("The file also holds objects that PyTorch would unpickle on loading.",) if pickled else ()


_RUN_ONCE = "wrap_with_"
"""Prefix of the operations that run their graph exactly once, such as `wrap_with_set_grad_enabled`."""


def operations(model: ModelFile) -> tuple[Operation, ...]:
    """The operations that multiply, with their MACs; a batch size that the program leaves open counts as 1."""
    counted: list[Operation] = []
    for entry, graph in model.about.programs.items():
        if graph is None:
            nbytes = zip_read.open_archive(model.path).entries[entry].nbytes
            raise InputError(
                f"{model.path} has a graph of {nbytes} bytes; FLOPs are counted up to {MAX_EXPORTED_GRAPH_BYTES}"
            )
        prefix = f"{PurePosixPath(entry).stem}." if len(model.about.programs) > 1 else ""
        counted += (_prefixed(operation, prefix) for operation in _count_macs(graph))
    return tuple(counted)


def _prefixed(operation: Operation, prefix: str) -> Operation:
    return replace(operation, weight=f"{prefix}{operation.weight}") if prefix and operation.weight else operation


def _count_macs(graph: ExportedGraph, depth: int = 0) -> Iterator[Operation]:
    for node in graph.nodes:
        yield from _node_macs(node, graph)
        operands = node.operands
        for inner_json in node.graphs if depth < MAX_EXPORTED_GRAPH_DEPTH else ():
            for operation in _count_macs(inner_graph(inner_json, operands, graph), depth + 1):
                yield operation if node.op.startswith(_RUN_ONCE) else replace(operation, macs=None)


def _node_macs(node: ExportedNode, graph: ExportedGraph) -> Iterator[Operation]:
    if node.op in _RECURRENT:
        data = graph.shape(node.tensor("input"))
        names = [*node.tensors("params"), node.tensor("w_ih"), node.tensor("w_hh")]
        for name in filter(None, names):
            weight = graph.shape(name)
            if weight is not None and len(weight) == 2:
                macs = None if data is None else numel((*data[:-1], *weight))
                yield _operation(node, graph, name, macs)
    elif node.op in _RULES:
        rule, argument = _RULES[node.op]
        try:
            macs = rule(node, graph)
        except _UnknownError:
            macs = None
        yield _operation(node, graph, node.tensor(argument), macs)


def _operation(node: ExportedNode, graph: ExportedGraph, name: str, macs: int | None) -> Operation:
    weight = graph.weight(name)
    layer = weight.rpartition(".")[0] or node.module or (node.outputs[0] if node.outputs else node.op)
    return Operation(layer, node.op, macs, weight)


class _UnknownError(Exception):
    """The program does not state a size."""


def _shape(node: ExportedNode, graph: ExportedGraph, argument: str) -> Shape:
    shape = graph.shape(node.tensor(argument))
    if shape is None:
        raise _UnknownError
    return shape


def _output(node: ExportedNode, graph: ExportedGraph) -> Shape:
    shape = graph.shape(node.outputs[0]) if node.outputs else None
    if shape is None:
        raise _UnknownError
    return shape


def _convolution(node: ExportedNode, graph: ExportedGraph) -> int | None:
    weight = _shape(node, graph, "weight")
    if node.flag("transposed"):
        return _transposed(node, graph)
    return numel((*_output(node, graph), *weight[1:]))


def _transposed(node: ExportedNode, graph: ExportedGraph) -> int | None:
    return numel((*_shape(node, graph, "input"), *_shape(node, graph, "weight")[1:]))


def _summed_over(argument: str) -> Callable[[ExportedNode, ExportedGraph], int | None]:
    """The MAC rule of a matrix product that sums over the last axis of an argument."""

    def rule(node: ExportedNode, graph: ExportedGraph) -> int | None:
        return numel((*_output(node, graph), *_shape(node, graph, argument)[-1:]))

    return rule


def _attention(node: ExportedNode, graph: ExportedGraph) -> int | None:
    query, key, value = (_shape(node, graph, name) for name in ("query", "key", "value"))
    scores = numel((*query, *key[-2:-1]))
    mixed = numel((*query[:-1], *value[-2:]))
    return None if scores is None or mixed is None else scores + mixed


def _einsum(node: ExportedNode, graph: ExportedGraph) -> int | None:
    """The MACs of an einsum of two tensors: the product of the lengths of all labels."""
    left, _, _ = node.string_arg("equation").replace(" ", "").partition("->")
    labels, names = left.split(","), node.tensors("tensors")
    if len(names) != 2 or len(labels) != 2:
        raise _UnknownError
    lengths: dict[str, int | None] = {}
    for letters, name in zip(labels, names, strict=True):
        shape = graph.shape(name)
        if shape is None or len(shape) != len(letters) or "." in letters:
            raise _UnknownError
        for letter, length in zip(letters, shape, strict=True):
            # An axis of length 1 is broadcast to the length of the other.
            lengths[letter] = length if lengths.get(letter, 1) == 1 else lengths[letter]
    return numel(lengths.values())


_RECURRENT = frozenset(
    {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
)
_RULES: dict[str, tuple[Callable[[ExportedNode, ExportedGraph], int | None], str]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), (_convolution, "weight")),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), (_transposed, "weight")),
    "linear": (_summed_over("weight"), "weight"),
    "addmm": (_summed_over("mat1"), "mat2"),
    "mm": (_summed_over("self"), "mat2"),
    "bmm": (_summed_over("self"), "mat2"),
    "baddbmm": (_summed_over("batch1"), "batch2"),
    "matmul": (_summed_over("self"), "other"),
    "mv": (_summed_over("self"), "self"),
    "addmv": (_summed_over("mat"), "mat"),
    "dot": (_summed_over("self"), "tensor"),
    "einsum": (_einsum, ""),
    "scaled_dot_product_attention": (_attention, ""),
    "_scaled_dot_product_flash_attention": (_attention, ""),
    "_scaled_dot_product_flash_attention_for_cpu": (_attention, ""),
    "_scaled_dot_product_efficient_attention": (_attention, ""),
    **dict.fromkeys(
        ("bilinear", "_native_multi_head_attention", "_transformer_encoder_layer_fwd"), (lambda _, __: None, "weight")
    ),
}
