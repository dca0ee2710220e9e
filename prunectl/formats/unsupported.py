"""Messages for files and folders that no format recognises: what they are, and what to do."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from prunectl.errors import InputError, abbreviated
from prunectl.formats.detect import FileProbe, missing_index
from prunectl.formats.registry import FORMATS, resolve

_MODEL_SUFFIXES = (".pt", ".pth", ".h5", ".keras", ".onnx", ".safetensors")
_ORBAX_FILES = frozenset({"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"})
_ENGINE = "is a TensorRT engine, which is made for one GPU: prune the ONNX file that it was built from"
_SAVE = "which is not read: save the parameters as safetensors (safetensors.flax.save_file)"
_CORE_ML = "is a Core ML model, which is not read: prune the model that it was converted from"
_MAGICS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the model: run `git lfs pull` to fetch it"),
    (b"\x1f\x8b", "is gzipped: unpack it first"),
    (b"BZh", "is compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ", "is compressed with xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it first"),
    (b"GGUF", "is a GGUF file, which is not read: prune the model folder that it was made from, and convert that"),
    (b"ptrt", _ENGINE),
    (b"ftrt", _ENGINE),
    (b"\x93NUMPY", "is a NumPy array, not a model"),
    (b"<?xml", "is XML, not a model"),
    (b"<!DOCTYPE", "is a web page, not a model: the download failed"),
    (b"<html", "is a web page, not a model: the download failed"),
    (b"\x7fELF", "is a program, not a model"),
    (b"%PDF", "is a PDF, not a model"),
    (b"\x89PNG", "is an image, not a model"),
)
_BY_SUFFIX = {
    ".mlmodel": _CORE_ML,
    ".msgpack": f"is a file of Flax, {_SAVE}",
}
"""Messages by suffix, for formats without a magic number."""


def explain_unsupported(probe: FileProbe) -> str:
    """A description of a file that no format recognises, to follow its name in a message."""
    if probe.is_folder:
        return _CORE_ML if probe.path.suffix == ".mlpackage" else _describe_folder(probe)
    if probe.nbytes == 0:
        return "is empty"
    by_suffix = "" if probe.head.isascii() else _BY_SUFFIX.get(probe.path.suffix, "")
    known = next((sentence for magic, sentence in _MAGICS if probe.head.startswith(magic)), by_suffix)
    if known:
        return known
    if probe.head.startswith(b"PK"):
        return _describe_zip(probe)
    if probe.head[257:262] == b"ustar":
        return "is a tar archive without a model in it that prunectl reads: unpack it first"
    if probe.head[:1] == b"\x80" and probe.head[1:2] in b"\x02\x03\x04\x05":
        return "is a Python pickle, but not one that torch wrote; opening it would run code, so it is refused"
    if part := _describe_part(probe):
        return part
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in probe.head):
        return "is text, not a model"
    return "is not in a model format that prunectl reads"


def _describe_folder(probe: FileProbe) -> str:
    try:
        names = sorted(child.name for child in probe.path.iterdir())[:1000]
    except OSError as error:
        return f"cannot be listed: {error.strerror}"
    if not names:
        return "is an empty folder"
    # Orbax's CheckpointManager writes each checkpoint into a subfolder named by its step.
    folders_of_steps = (probe.path, *(probe.path / name for name in names))
    if any((folder / marker).exists() for folder in folders_of_steps for marker in _ORBAX_FILES):
        return f"is a checkpoint of Orbax, {_SAVE}"
    return _describe_models_inside(probe, names)


def _describe_models_inside(probe: FileProbe, names: list[str]) -> str:
    for name in names:
        if (probe.path / name / "saved_model.pb").is_file():
            return f"is a folder of SavedModels, not one: name a version, such as {probe.path / name}"
    if "saved_model.pbtxt" in names:
        return "is a SavedModel in text form (saved_model.pbtxt), which prunectl does not read"
    if ".prunectl-parts" in names:
        return "is a folder of parts that are not joined yet: run prunectl prune with --join"
    if shards := missing_index(names):
        return f"{shards}: download or save it too, or name one shard"
    parts = {name.partition(".data-0")[0] for name in names if ".data-0" in name}
    if index := next((name for name in names if name.removesuffix(".index") in parts), ""):
        return f"is a folder of TensorFlow checkpoints: name one, such as {probe.path / index}"
    if models := [name for name in names if name.endswith((*_MODEL_SUFFIXES, ".ckpt"))]:
        return (
            f"is a folder of files, of which none is known to be its model: name one, such as {probe.path / models[0]}"
        )
    # Such as old models of sentence-transformers, in `0_Transformer`, and the checkpoints of a training run.
    if folders := [name for name in names if _is_model_folder(probe.path / name)]:
        first, _ = _name_and_step(folders[0])
        last = max((name for name in folders if _name_and_step(name)[0] == first), key=_name_and_step)
        return f"has no model of its own, but folders with models: name one, such as {probe.path / last}"
    return "is a folder without a saved_model.pb or any other model that prunectl reads"


def _is_model_folder(path: Path) -> bool:
    real = resolve(path)
    with suppress(InputError):  # a file that cannot be read is not a model
        return real != path and any(row.matches(FileProbe(real)) for row in FORMATS)
    return False


def _name_and_step(name: str) -> tuple[str, int]:
    """Split a name before the number at its end, so that `checkpoint-20` is sorted before `checkpoint-100`."""
    step = re.search(r"[0-9]{1,18}$", name)
    return (name[: step.start()], int(step[0])) if step else (name, -1)


def _describe_zip(probe: FileProbe) -> str:
    if not probe.entries:
        return "is a zip that is truncated or damaged: its directory of entries cannot be read"
    if all(name.endswith(".npy") for name in probe.entries):
        return "is a NumPy archive (.npz), not a model"
    inner = [name for name in probe.entries if name.endswith(_MODEL_SUFFIXES)]
    if inner:
        examples = ", ".join(map(abbreviated, inner[:3]))
        return f"is a zip with models inside, not a model: unpack it and name one of {examples}"
    if {"config.json", "metadata.json"} <= set(probe.entries):
        return "has the architecture of a Keras model, but no weights (model.weights.h5): save the whole model"
    return f"is a zip, but not a model: it holds {', '.join(map(abbreviated, probe.entries[:3]))}"


def _describe_part(probe: FileProbe) -> str:
    """The message for a part of a TensorFlow or Keras model, or for a frozen graph; empty for other files."""
    if probe.path.name == "saved_model.pb":
        return f"is the graph of a SavedModel: name its folder, {probe.path.parent}"
    if probe.path.name == "keras_metadata.pb" or ".data-0" in probe.path.name:
        return "is a part of a TensorFlow model: name its folder, or the .index file of its checkpoint"
    if probe.path.name.endswith(".weights.json"):
        return "is the index of shards that Keras wrote, which prunectl reads one by one: name a .weights.h5 beside it"
    # A GraphDef begins with a node (field 1), and a node names its operation in field 2.
    if probe.head[:1] == b"\x0a" and (b"\x12\x0bPlaceholder" in probe.head or b"\x12\x05Const" in probe.head):
        return "is a frozen TensorFlow graph, which prunectl does not read: convert it to a SavedModel or to ONNX"
    return ""
