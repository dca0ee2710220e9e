"""TensorFlow Lite, by its own converter and interpreter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunectl.errors import WorkError
from prunectl.exporting.compare import Run
from prunectl.exporting.inputs import text
from prunectl.exporting.job import ExportJob
from prunectl.exporting.quiet import silence
from prunectl.exporting.tensorflow import DEFAULT, TfRunnable, save
from prunectl.formats.base import Array
from prunectl.training.keras.backend import keras_two, quietly
from prunectl.training.keras.load import first_line

_tf = keras_two().tensorflow


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write a TensorFlow Lite model with one signature."""
    between = job.scratch / "between"
    save(job, between)
    converter = _tf.lite.TFLiteConverter.from_saved_model(str(between), signature_keys=[DEFAULT])
    said = _set(converter, job)
    try:
        with silence(), quietly():
            found = converter.convert()
    except Exception as error:
        raise _failed(job, error) from error
    target.write_bytes(found)
    return said


def _set(converter: Any, job: ExportJob) -> tuple[str, ...]:
    request, optimize = job.request, _tf.lite.Optimize
    chosen, said = [], []
    if request.is_half or request.is_int8:
        chosen.append(optimize.DEFAULT)
    if request.is_half:
        converter.target_spec.supported_types = [_tf.float16]
        said.append("Its weights are 16-bit floats; what goes in and comes out stays as it was.")
    if request.is_int8 and request.data:
        converter.representative_dataset = lambda: _examples(job)
        said.append(f"Weights and activations are 8-bit integers, their ranges by {job.inputs.examples} examples.")
    elif request.is_int8:
        said.append("Weights are 8-bit integers where they are large; activations stay floats without --data.")
    if request.is_sparse:
        chosen.append(optimize.EXPERIMENTAL_SPARSITY)
    converter.optimizations = chosen
    return tuple(said)


def _examples(job: ExportJob) -> Iterator[dict[str, Array]]:
    names = [flow.name for flow in job.flows]
    for batch in job.inputs.batches:
        for at in range(len(batch[0])):
            yield {name: one[at : at + 1] for name, one in zip(names, batch, strict=True)}


def _failed(job: ExportJob, error: Exception) -> WorkError:
    # The converter says where in a file of its own it was, and in a later line what of TensorFlow it has no way for.
    told = re.search(r"'(tf\.[\w.]+)' op ([^\n]*)", str(error))
    reason = f"{told[1]} {told[2]}" if told else first_line(error)
    return WorkError(f"the converter of TensorFlow Lite cannot take {job.file.path}: {reason}", hint=_hint(job))


def _hint(job: ExportJob) -> str:
    if not any(flow.shape is None or None in flow.shape for flow in job.flows):
        return ""
    fixed = " ".join(f"--input {flow.name}:1,{text(flow.shape)[2:]}" for flow in job.flows)
    if job.file.format == "saved-model" and job.file.about.keras is not None:
        # What it serves keeps the open axes that it was traced with.
        return f"fixed shapes may help, of what Keras builds: prunectl export {job.file.path} -o m.h5, and then {fixed}"
    return f"fixed shapes may help: {fixed}"


def runner(job: ExportJob, target: Path) -> Run:
    """Return what runs the result in the interpreter."""
    live: TfRunnable = job.live
    with silence():
        interpreter = _tf.lite.Interpreter(model_path=str(target), num_threads=1)
        run_signature = interpreter.get_signature_runner(DEFAULT)

    def run(inputs: tuple[Array, ...]) -> dict[str, Array]:
        feeds = {flow.name: one.astype(flow.dtype) for flow, one in zip(job.flows, inputs, strict=True)}
        try:
            with silence():
                found = run_signature(**feeds)
        except Exception as error:
            raise WorkError(f"TensorFlow Lite cannot run what was made: {first_line(error)}") from error
        return {name: found[name] for name in live.answers}

    return run
