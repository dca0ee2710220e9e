"""PyTorch models as sources, and targets that PyTorch writes: program, TorchScript (also int8), state dict, ONNX."""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prunectl.analysis.timing import Timed
from prunectl.errors import InputError, UsageError, WorkError, first_line
from prunectl.exporting.compare import Run
from prunectl.exporting.job import ExportJob, InputSpec, threads_of
from prunectl.exporting.onnx_finish import OPSET, finalize
from prunectl.exporting.onnx_names import BATCH, canonical_names
from prunectl.exporting.weights import check_equal, exported_arrays, exported_tensors
from prunectl.formats.base import Array, Family, ModelFile
from prunectl.onnx_graph import load_message
from prunectl.training import user_code
from prunectl.training.backend import LoadOptions
from prunectl.training.quiet import quiet_conversion
from prunectl.training.torch.build import BuiltModule, FixedBatchModule, build_module, declared_inputs, load_program
from prunectl.training.torch.folder import FolderModule
from prunectl.training.torch.layer_inputs import without_mha_fastpath
from prunectl.training.torch.tensors import InnerModule, error_line, tensor_leaves, to_numpy, to_torch


def open_runnable(model: ModelFile, origin: LoadOptions) -> TorchRunnable:
    """Build the module of a file, in eval mode."""
    if threads := threads_of(origin):
        torch.set_num_threads(threads)
    script = _frozen_script(model, origin)
    if script is not None:
        return TorchRunnable(BuiltModule(script, {}), _frozen_inputs(script))
    with quiet_conversion():
        built = build_module(model, origin)
    if built.has_modes:
        built.module.eval()
    size = built.module.size if isinstance(built.module, FixedBatchModule) else None
    inputs = tuple(
        InputSpec(
            port.name,
            None if port.shape is None else (size, *port.shape),
            port.dtype,
            is_declared=bool(built.inputs),
            usual=None if port.example is None else (size, *port.example),
        )
        for port in declared_inputs(built)
    )
    return TorchRunnable(built, inputs)


def _frozen_script(model: ModelFile, origin: LoadOptions) -> torch.nn.Module | None:
    """A frozen TorchScript, which has no parameters, in eval mode; None for any other model."""
    if origin.model or not user_code.is_script(model):
        return None
    user_code.check(model, origin)
    try:
        with quiet_conversion():
            loaded: Any = torch.jit.load(str(model.path), map_location="cpu")  # type: ignore[no-untyped-call]
            script: torch.nn.Module = loaded.eval()
    except Exception as error:
        raise InputError(f"PyTorch cannot load {model.path}: {first_line(error)}") from error
    if any(True for _ in script.parameters()):
        return None
    if not hasattr(script, "forward"):
        raise InputError(f"{model.path} is TorchScript without a forward method")
    return script


def _frozen_inputs(module: Any) -> tuple[InputSpec, ...]:
    """The inputs of a frozen script, which declares only their names."""
    arguments = module.forward.schema.arguments[1:]
    return tuple(
        InputSpec(argument.name, None, "", is_declared=False)
        for argument in arguments
        if not argument.has_default_value()
    )


@dataclass(frozen=True, slots=True)
class TorchRunnable:
    """A module in eval mode with its inputs."""

    built: BuiltModule
    inputs: tuple[InputSpec, ...]
    is_channels_first: bool = True
    notes: tuple[str, ...] = ()

    @property
    def module(self) -> torch.nn.Module:
        """The module itself."""
        module = self.built.module
        return module.inner if isinstance(module, FixedBatchModule) else module

    @property
    def runtime(self) -> str:
        """Name of the runtime for users."""
        return "TorchScript" if isinstance(self.module, torch.jit.ScriptModule) else "PyTorch"

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """The outputs for one batch."""
        return run_module(self.module, inputs)

    def prepare(self, inputs: tuple[Array, ...]) -> Timed:
        """A function that runs one batch per call."""
        tensors, module = [to_torch(array) for array in inputs], self.module

        def run() -> object:
            with torch.inference_mode():
                return module(*tensors)

        return run


