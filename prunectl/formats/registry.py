"""The table of formats: the name of each, the function that recognises it, and those that open and write it."""

from __future__ import annotations

import gc
import importlib
import math
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, abbreviated, reading
from prunectl.formats import budgets, detect
from prunectl.formats.base import Capability, Family, Format, ModelFile, Tensor, format_shape
from prunectl.formats.detect import FileProbe
from prunectl.formats.extents import REMOTE, file_state, file_states

FORMATS = (
    Format(
        "saved-model",
        "TensorFlow SavedModel",
        ("",),
        detect.is_saved_model,
        "tensorflow.model:open_saved_model",
        Family.SAVED_MODEL,
        writer="tensorflow.bundle_write:write",
        can_reencode=True,
        stripper="tensorflow.strip:strip_saved_model",
        graph="keras.flops:operations",
    ),
    Format(
        "keras-h5",
        "Keras HDF5",
        (".h5", ".hdf5"),
        detect.is_hdf5,
        "keras.model:open_h5",
        Family.KERAS,
        writer="keras.hdf5.rewrite:write",
        stripper="keras.strip:strip_h5",
        can_reencode=True,
        packer="keras.hdf5.rebuild:pack",
        graph="keras.flops:operations",
    ),
    Format(
        "keras",
        "Keras archive",
        (".keras",),
        detect.is_keras_zip,
        "keras.model:open_zip",
        Family.KERAS,
        writer="keras.hdf5.rewrite:write_zip",
        stripper="keras.strip:strip_archive",
        can_reencode=True,
        packer="zip_write:pack",
        graph="keras.flops:operations",
    ),
    Format(
        "deepspeed-zero",
        "DeepSpeed ZeRO checkpoint",
        (".pt",),
        detect.is_zero_checkpoint,
        "torch.zero:open_checkpoint",
        writer="",
        is_of_ranks=True,
    ),
    Format(
        "torch-export",
        "PyTorch exported program",
        (".pt2",),
        detect.is_exported_program,
        "torch.exported:open_model",
        Family.TORCH_PROGRAM,
        writer="zip_write:write",
        can_reencode=True,
        packer="zip_write:pack",
        graph="torch.exported:operations",
        stripper="torch.exported:strip_examples",
    ),
    Format(
        "torch",
        "PyTorch",
        (".pt", ".pth", ".bin"),
        detect.is_torch_zip,
        "torch.model:open_model",
        Family.TORCH,
        writer="zip_write:write",
        can_reencode=True,
        packer="zip_write:pack",
        stripper="torch.strip:strip",
    ),
    Format(
        "torch-legacy",
        "PyTorch before 1.6",
        (".pt", ".pth"),
        detect.is_torch_legacy,
        "torch.legacy:open_legacy",
        Family.TORCH,
        stripper="torch.strip:strip",
    ),
    Format(
        "torch-tar",
        "PyTorch before 0.2",
        (".pt", ".pth", ".tar"),
        detect.is_torch_tar,
        "torch.legacy:open_tar",
        Family.TORCH,
    ),
    Format(
        "shards",
        "sharded checkpoint",
        (".json",),
        detect.is_shard_index,
        "safetensors:open_shards",
        Family.SAFETENSORS,
        writer="safetensors:write_shards",
    ),
    Format(
        "torch-dcp",
        "PyTorch distributed checkpoint",
        ("",),
        detect.is_distributed_checkpoint,
        "torch.distributed:open_checkpoint",
        writer="",
        is_of_ranks=True,
    ),
    Format(
        "diffusers",
        "pipeline of diffusers",
        ("",),
        detect.is_pipeline,
        "pipeline:open_pipeline",
        stripper="pipeline:strip",
    ),
    Format(
        "safetensors",
        "safetensors",
        (".safetensors",),
        detect.is_safetensors,
        "safetensors:open_model",
        Family.SAFETENSORS,
        stripper="safetensors:strip",
    ),
    Format(
        "tflite",
        "TensorFlow Lite",
        (".tflite",),
        detect.is_tflite,
        "tflite:open_model",
        Family.LITE,
        graph="tflite:operations",
    ),
    Format(
        "tf-checkpoint",
        "TensorFlow checkpoint",
        (".index",),
        detect.is_checkpoint_index,
        "tensorflow.model:open_checkpoint",
        writer="tensorflow.bundle_write:write",
        can_reencode=True,
        stripper="tensorflow.strip:strip_checkpoint",
    ),
    Format(
        "onnx",
        "ONNX",
        (".onnx",),
        detect.is_onnx,
        "onnx.model:open_model",
        Family.ONNX,
        packer="onnx.rewrite:pack",
        writer="onnx.rewrite:write",
        can_reencode=True,
        graph="onnx.flops:operations",
    ),
)
SUFFIXES = frozenset(suffix for row in FORMATS for suffix in row.suffixes if suffix)
"""Suffixes of model files; a path without one may be a folder."""

