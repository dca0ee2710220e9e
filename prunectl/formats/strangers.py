"""What is it, if it is no model? A predicate that completes a sentence beginning with the path."""

from __future__ import annotations

from prunectl.errors import abbreviated
from prunectl.formats.peek import Peek

_MAGICS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the model: run `git lfs pull` to fetch it"),
    (b"\x1f\x8b", "is gzipped: unpack it first"),
    (b"BZh", "is compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ", "is compressed with xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it first"),
    (b"GGUF", "is a GGUF file, which prunectl does not read"),
    (b"\x93NUMPY", "is a NumPy array, not a model"),
    (b"<?xml", "is XML, not a model"),
    (b"<!DOCTYPE", "is a web page, not a model: the download went wrong"),
    (b"<html", "is a web page, not a model: the download went wrong"),
    (b"\x7fELF", "is a program, not a model"),
    (b"%PDF", "is a PDF, not a model"),
    (b"\x89PNG", "is a picture, not a model"),
)


def describe(peek: Peek) -> str:
    """Return the best guess at what a file that no format recognises is."""
    if peek.is_folder:
        return _describe_folder(peek)
    if peek.nbytes == 0:
        return "is empty"
    for magic, sentence in _MAGICS:
        if peek.head.startswith(magic):
            return sentence
    if peek.head.startswith(b"PK"):
        return _describe_zip(peek)
    if peek.head[257:262] == b"ustar":
        return "is a tar archive without a model in it that prunectl reads: unpack it first"
    if peek.head[:1] == b"\x80" and peek.head[1:2] in b"\x02\x03\x04\x05":
        return "is a Python pickle, but not one that torch wrote; opening it would run code, so it is refused"
    if of_tensorflow := _describe_part(peek):
        return of_tensorflow
    if _is_text(peek.head):
        return "is text, not a model"
    return "is not a model that prunectl knows"


def _describe_folder(peek: Peek) -> str:
    try:
        names = sorted(child.name for child in peek.path.iterdir())[:1000]
    except OSError as error:
        return f"cannot be listed: {error.strerror}"
    if not names:
        return "is an empty folder"
    for name in names:
        if (peek.path / name / "saved_model.pb").is_file():
            return f"is a folder of SavedModels, not one: name a version, such as {peek.path / name}"
    if "saved_model.pbtxt" in names:
        return "is a SavedModel in text form (saved_model.pbtxt), which prunectl does not read"
    if "checkpoint" in names:
        index = next((name for name in names if name.endswith(".index")), "*.index")
        return f"is a folder of TensorFlow checkpoints: name one, such as {peek.path / index}"
    return "is a folder without a saved_model.pb: not a SavedModel, nor anything else that prunectl reads"


def _describe_zip(peek: Peek) -> str:
    if not peek.entries:
        return "is a zip that is truncated or damaged: its directory of entries cannot be read"
    if all(name.endswith(".npy") for name in peek.entries):
        return "is a NumPy archive (.npz), not a model"
    inner = [name for name in peek.entries if name.endswith((".pt", ".pth", ".h5", ".keras", ".onnx", ".safetensors"))]
    if inner:
        some = ", ".join(map(abbreviated, inner[:3]))
        return f"is a zip with models inside, not a model: unpack it and name one of {some}"
    return f"is a zip, but no model: it holds {', '.join(map(abbreviated, peek.entries[:3]))}"


def _describe_part(peek: Peek) -> str:
    """Return which part of a TensorFlow model a file is, if it is one."""
    if peek.path.name == "saved_model.pb":
        return f"is the graph of a SavedModel: name its folder, {peek.path.parent}"
    if peek.path.name == "keras_metadata.pb" or ".data-0" in peek.path.name:
        return "is a part of a TensorFlow model: name its folder, or the .index file of its checkpoint"
    if _is_graph_def(peek.head):
        return "is a frozen TensorFlow graph, which prunectl does not read: convert it to a SavedModel or to ONNX"
    return ""


def _is_graph_def(head: bytes) -> bool:
    # A GraphDef begins with a node (field 1), and a node names its operation in field 2.
    return head[:1] == b"\x0a" and (b"\x12\x0bPlaceholder" in head or b"\x12\x05Const" in head)


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)
