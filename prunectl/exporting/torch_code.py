"""A state dict and a generated Python class, which loads the weights and needs only torch.

With --sparse, weights of linear layers are stored without their zeros (CSR) where that is measured to be faster.
"""

from __future__ import annotations

import io
import types
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from prunectl.analysis.timing import Verdict, measure
from prunectl.channels.lengths import shape_text
from prunectl.channels.torch.checkpoint import class_of, companion_file
from prunectl.channels.torch.code.expressions import literal
from prunectl.channels.torch.code.module import GeneratedModule, LinearLayer, Replace, ReplacedLayers, generate_module
from prunectl.channels.torch.export import trace_model
from prunectl.channels.torch.fx import WeightedProgram
from prunectl.errors import InputError, UsageError, WorkError
from prunectl.exporting.compare import Run
from prunectl.exporting.job import ExportJob, InputSpec
from prunectl.exporting.request import BATCH_SIZE
from prunectl.exporting.torch import run_module
from prunectl.exporting.weights import cast_down, save_arrays
from prunectl.formats.base import Array, Family, ModelFile
from prunectl.formats.registry import open_model
from prunectl.training.quiet import quiet_conversion
from prunectl.training.torch.layer_inputs import without_mha_fastpath
from prunectl.training.torch.tensors import to_numpy, to_torch

_INPUT_DTYPES = frozenset({"float16", "float32", "float64", "uint8", "int32", "int64", "bool"})


