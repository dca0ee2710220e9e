"""TensorFlow Lite, by its own converter and interpreter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunectl.errors import WorkError
from prunectl.exporting.compare import Run
from prunectl.exporting.job import ExportJob, shape_text
from prunectl.exporting.tensorflow import DEFAULT, TfRunnable, save
from prunectl.formats.base import Array, Family
from prunectl.training.keras.backend import load_keras2
from prunectl.training.keras.load import error_line
from prunectl.training.quiet import ignore_warnings, silence

_tf = load_keras2().tensorflow


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write a TensorFlow Lite model with one signature."""
    saved_model = job.scratch / "between"
    save(job, saved_model)
    converter = _tf.lite.TFLiteConverter.from_saved_model(str(saved_model), signature_keys=[DEFAULT])
    notes = _configure(converter, job)
    try:
        with silence(), ignore_warnings():
            content = converter.convert()
    except Exception as error:
        raise _failed(job, error) from error
    target.write_bytes(content)
    return notes


def _configure(converter: Any, job: ExportJob) -> tuple[str, ...]:
    request, optimize = job.request, _tf.lite.Optimize
    optimizations, notes = [], []
    if request.half or request.int8:
        optimizations.append(optimize.DEFAULT)
    if request.half:
        converter.target_spec.supported_types = [_tf.float16]
        notes.append("Its weights are 16-bit floats; what goes in and comes out stays as it was.")
    if request.int8 and request.data:
        converter.representative_dataset = lambda: _examples(job)
        notes.append(f"Weights and activations are 8-bit integers, their ranges by {job.samples.examples} examples.")
    elif request.int8:
        notes.append("Weights are 8-bit integers where they are large; activations stay floats without --data.")
    if request.sparse:
        optimizations.append(optimize.EXPERIMENTAL_SPARSITY)
    converter.optimizations = optimizations
    return tuple(notes)


def _examples(job: ExportJob) -> Iterator[dict[str, Array]]:
    names = [spec.name for spec in job.inputs]
    for batch in job.samples.batches:
        for index in range(len(batch[0])):
            yield {name: array[index : index + 1] for name, array in zip(names, batch, strict=True)}


def _failed(job: ExportJob, error: Exception) -> WorkError:
    # The converter says where in a file of its own it was, and in a later line what of TensorFlow it has no way for.
    match = re.search(r"'(tf\.[\w.]+)' op ([^\n]*)", str(error))
    reason = f"{match[1]} {match[2]}" if match else error_line(error)
    return WorkError(f"the converter of TensorFlow Lite cannot take {job.file.path}: {reason}", hint=_hint(job))


def _hint(job: ExportJob) -> str:
    if not any(spec.shape is None or None in spec.shape for spec in job.inputs):
        return ""
    fixed = " ".join(f"--input {spec.name}:1,{shape_text(spec.shape)[2:]}" for spec in job.inputs)
    if job.file.family is Family.SAVED_MODEL and job.file.about.keras is not None:
        # What it serves keeps the open axes that it was traced with.
        return f"fixed shapes may help, of what Keras builds: prunectl export {job.file.path} -o m.h5, and then {fixed}"
    return f"fixed shapes may help: {fixed}"


def runner(job: ExportJob, target: Path) -> Run:
    """A function that runs the result in the interpreter."""
    runnable: TfRunnable = job.runnable
    with silence():
        interpreter = _tf.lite.Interpreter(model_path=str(target), num_threads=1)
        run_signature = interpreter.get_signature_runner(DEFAULT)

    def run(inputs: tuple[Array, ...]) -> dict[str, Array]:
        feeds = {spec.name: array.astype(spec.dtype) for spec, array in zip(job.inputs, inputs, strict=True)}
        try:
            with silence():
                outputs = run_signature(**feeds)
        except Exception as error:
            raise WorkError(f"TensorFlow Lite cannot run what was made: {error_line(error)}") from error
        return {name: outputs[name] for name in runnable.output_names}

    return run
