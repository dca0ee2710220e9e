"""TensorFlow models as sources, and targets that TensorFlow writes: SavedModel, TensorFlow Lite, ONNX (tf2onnx)."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.analysis.timing import Timed
from prunectl.channels.lengths import shape_text
from prunectl.errors import UsageError, WorkError
from prunectl.exporting.compare import Run
from prunectl.exporting.job import ExportJob, InputSpec, threads_of
from prunectl.exporting.onnx_finish import OPSET, finalize
from prunectl.exporting.onnx_names import canonical_names
from prunectl.formats.base import Array, Family, ModelFile
from prunectl.formats.safe_json import require
from prunectl.formats.tflite.schema import read_lite
from prunectl.training import user_code
from prunectl.training.backend import LoadOptions
from prunectl.training.keras.backend import load_keras2
from prunectl.training.keras.load import error_line
from prunectl.training.lite import declared_shape, open_interpreter
from prunectl.training.quiet import ignore_warnings, silence
from prunectl.training.tensorflow import SIGNATURE, load_saved_model, signature_note

_tf = load_keras2().tensorflow


@dataclass(frozen=True, slots=True)
class TfRunnable:
    """A model that TensorFlow runs."""

    inputs: tuple[InputSpec, ...]
    output_names: tuple[str, ...]
    """Names in the order in which `call` returns the outputs."""
    call: Callable[[Sequence[Any]], list[Any]]
    """The forward pass, from tensors to tensors."""
    graph: Callable[[Sequence[Any]], list[Any]]
    """`call` as a `tf.function`: some layers run only in a graph."""
    holder: Any
    """The object that owns the variables."""
    is_channels_first: bool = False
    notes: tuple[str, ...] = ()
    keras: Any = field(default=None)
    """The loaded Keras model; None for other models."""
    runtime: str = "TensorFlow"

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """The outputs for one batch."""
        tensors = [_tf.constant(array, spec.dtype or None) for array, spec in zip(inputs, self.inputs, strict=True)]
        try:
            with ignore_warnings():
                outputs = self.graph(tensors)
        except Exception as error:
            shapes = ", ".join("x".join(map(str, array.shape)) for array in inputs)
            raise UsageError(
                f"the model does not accept inputs of {shapes}: {_reason(error)}",
                hint="add --data SPEC, or the shape: --input x:1,224,224,3:f32",
            ) from error
        return {name: tensor.numpy() for name, tensor in zip(self.output_names, outputs, strict=True)}

    def prepare(self, inputs: tuple[Array, ...]) -> Timed:
        """A function that runs one batch per call as a graph, without the overhead of Keras' `predict`."""
        tensors = [_tf.constant(array, spec.dtype or None) for array, spec in zip(inputs, self.inputs, strict=True)]
        return partial(self.graph, tensors)

    def specs(self, inputs: tuple[InputSpec, ...]) -> list[Any]:
        """The inputs as `tf.TensorSpec`."""
        return [_tf.TensorSpec(spec.shape, spec.dtype or "float32", name=spec.name) for spec in inputs]


_TRACE_PREFIXES = ("Graph execution error", "Detected at", "<stack", "[[", "File ", "Traceback")