def run_module(module: Any, inputs: tuple[Array, ...]) -> dict[str, Array]:
    """The outputs of a module for arrays, nested containers flattened to tensors."""
    with _naming_inputs(module, inputs):
        outputs = tensor_leaves(module(*map(to_torch, inputs)))
    return dict(zip(output_names(len(outputs)), [to_numpy(tensor) for tensor in outputs], strict=True))


@contextmanager
def _naming_inputs(module: Any, inputs: tuple[Array, ...]) -> Generator[None]:
    """Turn an error of a module's call into one that names the shapes of the inputs."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Warnings about deprecated calls are for the model's authors, not for the user of the file.
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        shapes = ", ".join("x".join(map(str, array.shape)) for array in inputs)
        examples = [f"x:{'1,128:i64' if array.dtype.kind == 'i' else '1,3,224,224:f32'}" for array in inputs]
        names = [f"{name}:SHAPE" for name in module.names] if isinstance(module, FolderModule) else examples[:1]
        raise UsageError(
            f"the model does not accept inputs of {shapes}: {error_line(error)}",
            hint=f"give the shape with {' '.join(f'--input {name}' for name in names)}, or add --data SPEC",
        ) from error


def output_names(count: int) -> list[str]:
    """Default names of outputs."""
    return ["output"] if count == 1 else [f"output{index}" for index in range(count)]


_ONNX_HINT = "--to onnx supports --int8 for more layers"
_INT8_LAYERS = "torch.ao.nn."
"""Prefix of the modules that define 8-bit layers."""


def quantize(job: ExportJob) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Post-training quantization of a copy to int8; weights are quantized symmetrically, so zeros stay zeros."""
    runnable: TorchRunnable = job.runnable
    if isinstance(runnable.module, torch.jit.ScriptModule):
        raise UsageError(
            f"PyTorch cannot quantise {job.file.path}: it has no layers that PyTorch can see",
            hint=f"export the state dict with --builder mod:fn; or {_ONNX_HINT}",
        )
    module = copy.deepcopy(runnable.module)
    try:
        # Imported by name, because PyTorch has not decided how long it keeps torch.ao.quantization.
        quantization: Any = importlib.import_module("torch.ao.quantization")
        module_int8 = (
            _quantize_static(job, quantization, module) if job.request.data else _quantize_dynamic(quantization, module)
        )
    except Exception as error:
        raise WorkError(
            f"PyTorch cannot quantise {job.file.path} to 8 bits: {first_line(error)}", hint=_ONNX_HINT
        ) from error
    count = sum(type(layer).__module__.startswith(_INT8_LAYERS) for layer in module_int8.modules())
    if not count:
        raise UsageError(
            f"{job.file.path} has no layer whose weights PyTorch can quantise to 8 bits",
            hint="convolutions need examples: add --data SPEC",
        )
    if job.request.data:
        return module_int8, (
            f"Weights and activations are 8-bit integers, calibrated on {job.samples.examples} examples.",
        )
    return module_int8, (
        "Weights of dense and recurrent layers are 8-bit integers; those of convolutions need --data.",
    )


def _quantize_dynamic(quantization: Any, module: torch.nn.Module) -> Any:
    layer_types = {torch.nn.Linear, torch.nn.LSTM, torch.nn.GRU}
    return quantization.quantize_dynamic(module, layer_types, dtype=torch.qint8, inplace=True)


def _quantize_static(job: ExportJob, quantization: Any, module: torch.nn.Module) -> Any:
    fx: Any = importlib.import_module("torch.ao.quantization.quantize_fx")
    batches = [tuple(map(to_torch, batch)) for batch in job.samples.batches]
    qconfig = quantization.get_default_qconfig_mapping(torch.backends.quantized.engine)
    prepared = fx.prepare_fx(module, qconfig, batches[0])
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    return fx.convert_fx(prepared)