WEIGHT_FILES = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
"""Files with the weights in a folder of Hugging Face, of an adapter, or of a part of a diffusers pipeline."""
_RANK_METADATA = (".metadata", "pytorch_model_fsdp_0/.metadata")
"""Metadata of a distributed checkpoint, or of Accelerate's; folders of Flutter and Eclipse have such a file too."""

_CANNOT = {
    Capability.PACK: "the container has no compression of its own",
    Capability.STRIP: "strip can neither remove tensors from this format nor store them as 16-bit floats",
    Capability.FLOPS: "it holds tensors, but no graph to count operations in",
    Capability.WRITE: "its format comes from a plug-in, which only reads it",
}


_BLOCK_BYTES = 512
"""The unit of `st_blocks`."""


def by_name(name: str) -> Format:
    """The row of a format, built in or of a plug-in."""
    return next((row for row in FORMATS if row.name == name), None) or load("external:by_name")(name)


def load(reference: str | Callable[..., Any]) -> Callable[..., Any]:
    """Import a function that a row of the table names as `module:function`."""
    if callable(reference):
        return reference
    module, _, attribute = reference.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(f"prunectl.formats.{module}"), attribute)
    return function


def recognise(path: Path) -> Format:
    """The format of ``path``, recognised by its content; among several matches, its suffix decides."""
    probe = FileProbe(path)
    # Plug-ins are loaded only if no built-in format matches: they cannot take over a file, nor slow down each start.
    row = _best_match(FORMATS, probe) or _best_match(load("external:installed_formats")(), probe)
    if row is not None:
        return row
    known = " ".join(dict.fromkeys(suffix for row in FORMATS for suffix in row.suffixes if suffix))
    what = load("unsupported:explain_unsupported")(probe)
    raise InputError(f"{path} {what}", hint=f"prunectl reads SavedModel folders and {known}")


def _best_match(rows: Iterable[Format], probe: FileProbe) -> Format | None:
    plausible = [row for row in rows if row.matches(probe)]
    return min(plausible, key=lambda row: probe.path.suffix.lower() not in row.suffixes, default=None)


def resolve(path: Path) -> Path:
    """The file behind a path that the user gave: a checkpoint's prefix, or a folder with weights or an index."""
    # os.path raises no errors for impossible names, for which FileProbe has a message.
    if not os.path.lexists(path) and os.path.isfile(f"{path}.index"):
        return path.with_name(f"{path.name}.index")
    if os.path.isdir(path) and not os.path.exists(path / "saved_model.pb"):
        names = chain(WEIGHT_FILES, _RANK_METADATA, detect.zero_checkpoints(path))
        return next((path / name for name in names if os.path.isfile(path / name)), path)
    return path


def open_model(path: Path) -> ModelFile:
    """Open a model of any format; InputError says why one cannot be opened."""
    real = resolve(path)
    with reading(real), uncollected():
        row = recognise(real)
        folder = path if real != path and path.is_dir() else None
        if folder is not None:
            detect.refuse_model_parallelism(real)
        # The state is taken before the opener reads the file, so that later changes are noticed.
        own_state = file_state(real)
        opened: ModelFile = load(row.opener)(real)
        states = file_states(opened.files, {**opened.states, real: own_state})
        model = replace(opened, family=row.family, folder=folder, states=states)
        for tensor in model.tensors:
            _refuse_impossible(real, tensor)
        _refuse_bombs(real, model)
    return model