def _reason(error: Exception) -> str:
    """The line of an error that names the cause, which follows TensorFlow's graph traceback."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.startswith(_TRACE_PREFIXES)]
    return reasons[0][:300].rstrip(".:") if reasons and lines[0].startswith(_TRACE_PREFIXES) else error_line(error)


_fingerprint_pb2 = importlib.import_module("tensorflow.core.protobuf.fingerprint_pb2")


def open_runnable(model: ModelFile, origin: LoadOptions) -> TfRunnable:
    """Load the serving signature of a SavedModel."""
    # The saved graph is run as it is: --builder is ignored.
    user_code.check(model, replace(origin, model=""))
    set_threads(threads_of(origin))
    return _load_signature(model.path)


def set_threads(threads: int) -> None:
    """Set the number of threads of TensorFlow; it can no longer change once TensorFlow has run in this process."""
    if threads:
        with suppress(RuntimeError):
            _tf.config.threading.set_intra_op_parallelism_threads(threads)
            _tf.config.threading.set_inter_op_parallelism_threads(threads)


def threads_note(threads: int) -> str:
    """A note for the user if TensorFlow runs with another number of threads; else empty."""
    current = _tf.config.threading.get_intra_op_parallelism_threads()
    if current == threads:
        return ""
    return f"TensorFlow runs with {current or 'all'} threads, not with {threads}: it was in use in this process before."


def _load_signature(path: Path) -> TfRunnable:
    root, signature = load_saved_model(path, "save it again with signatures=")
    function = root.signatures[signature]
    # Sorted by name: a signature has no order of inputs.
    specs = dict(sorted(function.structured_input_signature[1].items()))
    output_names = tuple(sorted(function.structured_outputs))
    inputs = tuple(InputSpec(name, _axes(spec), spec.dtype.name) for name, spec in specs.items())

    def call(arguments: Sequence[Any]) -> list[Any]:
        outputs = function(**dict(zip(specs, arguments, strict=True)))
        return [outputs[name] for name in output_names]

    return TfRunnable(inputs, output_names, call, call, root, notes=signature_note(path, root, signature))


def _axes(spec: Any) -> tuple[int | None, ...] | None:
    return None if spec.shape.rank is None else tuple(None if size is None else int(size) for size in spec.shape)


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write a SavedModel with one signature, its inputs and outputs named as in the source."""
    runnable: TfRunnable = job.runnable

    def serve(*arguments: Any) -> dict[str, Any]:
        return dict(zip(runnable.output_names, runnable.call(arguments), strict=True))

    module = _tf.Module()
    # The module tracks each variable directly, and the holder only if it lists no variables.
    module.held = list(_variables(runnable.holder))
    module.kept = runnable.holder if not module.held else None
    module.serve = _tf.function(serve, input_signature=runnable.specs(job.inputs))
    try:
        with ignore_warnings():
            _tf.saved_model.save(module, str(target), signatures={SIGNATURE: module.serve})
    except Exception as error:
        raise WorkError(f"TensorFlow cannot save {job.file.path}: {error_line(error)}") from error
    _clear_random_id(target / "fingerprint.pb")
    return ()


def _clear_random_id(path: Path) -> None:
    """Clear the random UUID of the fingerprint, so that equal exports have equal bytes."""
    fingerprint = _fingerprint_pb2.FingerprintDef.FromString(path.read_bytes())
    fingerprint.ClearField("uuid")
    path.write_bytes(fingerprint.SerializeToString(deterministic=True))


def _variables(holder: Any) -> list[Any]:
    variables = getattr(holder, "variables", ())
    return [
        getattr(variable, "value", variable) if not isinstance(variable, _tf.Variable) else variable
        for variable in variables
    ]


def runner(job: ExportJob, target: Path) -> Run:
    """A function that runs the result, loaded from its folder again."""
    runnable = _load_signature(target)
    order = sorted(range(len(job.inputs)), key=lambda index: job.inputs[index].name)

    def run(inputs: tuple[Array, ...]) -> dict[str, Array]:
        try:
            return runnable.run(tuple(inputs[index] for index in order))
        except UsageError as error:
            cause = _reason(error.__cause__) if isinstance(error.__cause__, Exception) else error.message
            raise WorkError(
                f"TensorFlow cannot run the SavedModel exported from {job.file.path}: {cause}; nothing was written"
            ) from error

    return run


