"""A state dict with a generated class beside it, which loads the weights and needs only torch."""

from __future__ import annotations

import io
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prunectl.channels.lengths import shape_text
from prunectl.channels.torch.checkpoint import class_of, companion_file
from prunectl.channels.torch.code.expressions import literal
from prunectl.channels.torch.code.module import GeneratedModule, Replace, generate_module
from prunectl.channels.torch.export import trace_model
from prunectl.channels.torch.fx import WeightedProgram
from prunectl.errors import InputError, UsageError, WorkError
from prunectl.exporting.compare import Run
from prunectl.exporting.job import ExportJob, InputSpec
from prunectl.exporting.request import BATCH_SIZE
from prunectl.exporting.torch import run_module, without_mha_fastpath
from prunectl.exporting.torch_sparse import replace_layers as sparse_layers
from prunectl.exporting.weights import cast_down, save_arrays
from prunectl.formats.base import Array, Family
from prunectl.formats.registry import open_model
from prunectl.training.quiet import quiet_conversion
from prunectl.training.torch.tensors import to_numpy, to_torch

_SHORT_DTYPES = {
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
    "uint8": "u8",
    "int32": "i32",
    "int64": "i64",
    "bool": "bool",
}


def companion_files(target: Path) -> tuple[Path, ...]:
    """The path of the class for a file of weights."""
    return (companion_file(target),)


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write weights, and the class generated for them."""
    notes: list[str] = []
    code = _generate(job, _loading_lines(job.request.to, target.name), notes)
    arrays = {
        name: cast_down(job.request, name, to_numpy(value)) for name, value in _state_in_file_types(job, code).items()
    }
    if job.request.to == "safetensors":
        save_arrays(list(arrays.items()), {"format": "pt", **dict(job.request.metadata)}, target)
    else:
        buffer = io.BytesIO()
        torch.save(_tied_state(arrays, code), buffer)
        target.write_bytes(buffer.getvalue())
    companion_file(target).write_text(code.text, encoding="utf-8")
    return (
        f"The class {code.name} in {companion_file(target).name} loads the weights and needs only torch.",
        *notes,
        *_note_fixed_lengths(job),
    )


def _generate(job: ExportJob, loading: tuple[str, ...], notes: list[str]) -> GeneratedModule:
    """The class; where zeros are to be left out, layers without them are in it that were measured as faster."""
    replace_layers: Replace | None = None
    if job.request.sparse:
        size = job.request.batch_size or BATCH_SIZE
        replace_layers = partial(sparse_layers, file=job.file, batch_size=size, notes=notes)
    try:
        with without_mha_fastpath(), quiet_conversion():
            traced = trace_model(job.file, _origin(job))
            if traced.program is not None:
                # Of a program the module is all that there is of an original.
                traced = replace(traced, original=traced.program.module())
            return generate_module(traced, WeightedProgram(traced.module), class_of(traced), loading, replace_layers)
    except (WorkError, InputError) as error:
        if job.request.sparse and error.message.endswith("nothing was written"):
            raise
        raise WorkError(f"no code can be generated for {job.file.path}: {error.message}", hint=error.hint) from error


def _origin(job: ExportJob) -> Any:
    origin = job.request.origin
    if job.file.family is Family.TORCH_PROGRAM and not origin.model:
        return origin
    return replace(origin, inputs=tuple(map(_input_text, job.inputs, job.samples.batches[0])))


def _input_text(spec: InputSpec, example: Array) -> str:
    """An input as `SHAPE:TYPE` of a sample: open axes get the length of the sample."""
    if spec.dtype not in _SHORT_DTYPES:
        raise UsageError(f"--code cannot be used: the input {spec.name} has the unsupported type {spec.dtype}")
    size = 1 if spec.shape is None or spec.shape[:1] == (None,) else len(example)
    return f"{','.join(map(str, (size, *example.shape[1:])))}:{_SHORT_DTYPES[spec.dtype]}"


def _note_fixed_lengths(job: ExportJob) -> tuple[str, ...]:
    """A note about open axes: tracing may have burnt in the length of the sample."""
    tried = [
        f"{spec.name}:{shape_text((None, *example.shape[1:]))}"
        for spec, example in zip(job.inputs, job.samples.batches[0], strict=True)
        if spec.shape is not None and None in spec.shape[1:]
    ]
    return (f"The class was verified only with inputs of {' and '.join(tried)}.",) if tried else ()


def _state_in_file_types(job: ExportJob, code: GeneratedModule) -> dict[str, torch.Tensor]:
    """The weights in the dtype of the file: 16-bit models are traced in float32."""
    kinds = {tensor.dtype.name for tensor in job.file.tensors if tensor.is_float}
    if kinds in ({"float16"}, {"bfloat16"}):
        kind = getattr(torch, kinds.pop())
        return {name: value.to(kind) if value.is_floating_point() else value for name, value in code.state.items()}
    return dict(code.state)


def _tied_state(arrays: dict[str, Array], code: GeneratedModule) -> dict[str, torch.Tensor]:
    shared: dict[tuple[Any, ...], torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, array in arrays.items():
        tensor = code.state[name]
        view = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        shared.setdefault(view if tensor.numel() else (name,), to_torch(array))
        tensors[name] = shared[view if tensor.numel() else (name,)]
    return tensors


def _loading_lines(to: str, name: str) -> tuple[str, ...]:
    if to == "safetensors":
        return (f"model.load_state_dict(safetensors.torch.load_file({literal(name)}))",)
    return (f"model.load_state_dict(torch.load({literal(name)}, weights_only=True))",)


def runner(job: ExportJob, target: Path) -> Run:
    """A function that runs the written class with the written weights."""
    module_namespace = types.ModuleType("written")
    path = companion_file(target)
    exec(compile(path.read_text("utf-8"), path.name, "exec"), module_namespace.__dict__)  # noqa: S102 - it is our own text
    classes = [
        cls
        for cls in vars(module_namespace).values()
        if isinstance(cls, type) and cls.__module__ == module_namespace.__name__
    ]
    module = classes[0]().eval()
    module.load_state_dict(_read_state(job, target), strict=True)

    def run(inputs: tuple[Array, ...]) -> dict[str, Array]:
        try:
            return run_module(module, inputs)
        except UsageError as error:
            sizes = " ".join(f"--input {spec.name}:{len(inputs[0])},..." for spec in job.inputs)
            raise WorkError(
                f"the generated class is wrong: {error.message}; nothing was written",
                hint=f"its code may contain the batch size: try fixed shapes, {sizes}",
            ) from error

    return run


def _read_state(job: ExportJob, target: Path) -> dict[str, torch.Tensor]:
    if job.request.to != "safetensors":
        state: dict[str, torch.Tensor] = torch.load(target, weights_only=True)
        return state
    model = open_model(target)
    return {tensor.name: to_torch(model.read(tensor)) for tensor in model.tensors}