@contextmanager
def uncollected() -> Generator[None]:
    """Disable the garbage collector: its passes over many new objects, all in use, take as long as the work itself."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _refuse_impossible(path: Path, tensor: Tensor) -> None:
    """Refuse a shape that no array can have; axes of length 0 do not excuse others that are too long."""
    name, shape = abbreviated(tensor.name), tensor.shape
    if len(shape) > budgets.MAX_AXES:
        raise InputError(f"{path} is refused: {name} claims {len(shape)} axes, but NumPy allows {budgets.MAX_AXES}")
    if math.prod(length for length in shape if length) > budgets.MAX_ELEMENTS:
        raise InputError(f"{path} is refused: {name} claims the shape {format_shape(shape)}, too large for any memory")


def _refuse_bombs(path: Path, model: ModelFile) -> None:
    """Refuse a model whose tensors expand to far more bytes than its files have, or share bytes read too often."""
    file_bytes = model.nbytes
    # Identical views are read once.
    views = {tensor.view_key: tensor for tensor in model.tensors}.values()
    encoded = [tensor for tensor in views if tensor.storage.extent is None]
    # A storage is decoded whole, and kept for the tensors that follow each other in it.
    storages = (next(group).storage.nbytes for _, group in groupby(encoded, key=lambda tensor: tensor.storage.key))
    expanded = max(sum(tensor.nbytes for tensor in encoded), sum(storages))
    if expanded > max(budgets.MAX_UNFOLDED_BYTES, budgets.MAX_UNFOLDING * file_bytes):
        raise InputError(f"{path} is refused: its tensors would expand to {expanded} bytes, as in a decompression bomb")
    flat = [tensor for tensor in model.tensors if tensor.storage.extent is not None]
    if len(flat) - len({tensor.storage.key for tensor in flat}) > budgets.MAX_TIED:
        raise InputError(
            f"{path} is refused: more than {budgets.MAX_TIED} of its tensors share their bytes with others"
        )
    read_bytes = sum(_read_bytes(tensor) for tensor in views if tensor.storage.extent is not None)
    stats = [file.stat() for file in model.files if file not in REMOTE]
    # Allocated blocks, not sizes, because a crafted file may have huge holes, which take no disk space.
    allocated = sum(min(fact.st_size, fact.st_blocks * _BLOCK_BYTES) for fact in stats)
    if read_bytes > file_bytes + max(budgets.MAX_UNFOLDED_BYTES, budgets.MAX_READINGS * allocated):
        raise InputError(f"{path} is refused: its tensors reuse the bytes that they share too many times")


def _read_bytes(tensor: Tensor) -> int:
    """Bytes that are read for a flat tensor; an expanded axis (stride 0) is read once."""
    steps = tensor.strides or (1,) * len(tensor.shape)
    lengths = (length for length, step in zip(tensor.shape, steps, strict=True) if step)
    return math.prod(lengths) * tensor.dtype.itemsize


def is_inside_folder(model: ModelFile) -> bool:
    """Whether the weights lie in a subfolder of the folder that was opened, as DeepSpeed saves them without ZeRO."""
    # A SavedModel is itself a folder: no files lie beside it, so its weights do not count as inside one.
    return not by_name(model.format).is_of_ranks and model.folder not in {None, model.path.parent}


def require(model: ModelFile, needs: Capability) -> None:
    """Raise an error if a format lacks a capability, before any work begins."""
    row = by_name(model.format)
    if needs & ~row.can and row.is_of_ranks:
        what = model.folder or model.path
        raise InputError(
            f"{what} is a checkpoint of many ranks ({row.title}), which prunectl only reads",
            hint=f"make a model of its weights first: prunectl strip {what} -o OUT",
        )
    if Capability.WRITE & needs and is_inside_folder(model):
        raise InputError(
            f"{model.folder} is a checkpoint of DeepSpeed, which prunectl only reads",
            hint=f"name the file of its weights, {model.path}",
        )
    if needs & ~row.can:
        raise InputError(f"{model.path} ({row.title}): {_CANNOT[needs if row.writer else Capability.WRITE]}")
