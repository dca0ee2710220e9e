"""Weights of PyTorch with a class beside them that takes them, and needs nothing else."""

from __future__ import annotations

import io
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prunectl.channels.torch.checkpoint import class_of
from prunectl.channels.torch.checkpoint import companion_files as place_of
from prunectl.channels.torch.code.expressions import literal
from prunectl.channels.torch.code.module import Written
from prunectl.channels.torch.code.module import write as written_as
from prunectl.channels.torch.export import trace_model
from prunectl.channels.torch.fx import WeightedProgram
from prunectl.errors import InputError, UsageError, WorkError
from prunectl.exporting.compare import Run
from prunectl.exporting.inputs import InputSpec, text
from prunectl.exporting.job import ExportJob
from prunectl.exporting.quiet import quiet_conversion, without_mha_fastpath
from prunectl.exporting.torch import answers
from prunectl.exporting.weights import narrowed, save
from prunectl.formats.base import Array
from prunectl.formats.registry import open_model
from prunectl.training.torch.tensors import to_numpy, to_torch

_KINDS = {
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
    "uint8": "u8",
    "int32": "i32",
    "int64": "i64",
    "bool": "bool",
}


def beside(target: Path) -> tuple[Path, ...]:
    """Return where the class goes whose weights go to a target."""
    return (place_of(target),)


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write weights, and the class that was generated for them."""
    code = _generated(job, _loading(job.request.to, target.name))
    arrays = {name: narrowed(job.request, name, to_numpy(value)) for name, value in _typed(job, code).items()}
    if job.request.to == "safetensors":
        save(list(arrays.items()), {"format": "pt", **dict(job.request.metadata)}, target)
    else:
        whole = io.BytesIO()
        torch.save(_tied(arrays, code), whole)
        target.write_bytes(whole.getvalue())
    place_of(target).write_text(code.text, encoding="utf-8")
    return (
        f"The class {code.name} in {place_of(target).name} takes the weights, and needs nothing but torch.",
        *_lengths(job),
    )


def _generated(job: ExportJob, loading: tuple[str, ...]) -> Written:
    try:
        with without_mha_fastpath(), quiet_conversion():
            found = trace_model(job.file, _origin(job))
            # Of a program the module is all that there is of an original.
            found = found if found.original is not None else replace(found, original=found.program.module())
            return written_as(found, WeightedProgram(found.module), class_of(found), loading)
    except (WorkError, InputError) as error:
        raise WorkError(f"no code can be generated for {job.file.path}: {error.message}", hint=error.hint) from error


def _origin(job: ExportJob) -> Any:
    origin = job.request.origin
    if job.file.format == "torch-export" and not origin.model:
        return origin
    return replace(origin, inputs=tuple(map(_word, job.flows, job.inputs.batches[0])))


def _word(flow: InputSpec, example: Array) -> str:
    """Return an input as one example of it: an open axis is as long as what it is tried on."""
    if flow.dtype not in _KINDS:
        raise UsageError(f"--code knows no inputs of {flow.dtype}, which {flow.name} is")
    size = 1 if flow.shape is None or flow.shape[:1] == (None,) else len(example)
    return f"{','.join(map(str, (size, *example.shape[1:])))}:{_KINDS[flow.dtype]}"


def _lengths(job: ExportJob) -> tuple[str, ...]:
    """Return what to know of open axes: a length, once it was followed, may be a number like any other."""
    tried = [
        f"{flow.name}:{text((None, *example.shape[1:]))}"
        for flow, example in zip(job.flows, job.inputs.batches[0], strict=True)
        if flow.shape is not None and None in flow.shape[1:]
    ]
    return (f"The class was tried with {' and '.join(tried)} alone.",) if tried else ()


def _typed(job: ExportJob, code: Written) -> dict[str, torch.Tensor]:
    """Return the weights in the types of the file: what is 16 bits wide is followed in 32."""
    kinds = {tensor.dtype.name for tensor in job.file.tensors if tensor.is_float}
    if kinds in ({"float16"}, {"bfloat16"}):
        kind = getattr(torch, kinds.pop())
        return {name: value.to(kind) if value.is_floating_point() else value for name, value in code.state.items()}
    return dict(code.state)


def _tied(arrays: dict[str, Array], code: Written) -> dict[str, torch.Tensor]:
    known: dict[tuple[Any, ...], torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    for name, array in arrays.items():
        own = code.state[name]
        view = (own.data_ptr(), tuple(own.shape), own.stride(), own.dtype)
        known.setdefault(view if own.numel() else (name,), to_torch(array))
        found[name] = known[view if own.numel() else (name,)]
    return found


def _loading(to: str, name: str) -> tuple[str, ...]:
    if to == "safetensors":
        return (f"model.load_state_dict(safetensors.torch.load_file({literal(name)}))",)
    return (f"model.load_state_dict(torch.load({literal(name)}, weights_only=True))",)


def runner(job: ExportJob, target: Path) -> Run:
    """Return what runs the class that was written, with the weights that were."""
    home = types.ModuleType("written")
    exec(compile(place_of(target).read_text("utf-8"), place_of(target).name, "exec"), home.__dict__)  # noqa: S102 - it is our own text
    kinds = [kind for kind in vars(home).values() if isinstance(kind, type) and kind.__module__ == home.__name__]
    module = kinds[0]().eval()
    module.load_state_dict(_held(job, target), strict=True)

    def run(inputs: tuple[Array, ...]) -> dict[str, Array]:
        try:
            return answers(module, inputs)
        except UsageError as error:
            sizes = " ".join(f"--input {flow.name}:{len(inputs[0])},..." for flow in job.flows)
            raise WorkError(
                f"of the class that was generated, {error.message}; nothing was written",
                hint=f"its steps may name the size of the batch: fixed shapes may help, {sizes}",
            ) from error

    return run


def _held(job: ExportJob, target: Path) -> dict[str, torch.Tensor]:
    if job.request.to != "safetensors":
        found: dict[str, torch.Tensor] = torch.load(target, weights_only=True)
        return found
    model = open_model(target)
    return {tensor.name: to_torch(model.read(tensor)) for tensor in model.tensors}