def example(job: ExportJob) -> tuple[torch.Tensor, ...]:
    """Inputs to trace with."""
    return tuple(map(to_torch, job.samples.batches[0]))


def program_of(job: ExportJob) -> Any:
    """The module as an exported program, with dynamic shapes for open axes."""
    runnable: TorchRunnable = job.runnable
    dynamic = torch.export.Dim.DYNAMIC
    dynamic_shapes = tuple(
        {axis: dynamic for axis, length in enumerate(spec.shape or ()) if length is None} or None for spec in job.inputs
    )
    try:
        with quiet_conversion(), without_mha_fastpath(), torch.no_grad():
            if not isinstance(runnable.module, InnerModule):
                return torch.export.export(runnable.module, example(job), dynamic_shapes=dynamic_shapes)
            with runnable.module.plain() as module:
                # The wrapper takes all inputs as one argument.
                return torch.export.export(module, example(job), dynamic_shapes=(dynamic_shapes,))
    except Exception as error:
        raise WorkError(
            f"PyTorch cannot export {job.file.path}: {first_line(error)}", hint=_fixed_shapes_hint(job)
        ) from error


def _fixed_shapes_hint(job: ExportJob) -> str:
    """A hint with fixed shapes, for a converter that fails on open axes or an attention mask that was not requested."""
    is_asked_for = bool(job.request.input or job.request.data)
    options = " ".join(
        f"--input {spec.name}:{','.join(map(str, array.shape))}"
        for spec, array in zip(job.inputs, example(job), strict=True)
        if is_asked_for or spec.name != "attention_mask"
    )
    return f"try fixed shapes: {options}"


def is_script(runnable: TorchRunnable) -> bool:
    """Whether a module is TorchScript, which cannot become an exported program."""
    return isinstance(runnable.module, torch.jit.ScriptModule)


def check_names(job: ExportJob) -> None:
    """Refuse input names that are not those of the arguments of `forward`."""
    for spec, declared in zip(job.inputs, job.runnable.inputs, strict=True):
        if spec.name != declared.name:
            raise UsageError(f"--input {spec.name}: the name must be that of an argument of forward")


