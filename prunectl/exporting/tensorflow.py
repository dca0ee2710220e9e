"""SavedModels: the signature of one as a source, and writing one from any TensorFlow function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.exporting.compare import Run
from prunectl.exporting.job import ExportJob, InputSpec
from prunectl.formats.base import Array, ModelFile
from prunectl.training import user_code
from prunectl.training.backend import LoadOptions
from prunectl.training.keras.backend import load_keras2
from prunectl.training.keras.load import error_line
from prunectl.training.quiet import ignore_warnings


@dataclass(frozen=True, slots=True)
class TfRunnable:
    """A model that TensorFlow runs."""

    inputs: tuple[InputSpec, ...]
    output_names: tuple[str, ...]
    """In the order of the outputs."""
    call: Callable[[Sequence[Any]], list[Any]]
    """The forward pass, from tensors to tensors."""
    graph: Callable[[Sequence[Any]], list[Any]]
    """The same as a `tf.function`: some layers run only in a graph."""
    holder: Any
    """The object that owns the variables."""
    is_channels_first: bool = False
    notes: tuple[str, ...] = ()
    keras: Any = field(default=None)
    """The loaded Keras model, where it is one."""

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """The outputs for one batch."""
        tensors = [_tf.constant(array, spec.dtype or None) for array, spec in zip(inputs, self.inputs, strict=True)]
        try:
            with ignore_warnings():
                outputs = self.graph(tensors)
        except Exception as error:
            shapes = ", ".join("x".join(map(str, array.shape)) for array in inputs)
            raise UsageError(
                f"the model does not take inputs of {shapes}: {reason(error)}",
                hint="--data SPEC shows what it takes, or --input x:1,224,224,3:f32 says it",
            ) from error
        return {name: tensor.numpy() for name, tensor in zip(self.output_names, outputs, strict=True)}

    def specs(self, inputs: tuple[InputSpec, ...]) -> list[Any]:
        """The inputs as `tf.TensorSpec`."""
        return [_tf.TensorSpec(spec.shape, spec.dtype or "float32", name=spec.name) for spec in inputs]


_TRACE_PREFIXES = ("Graph execution error", "Detected at", "<stack", "[[", "File ", "Traceback")


def reason(error: Exception) -> str:
    """The line of an error that names the cause, after those of TensorFlow's graph traceback."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.startswith(_TRACE_PREFIXES)]
    return reasons[0][:300].rstrip(".:") if reasons and lines[0].startswith(_TRACE_PREFIXES) else error_line(error)


_tf = load_keras2().tensorflow
DEFAULT = "serving_default"
fingerprint_pb2 = importlib.import_module("tensorflow.core.protobuf.fingerprint_pb2")


def open_runnable(model: ModelFile, origin: LoadOptions) -> TfRunnable:
    """Load the serving signature of a SavedModel."""
    # It is run as it is, whatever builds the model.
    user_code.check(model, replace(origin, model=""))
    return _load_signature(model.path)


def _load_signature(path: Path) -> TfRunnable:
    try:
        with ignore_warnings():
            root = _tf.saved_model.load(str(path))
    except Exception as error:
        raise InputError(f"{path} cannot be loaded by this TensorFlow: {error_line(error)}") from error
    names = list(root.signatures)
    if not names:
        raise InputError(
            f"{path} serves nothing: it has variables, and no function that says how they are used",
            hint="save it with signatures=",
        )
    signature = DEFAULT if DEFAULT in names else names[0]
    function = root.signatures[signature]
    # By their names: a signature knows no other order.
    specs = dict(sorted(function.structured_input_signature[1].items()))
    output_names = tuple(sorted(function.structured_outputs))
    inputs = tuple(InputSpec(name, _axes(spec), spec.dtype.name) for name, spec in specs.items())

    def call(arguments: Sequence[Any]) -> list[Any]:
        outputs = function(**dict(zip(specs, arguments, strict=True)))
        return [outputs[name] for name in output_names]

    notes = () if len(names) == 1 else (f"Of its signatures ({', '.join(names)}) it is {signature}.",)
    return TfRunnable(inputs, output_names, call, call, root, notes=notes)


def _axes(spec: Any) -> tuple[int | None, ...] | None:
    return None if spec.shape.rank is None else tuple(None if size is None else int(size) for size in spec.shape)


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write a SavedModel; no notes."""
    save(job, target)
    return ()


def save(job: ExportJob, target: Path) -> None:
    """Write a SavedModel with one signature, its inputs and outputs named as in the source."""
    runnable: TfRunnable = job.runnable

    def serve(*arguments: Any) -> dict[str, Any]:
        return dict(zip(runnable.output_names, runnable.call(arguments), strict=True))

    module = _tf.Module()
    # Every variable is held once, under the module alone.
    module.held = list(_variables(runnable.holder))
    module.kept = runnable.holder if not module.held else None
    module.serve = _tf.function(serve, input_signature=runnable.specs(job.inputs))
    try:
        with ignore_warnings():
            _tf.saved_model.save(module, str(target), signatures={DEFAULT: module.serve})
    except Exception as error:
        raise WorkError(f"TensorFlow cannot save {job.file.path}: {error_line(error)}") from error
    _clear_random_id(target / "fingerprint.pb")


def _clear_random_id(path: Path) -> None:
    """Clear the random uuid of the fingerprint, so that equal exports are equal bytes."""
    fingerprint = fingerprint_pb2.FingerprintDef.FromString(path.read_bytes())
    fingerprint.ClearField("uuid")
    path.write_bytes(fingerprint.SerializeToString(deterministic=True))


def _variables(holder: Any) -> list[Any]:
    variables = getattr(holder, "variables", ())
    return [
        getattr(variable, "value", variable) if not isinstance(variable, _tf.Variable) else variable
        for variable in variables
    ]


def runner(job: ExportJob, target: Path) -> Run:
    """A function that runs the result, loaded from its folder."""
    runnable = _load_signature(target)

    def run(inputs: tuple[Array, ...]) -> dict[str, Array]:
        try:
            return runnable.run(inputs)
        except UsageError as error:
            cause = reason(error.__cause__) if isinstance(error.__cause__, Exception) else error.message
            raise WorkError(
                f"TensorFlow cannot run the SavedModel that it made of {job.file.path}: {cause}; nothing was written"
            ) from error

    return run
