"""Keras 2 and 3 models as sources, and as targets in the other file format of their library."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.exporting.compare import Run
from prunectl.exporting.job import ExportJob, InputSpec, threads_of
from prunectl.exporting.tensorflow import TfRunnable, set_threads
from prunectl.formats.base import ModelFile
from prunectl.formats.keras.config import with_precision
from prunectl.formats.registry import open_model
from prunectl.formats.zip_read import open_archive
from prunectl.formats.zip_write import EPOCH, rewrite_zip
from prunectl.training.backend import LoadOptions
from prunectl.training.keras import outputs
from prunectl.training.keras.backend import DevicePlacement, load_keras2
from prunectl.training.keras.load import LoadedModel, error_line, load
from prunectl.training.keras.outputs import flatten
from prunectl.training.quiet import ignore_warnings

_tf = load_keras2().tensorflow


def in_float32(model: ModelFile, scratch: Path) -> tuple[ModelFile, tuple[str, ...]]:
    """A model with layers of lower precision raised to float32, as converters lack most of their operations.

    Their rounding would also differ between runtimes.
    """
    config = model.about.keras or {}
    raised = with_precision("float32", config)
    if raised == config:
        return model, ()
    written = scratch / f"float32{model.path.suffix}"
    text = json.dumps(raised)
    if model.format == "keras":
        rewrite_zip(open_archive(model.path), written, {"config.json": (len(text), [text.encode()])})
    else:
        shutil.copyfile(model.path, written)
        with h5py.File(written, "r+", locking=False) as file:
            file.attrs["model_config"] = text
    return open_model(written), ("Layers that compute in 16-bit floats compute in 32-bit floats in the output.",)


def open_runnable(model: ModelFile, origin: LoadOptions) -> TfRunnable:
    """Load a Keras model to be run by TensorFlow."""
    set_threads(threads_of(origin))
    loaded = load(model, origin, DevicePlacement())
    if not loaded.library.is_on_tensorflow:
        raise UsageError(
            f"Keras uses the backend {loaded.library.backend}, but only the TensorFlow backend can export",
            hint="set KERAS_BACKEND=tensorflow",
        )
    keras_model = loaded.model
    signature = outputs.signature(keras_model)
    sizes = _batch_sizes(keras_model, len(signature.inputs))
    inputs = tuple(
        InputSpec(spec.name, None if spec.shape is None else (size, *spec.shape), spec.dtype or "float32")
        for spec, size in zip(signature.inputs, sizes, strict=True)
    )

    def call(arguments: Sequence[Any]) -> list[Any]:
        return flatten(keras_model(outputs.pack_inputs(keras_model, tuple(arguments)), training=False))

    output_names = tuple(dict.fromkeys(spec.name for spec in signature.outputs))
    if len(output_names) != len(signature.outputs):
        output_names = tuple(f"output_{index}" for index in range(len(signature.outputs)))
    return TfRunnable(
        inputs,
        output_names,
        call,
        _tf.function(call),
        keras_model,
        signature.is_channels_first,
        (f"The source is a Keras {2 if loaded.library.is_keras2 else 3} model.",),
        keras=loaded,
    )


def _batch_sizes(model: Any, count: int) -> list[int | None]:
    try:
        tensors = flatten(getattr(model, "inputs", None) or ())
    except (AttributeError, ValueError):
        tensors = []
    sizes: list[int | None] = [None if tensor.shape[0] is None else int(tensor.shape[0]) for tensor in tensors]
    return sizes if len(sizes) == count else [None] * count


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Save the model by its own library; an archive is rewritten without timestamps."""
    runnable: TfRunnable = job.runnable
    loaded: LoadedModel = runnable.keras
    suffix = ".h5" if job.request.to == "h5" else ".keras"
    scratch = job.scratch / f"saved{suffix}"
    try:
        with ignore_warnings():
            loaded.model.save(
                str(scratch), **({"save_format": "h5"} if loaded.library.is_keras2 and suffix == ".h5" else {})
            )
    except Exception as error:
        raise WorkError(f"Keras cannot save {job.file.path} as {suffix}: {error_line(error)}") from error
    if suffix == ".keras":
        _without_times(scratch, target)
    else:
        target.write_bytes(scratch.read_bytes())
    return (
        ("The output is a Keras 2 file: load it with tf_keras, not with Keras 3.",) if loaded.library.is_keras2 else ()
    )


def _without_times(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "x") as new:
        for info in sorted(old.infolist(), key=lambda info: info.filename):
            entry = zipfile.ZipInfo(info.filename, EPOCH)
            entry.compress_type = info.compress_type
            new.writestr(entry, _without_date(info.filename, old.read(info)))


def _without_date(name: str, content: bytes) -> bytes:
    if name != "metadata.json":
        return content
    metadata = json.loads(content)
    return json.dumps({**metadata, "date_saved": "1980-01-01@00:00:00"}).encode()


def runner(job: ExportJob, target: Path) -> Run:
    """A function that runs the result, loaded from its file again."""
    origin = replace(job.request.origin, model="")
    try:
        return open_runnable(open_model(target), origin).run
    except InputError as error:
        reason = error.message.replace(str(target), "it")
        raise WorkError(f"Keras cannot load {job.file.path} after saving it as {job.request.to}: {reason}") from error