def companion_files(target: Path) -> tuple[Path, ...]:
    """The path of the generated class for a file of weights."""
    return (companion_file(target),)


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write the weights and the class generated for them."""
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
    """Generate the class; with --sparse, it has sparse layers in place of dense ones that are measured as slower."""
    replace_layers: Replace | None = None
    if job.request.sparse:
        size = job.request.batch_size or BATCH_SIZE
        replace_layers = partial(_sparse_layers, file=job.file, batch_size=size, notes=notes)
    try:
        with without_mha_fastpath(), quiet_conversion():
            traced = trace_model(job.file, _origin(job))
            if traced.program is not None:
                # An exported program has no other original than the module of its graph.
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
    """An input as `SHAPE:TYPE`, with the lengths of a sample for open axes, and 1 for an open batch axis."""
    if spec.dtype not in _INPUT_DTYPES:
        raise UsageError(f"--code cannot be used: the input {spec.name} has the unsupported type {spec.dtype}")
    size = 1 if spec.shape is None or spec.shape[:1] == (None,) else len(example)
    return f"{','.join(map(str, (size, *example.shape[1:])))}:{spec.dtype}"


def _note_fixed_lengths(job: ExportJob) -> tuple[str, ...]:
    """A note about open axes: tracing may have fixed them to the lengths of the sample."""
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


LEAST_SPEEDUP = 1.2
_SECONDS = 2.0
"""Time limit of the measurement of each layer."""
_FEW_ZEROS = 0.5
"""Below this share of zeros no sparse kernel is faster, and none is measured."""
_CODE = '''
class SparseLinear(nn.Module):
    """A linear layer whose weight is stored by rows, without its zeros (CSR)."""

    def __init__(self, inputs: int, outputs: int, nonzeros: int, bias: bool = True) -> None:
        super().__init__()
        self.shape = (outputs, inputs)
        self.register_buffer("rows", torch.zeros(outputs + 1, dtype=torch.int32))
        self.register_buffer("columns", torch.zeros(nonzeros, dtype=torch.int32))
        self.values = nn.Parameter(torch.zeros(nonzeros))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.checked = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns once that CSR tensors are in beta
            torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), check_invariants=True)

    def weight(self) -> torch.Tensor:
        """The weight; PyTorch checks its indices when they have changed: a wrong one could read any memory."""
        parts = (self.rows, self.columns)
        state = [(part.data_ptr(), part._version) for part in parts]
        weight = torch.sparse_csr_tensor(*parts, self.values, self.shape, check_invariants=state != self.checked)
        self.checked = state
        return weight

    def forward(self, x: torch.Tensor):
        weight = self.weight()
        flat = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu" and not torch.backends.mkl.is_available():
            y = flat @ weight.to_dense().t()  # this PyTorch has no kernels for CSR tensors
        else:
            y = torch.sparse.mm(weight, flat.t()).t()
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.shape[0])
'''
"""Code of the sparse layer, written into the file of the generated class."""


def _sparse_layers(
    layers: Sequence[LinearLayer], *, file: ModelFile, batch_size: int, notes: list[str]
) -> ReplacedLayers:
    """Replace linear layers by sparse ones where these are faster on this processor, and note the speedups.

    A speedup is the ratio of the times of one layer for random inputs, in batches of `batch_size`.
    """
    faster: dict[str, str] = {}
    slower: dict[str, str] = {}
    chosen = []
    for layer in layers:
        if not layer.weight.numel():
            continue
        zeros = 1 - float(torch.count_nonzero(layer.weight)) / layer.weight.numel()
        if zeros < _FEW_ZEROS:
            slower[layer.path] = f"{100 * zeros:.0f} % zeros"
            continue
        speedup, is_faster = _speedup(layer, layer.rows * batch_size)
        (faster if is_faster else slower)[layer.path] = f"{speedup:.2f} times as fast"
        if is_faster:
            chosen.append(layer)
    if not chosen:
        why = f": {_layer_list(slower)}" if slower else ", as it has no linear layers with weights of their own"
        raise WorkError(
            f"no layer of {file.path} is {LEAST_SPEEDUP:g} times as fast without its zeros{why}; nothing was written",
            hint="leave out --sparse; more zeros or a larger --batch-size may change that",
        )
    on = f"in batches of {batch_size}, on one thread of this processor"
    notes.append(f"Stored without zeros, since measured as faster {on}: {_layer_list(faster)}.")
    if slower:
        notes.append(f"Left dense: {_layer_list(slower)}.")
    return ReplacedLayers(
        {layer.path: _constructor(layer) for layer in chosen},
        {layer.path: _state(layer) for layer in chosen},
        _CODE,
        ("import warnings",),
    )


def _layer_list(layers: dict[str, str]) -> str:
    return ", ".join(f"{path} ({what})" for path, what in layers.items())


def _constructor(layer: LinearLayer) -> str:
    outputs, inputs = layer.weight.shape
    options = "" if layer.has_bias else ", bias=False"
    return f"SparseLinear({literal(inputs)}, {literal(outputs)}, {int(torch.count_nonzero(layer.weight))}{options})"


def _state(layer: LinearLayer) -> dict[str, torch.Tensor]:
    compressed = layer.weight.detach().to_sparse_csr()
    return {
        "rows": compressed.crow_indices().to(torch.int32),
        "columns": compressed.col_indices().to(torch.int32),
        "values": compressed.values(),
    }


def _speedup(layer: LinearLayer, rows: int) -> tuple[float, bool]:
    """Speedup of the sparse layer for inputs of `rows` rows, and whether it reaches LEAST_SPEEDUP with confidence."""
    names: dict[str, object] = {}
    exec(compile(f"import torch, warnings\nfrom torch import nn\n{_CODE}", "<written>", "exec"), names)  # noqa: S102 - it is our own text
    sparse = eval(_constructor(layer), names)  # noqa: S307 - it is our own text
    bias = torch.zeros(layer.weight.shape[0]) if layer.has_bias else None
    sparse.load_state_dict({**_state(layer), **({} if bias is None else {"bias": bias})})
    x = torch.randn(rows, layer.weight.shape[1], generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    # Several threads wait for each other, so that other load on the machine would be measured as well.
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            dense = partial(functional.linear, x, layer.weight.detach(), bias)
            _, latency = measure([dense, partial(sparse, x)], seconds=_SECONDS)
    finally:
        torch.set_num_threads(threads)
    is_faster = latency.verdict is Verdict.FASTER and latency.speedup.low >= LEAST_SPEEDUP
    return latency.speedup.middle, is_faster