def write_program(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write an exported program."""
    if is_script(job.runnable):
        raise UsageError(
            f"PyTorch cannot convert {job.file.path}, which is TorchScript, to an exported program",
            hint="export it to ONNX, or export the state dict with --builder mod:fn",
        )
    check_names(job)
    buffer = io.BytesIO()
    program = program_of(job)
    with quiet_conversion():
        torch.export.save(program, buffer)
    target.write_bytes(buffer.getvalue())
    return ()


def write_script(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write TorchScript, traced."""
    check_names(job)
    runnable: TorchRunnable = job.runnable
    buffer = io.BytesIO()
    module, notes = runnable.module, tuple[str, ...]()
    if job.request.int8:
        with quiet_conversion():
            module, notes = quantize(job)
    try:
        # The fused fast path of nn.MultiheadAttention and encoder layers reads weights as floats.
        with quiet_conversion(), without_mha_fastpath() if job.request.int8 else nullcontext(), torch.no_grad():
            trace: Any = torch.jit.trace
            traced = module if is_script(runnable) else trace(module, example(job))
            torch.jit.save(traced, buffer)
    except Exception as error:
        raise WorkError(f"PyTorch cannot trace {job.file.path}: {first_line(error)}") from error
    target.write_bytes(buffer.getvalue())
    return (*notes, "The model was traced: control flow that depends on the data is fixed as it was for one batch.")


def run_program(job: ExportJob, target: Path) -> Run:
    """A function that runs an exported program."""
    del job
    with quiet_conversion():
        module = torch.export.load(target).module()
    return partial(run_module, module)


def run_script(job: ExportJob, target: Path) -> Run:
    """A function that runs TorchScript."""
    del job
    with quiet_conversion():
        module = torch.jit.load(str(target), map_location="cpu")  # type: ignore[no-untyped-call]
    return partial(run_module, module)


def write_state_dict(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write a state dict under the names of the file; tied tensors stay tied."""
    views = (
        (tensor.name, (tensor.storage.key, tensor.start, tensor.shape, tensor.strides), array)
        for tensor, array in exported_arrays(job)
    )
    save_state(views, target)
    loaded = torch.load(target, weights_only=True)
    check_equal(job, exported_tensors(job.file), loaded, lambda name: to_numpy(loaded[name]))
    return ()


def save_state(arrays: Iterable[tuple[str, object, Array]], target: Path) -> None:
    """Write a state dict of named arrays, each with a key of the bytes it views; equal keys share their bytes."""
    state: dict[str, torch.Tensor] = {}
    shared: dict[object, torch.Tensor] = {}
    for name, view, array in arrays:
        if view not in shared:
            shared[view] = to_torch(array)
        state[name] = shared[view]
    # Into an open file: given a path, torch.save stores the file's name inside the archive.
    with target.open("xb") as file:
        torch.save(state, file)


def write_onnx(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write an ONNX model."""
    runnable: TorchRunnable = job.runnable
    if isinstance(runnable.module, FolderModule):
        with _naming_inputs(runnable.module, job.samples.batches[0]):
            outputs = [runnable.module.output_name(example(job))]
    else:
        outputs = output_names(len(run_module(runnable.module, job.samples.batches[0])))
    is_open = any(_open_axes(spec.shape) for spec in job.inputs)
    try:
        with quiet_conversion(), without_mha_fastpath(), torch.no_grad():
            proto, notes = (_convert_script if is_script(runnable) else _convert_program)(job, outputs)
    except WorkError:
        raise
    except Exception as error:
        raise WorkError(
            f"PyTorch cannot convert {job.file.path} to ONNX: {_reason(error)}",
            hint=_fixed_shapes_hint(job) if is_open else "try another --opset, which may have the operator",
        ) from error
    inputs = [spec.name for spec in job.inputs]
    parameters = {parameter: name for name, parameter in runnable.built.names.items()}
    canonical_names(proto, job.file, inputs, outputs, parameters)
    return (*notes, *finalize(job, proto, target))


def _reason(error: Exception) -> str:
    """The message of the innermost cause: the outer errors only name the step."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)


def _convert_program(job: ExportJob, outputs: list[str]) -> tuple[Any, tuple[str, ...]]:
    del outputs
    is_program = job.file.family is Family.TORCH_PROGRAM and not job.request.origin.model
    program = load_program(job.file, job.request.origin) if is_program else program_of(job)
    exported = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=job.request.opset or OPSET)
    if exported is None:
        raise WorkError(f"PyTorch returned no ONNX model for {job.file.path}")
    return exported.model_proto, ()


def _convert_script(job: ExportJob, outputs: list[str]) -> tuple[Any, tuple[str, ...]]:
    runnable: TorchRunnable = job.runnable
    inputs = [spec.name for spec in job.inputs]
    axes = {
        spec.name: {axis: BATCH if axis == 0 else f"{spec.name}_{axis}" for axis in _open_axes(spec.shape)}
        for spec in job.inputs
    }
    if any(0 in open_axes for open_axes in axes.values()):
        axes |= {name: {0: BATCH} for name in outputs}
    path = job.scratch / "script.onnx"
    torch.onnx.export(
        runnable.module,
        example(job),
        str(path),
        dynamo=False,
        input_names=inputs,
        output_names=outputs,
        dynamic_axes=axes,
        opset_version=job.request.opset or OPSET,
    )
    note = "PyTorch's older ONNX exporter was used, because the newer one does not accept TorchScript."
    return load_message(path), (note,)


def _open_axes(shape: tuple[int | None, ...] | None) -> list[int]:
    return [axis for axis, length in enumerate(shape or ()) if length is None]
