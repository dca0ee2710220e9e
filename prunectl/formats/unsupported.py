"""What a file or folder is that no format recognises, and what to do about it."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from prunectl.errors import InputError, abbreviated
from prunectl.formats.detect import FileProbe, missing_index
from prunectl.formats.registry import FORMATS, resolve

_OF_MODELS = (".pt", ".pth", ".h5", ".keras", ".onnx", ".safetensors")
_OF_ORBAX = frozenset({"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"})
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
"""What its first bytes do not tell."""


def explain_unsupported(peek: FileProbe) -> str:
    """The best guess at what a file that no format recognises is."""
    if peek.is_folder:
        return _CORE_ML if peek.path.suffix == ".mlpackage" else _describe_folder(peek)
    if peek.nbytes == 0:
        return "is empty"
    by_suffix = "" if peek.head.isascii() else _BY_SUFFIX.get(peek.path.suffix, "")
    known = next((sentence for magic, sentence in _MAGICS if peek.head.startswith(magic)), by_suffix)
    if known:
        return known
    if peek.head.startswith(b"PK"):
        return _describe_zip(peek)
    if peek.head[257:262] == b"ustar":
        return "is a tar archive without a model in it that prunectl reads: unpack it first"
    if peek.head[:1] == b"\x80" and peek.head[1:2] in b"\x02\x03\x04\x05":
        return "is a Python pickle, but not one that torch wrote; opening it would run code, so it is refused"
    if of_tensorflow := _describe_part(peek):
        return of_tensorflow
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in peek.head):
        return "is text, not a model"
    return "is not in a model format that prunectl reads"


def _describe_folder(peek: FileProbe) -> str:
    try:
        names = sorted(child.name for child in peek.path.iterdir())[:1000]
    except OSError as error:
        return f"cannot be listed: {error.strerror}"
    if not names:
        return "is an empty folder"
    # A manager of checkpoints keeps each in a folder by its step.
    if any(
        (folder / own).exists() for folder in (peek.path, *(peek.path / name for name in names)) for own in _OF_ORBAX
    ):
        return f"is a checkpoint of Orbax, {_SAVE}"
    return _describe_models_inside(peek, names)


def _describe_models_inside(peek: FileProbe, names: list[str]) -> str:
    for name in names:
        if (peek.path / name / "saved_model.pb").is_file():
            return f"is a folder of SavedModels, not one: name a version, such as {peek.path / name}"
    if "saved_model.pbtxt" in names:
        return "is a SavedModel in text form (saved_model.pbtxt), which prunectl does not read"
    if ".prunectl-parts" in names:
        return "is a folder of parts that are not joined yet: run prunectl prune with --join"
    if shards := missing_index(names):
        return f"{shards}: download or save it too, or name one shard"
    parts = {name.partition(".data-0")[0] for name in names if ".data-0" in name}
    if index := next((name for name in names if name.removesuffix(".index") in parts), ""):
        return f"is a folder of TensorFlow checkpoints: name one, such as {peek.path / index}"
    if models := [name for name in names if name.endswith((*_OF_MODELS, ".ckpt"))]:
        return (
            f"is a folder of files, of which none is known to be its model: name one, such as {peek.path / models[0]}"
        )
    # Old models of sentence-transformers lie so, in `0_Transformer`, and the checkpoints of a training.
    if folders := [name for name in names if _is_model_folder(peek.path / name)]:
        first, _ = _name_and_step(folders[0])
        last = max((name for name in folders if _name_and_step(name)[0] == first), key=_name_and_step)
        return f"has no model of its own, but folders with models: name one, such as {peek.path / last}"
    return "is a folder without a saved_model.pb or any other model that prunectl reads"


def _is_model_folder(path: Path) -> bool:
    real = resolve(path)
    with suppress(InputError):  # what cannot be read
        return real != path and any(row.matches(FileProbe(real)) for row in FORMATS)
    return False


def _name_and_step(name: str) -> tuple[str, int]:
    """What precedes the number at the end of a name, and that number: `checkpoint-20` comes before `checkpoint-100`."""
    step = re.search(r"[0-9]{1,18}$", name)
    return (name[: step.start()], int(step[0])) if step else (name, -1)


def _describe_zip(peek: FileProbe) -> str:
    if not peek.entries:
        return "is a zip that is truncated or damaged: its directory of entries cannot be read"
    if all(name.endswith(".npy") for name in peek.entries):
        return "is a NumPy archive (.npz), not a model"
    inner = [name for name in peek.entries if name.endswith(_OF_MODELS)]
    if inner:
        some = ", ".join(map(abbreviated, inner[:3]))
        return f"is a zip with models inside, not a model: unpack it and name one of {some}"
    return f"is a zip, but not a model: it holds {', '.join(map(abbreviated, peek.entries[:3]))}"


def _describe_part(peek: FileProbe) -> str:
    """Which part of a TensorFlow or Keras model a file is, if it is one."""
    if peek.path.name == "saved_model.pb":
        return f"is the graph of a SavedModel: name its folder, {peek.path.parent}"
    if peek.path.name == "keras_metadata.pb" or ".data-0" in peek.path.name:
        return "is a part of a TensorFlow model: name its folder, or the .index file of its checkpoint"
    if peek.path.name.endswith(".weights.json"):
        return "is the index of shards that Keras wrote, which prunectl reads one by one: name a .weights.h5 beside it"
    # A GraphDef begins with a node (field 1), and a node names its operation in field 2.
    if peek.head[:1] == b"\x0a" and (b"\x12\x0bPlaceholder" in peek.head or b"\x12\x05Const" in peek.head):
        return "is a frozen TensorFlow graph, which prunectl does not read: convert it to a SavedModel or to ONNX"
    return ""