def write_tflite(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write a TensorFlow Lite model with one signature."""
    saved_model = job.scratch / "between"
    write(job, saved_model)
    converter = _tf.lite.TFLiteConverter.from_saved_model(str(saved_model), signature_keys=[SIGNATURE])
    # The converter fuses some loops into a single operator: convert once to see whether any loop is left.
    if job.request.int8 and job.request.data and b"While" in (saved_model / "saved_model.pb").read_bytes():
        _convert(job, converter, target)
        if _has_loop(target):
            raise WorkError(
                f"TensorFlow Lite cannot calibrate {job.file.path}: it has a loop, as of a recurrent layer",
                hint="leave out --data: --int8 alone stores large weights as 8-bit integers",
            )
    notes = _configure(converter, job)
    _convert(job, converter, target)
    return notes


def _convert(job: ExportJob, converter: Any, target: Path) -> None:
    try:
        with silence(), ignore_warnings():
            content = converter.convert()
    except Exception as error:
        raise _conversion_error(job, error) from error
    target.write_bytes(content)


def _has_loop(path: Path) -> bool:
    """Whether a model has a WHILE operator, on which the calibration of TensorFlow Lite crashes the process."""
    return any(operator.kind == "WHILE" for graph in read_lite(path).graphs for operator in graph.operators)


def _configure(converter: Any, job: ExportJob) -> tuple[str, ...]:
    request, optimize = job.request, _tf.lite.Optimize
    optimizations, notes = [], []
    if request.half or request.int8:
        optimizations.append(optimize.DEFAULT)
    if request.half:
        converter.target_spec.supported_types = [_tf.float16]
        notes.append("The weights are 16-bit floats; inputs and outputs keep their types.")
    if request.int8 and request.data:
        converter.representative_dataset = lambda: _examples(job)
        notes.append(f"Weights and activations are 8-bit integers, calibrated on {job.samples.examples} examples.")
    elif request.int8:
        notes.append("Large weights are 8-bit integers; activations are floats, because they need --data.")
    if request.sparse:
        optimizations.append(optimize.EXPERIMENTAL_SPARSITY)
    converter.optimizations = optimizations
    return tuple(notes)


def _examples(job: ExportJob) -> Iterator[dict[str, Array]]:
    names = [spec.name for spec in job.inputs]
    for batch in job.samples.batches:
        for index in range(len(batch[0])):
            yield {name: array[index : index + 1] for name, array in zip(names, batch, strict=True)}


def _conversion_error(job: ExportJob, error: Exception) -> WorkError:
    # The first line of the error is a position in the converter's own code; a later one names the missing operator.
    match = re.search(r"'(tfl?\.[\w.]+)' op ([^\n]*)", str(error))
    reason = f"{match[1]} {match[2]}" if match else error_line(error)
    is_missing = match is not None and "is neither a custom op" in match[2] and match[1] not in _WITH_FIXED_SHAPES
    is_wrong_type = match is not None and match[1].startswith("tfl.") and "must be tensor of" in match[2]
    hint = "" if is_missing or is_wrong_type else _fixed_shapes_hint(job)
    return WorkError(f"the TensorFlow Lite converter cannot convert {job.file.path}: {reason}", hint=hint)


_WITH_FIXED_SHAPES = frozenset({"tf.Roll"})
"""Operators that TensorFlow Lite lacks, but that the converter replaces by others if their shapes are fixed."""


def _fixed_shapes_hint(job: ExportJob) -> str:
    if not any(spec.shape is None or None in spec.shape for spec in job.inputs):
        return ""
    # The samples have a length for every axis.
    shapes = (shape_text((1, *array.shape[1:])) for array in job.samples.batches[0])
    fixed = " ".join(f"--input {spec.name}:{shape}" for spec, shape in zip(job.inputs, shapes, strict=True))
    if job.file.family is Family.SAVED_MODEL and job.file.about.keras is not None:
        # Its serving signature keeps the open axes that it was traced with: Keras must load the model instead.
        return f"try fixed shapes: prunectl export {job.file.path} -o m.h5, then export m.h5 with {fixed}"
    return f"try fixed shapes: {fixed}"


def run_tflite(job: ExportJob, target: Path) -> Run:
    """A function that runs the result in the interpreter."""
    runnable: TfRunnable = job.runnable
    # In a notebook, Python's warnings go to a `sys.stderr` other than the file descriptor that silence() redirects.
    with silence(), ignore_warnings():
        interpreter = _tf.lite.Interpreter(model_path=str(target), num_threads=1)
        run_signature = interpreter.get_signature_runner(SIGNATURE)

    def run(inputs: tuple[Array, ...]) -> dict[str, Array]:
        feeds = {spec.name: array.astype(spec.dtype) for spec, array in zip(job.inputs, inputs, strict=True)}
        try:
            with silence():
                outputs = run_signature(**feeds)
        except Exception as error:
            raise WorkError(
                f"TensorFlow Lite cannot run the result: {error_line(error)}; nothing was written"
            ) from error
        return {name: outputs[name] for name in runnable.output_names}

    return run


@dataclass(frozen=True, slots=True)
class LiteRunnable:
    """A TensorFlow Lite interpreter with its inputs."""

    interpreter: Any
    inputs: tuple[InputSpec, ...]
    is_channels_first: bool = False
    notes: tuple[str, ...] = ()
    runtime: str = "TensorFlow Lite"

    def prepare(self, inputs: tuple[Array, ...]) -> Timed:
        """A function that runs one batch per call."""
        details = self.interpreter.get_input_details()
        try:
            with silence():
                for detail, array in zip(details, inputs, strict=True):
                    if tuple(detail["shape"]) != array.shape:
                        self.interpreter.resize_tensor_input(detail["index"], array.shape)
                self.interpreter.allocate_tensors()
        except Exception as error:
            raise UsageError(f"TensorFlow Lite cannot run the model: {error_line(error)}") from error
        for detail, array in zip(details, inputs, strict=True):
            self.interpreter.set_tensor(detail["index"], array.astype(detail["dtype"], copy=False))
        invoke: Timed = self.interpreter.invoke
        return invoke

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """The outputs for one batch."""
        self.prepare(inputs)()
        return {
            detail["name"]: self.interpreter.get_tensor(detail["index"])
            for detail in self.interpreter.get_output_details()
        }


def open_lite(model: ModelFile, origin: LoadOptions) -> LiteRunnable:
    """Load a TensorFlow Lite model."""
    interpreter = open_interpreter(model, is_trusted=origin.is_trusted, threads=threads_of(origin) or 1)
    inputs = tuple(
        InputSpec(detail["name"], declared_shape(detail), np.dtype(detail["dtype"]).name)
        for detail in interpreter.get_input_details()
    )
    return LiteRunnable(interpreter, inputs)


def _erfc(graph: Any, node: Any, name: str, _: Any) -> None:
    """Handler for Erfc, as in GELU: erfc(x) = 1 - erf(x)."""
    dtype = graph.get_dtype(node.output[0])
    erf = graph.make_node("Erf", [node.input[0]], dtypes=[dtype], shapes=[graph.get_shape(node.output[0])])
    ones = graph.make_const(f"{name}/one", np.array(1.0, np.float32))
    node.type, node.domain = "Sub", ""
    graph.replace_inputs(node, [ones.output[0], erf.output[0]])


_HANDLERS: Mapping[str, tuple[Callable[[Any, Any, str, Any], None], list[str]]] = {"Erfc": (_erfc, [])}
"""Handlers of operators that tf2onnx lacks."""


class _Inlinable:
    """Wrapper of a function that removes XLA marks from calls in its graph, as of Keras' grouped convolutions.

    TensorFlow never inlines functions marked `_XlaMustCompile`, and tf2onnx converts no function calls. Captured
    constants are frozen into the graph as well, because tf2onnx would count them among the inputs.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._function = _tf.function(call)

    def get_concrete_function(self, *specs: Any) -> Any:
        """The concrete function for inputs of these specs; tf2onnx calls this method."""
        traced = self._function.get_concrete_function(*specs)
        is_marked = any(_XLA in function.attr for function in traced.graph.as_graph_def().library.function)
        if not is_marked and all(tensor.dtype == _tf.resource for tensor in traced.captured_inputs):
            return traced
        freeze = importlib.import_module("tensorflow.python.framework.convert_to_constants")
        frozen = freeze.convert_variables_to_constants_v2(traced, lower_control_flow=False)
        if not is_marked:
            return frozen
        graph = frozen.graph.as_graph_def()
        functions = graph.library.function
        names = {function.signature.name for function in functions}
        for marked in chain(functions, graph.node, *(function.node_def for function in functions)):
            marked.attr.pop(_XLA, None)
            for value in marked.attr.values():
                for called in (value.func, *value.list.func):
                    if called.name in names:
                        called.name += "_inlined"
        for function in functions:
            # TensorFlow has registered the old name for the marked function already.
            function.signature.name += "_inlined"
        data_inputs = (port for port in frozen.inputs if port.dtype != _tf.resource)
        ports = [[port.name for port in side] for side in (data_inputs, traced.outputs)]
        imported = _tf.compat.v1.wrap_function(lambda: _tf.import_graph_def(graph, name=""), [])
        inputs, outputs = ([imported.graph.get_tensor_by_name(name) for name in side] for side in ports)
        return imported.prune(inputs, outputs)


_XLA = "_XlaMustCompile"


def write_onnx(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write an ONNX model, its weights named as in the source where they can be matched."""
    tf2onnx = require("tf2onnx", extra="export")
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)
    runnable: TfRunnable = job.runnable

    def called(*arguments: Any) -> list[Any]:
        return runnable.call(arguments)

    try:
        with ignore_warnings():
            proto, _ = tf2onnx.convert.from_function(
                _Inlinable(called),
                input_signature=runnable.specs(job.inputs),
                opset=job.request.opset or OPSET,
                custom_op_handlers=_HANDLERS,
            )
    except Exception as error:
        raise WorkError(
            f"tf2onnx cannot convert {job.file.path}: {error_line(error)}",
            hint="try another --opset, which may have the operator",
        ) from error
    _check_operators(job, proto)
    inputs = [flow.name for flow in job.inputs]
    canonical_names(proto, job.file, inputs, runnable.output_names)
    return finalize(job, proto, target)


def _check_operators(job: ExportJob, proto: Any) -> None:
    """Refuse operators of TensorFlow that tf2onnx has left in the graph."""
    defs = require("onnx.defs", extra="onnx")
    unknown = [node for node in proto.graph.node if node.domain in {"", "ai.onnx"} and not defs.has(node.op_type)]
    if unknown:
        operators = ", ".join(dict.fromkeys(f"{node.op_type} ({node.name})" for node in unknown[:5]))
        raise WorkError(
            f"tf2onnx cannot convert operators of {job.file.path}: {operators}; nothing was written",
            hint="TensorFlow Lite may have them: -o model.tflite",
        )
