"""SavedModels: what one serves, and one made of whatever TensorFlow runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.exporting.compare import Run
from prunectl.exporting.inputs import InputSpec
from prunectl.exporting.job import ExportJob
from prunectl.formats.base import Array, ModelFile
from prunectl.training import user_code
from prunectl.training.backend import ModelOrigin
from prunectl.training.keras.backend import keras_two, quietly
from prunectl.training.keras.load import first_line


@dataclass(frozen=True, slots=True)
class TfRunnable:
    """A model as TensorFlow runs it."""

    inputs: tuple[InputSpec, ...]
    answers: tuple[str, ...]
    """Names of the outputs, in their order."""
    call: Callable[[Sequence[Any]], list[Any]]
    """From tensors to tensors."""
    graph: Callable[[Sequence[Any]], list[Any]]
    """The same, traced: some layers run in no other way."""
    holder: Any
    """What holds the variables."""
    is_channels_first: bool = False
    notes: tuple[str, ...] = ()
    keras: Any = field(default=None)
    """The loaded Keras model, where it is one."""

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """Return what comes out."""
        given = [_tf.constant(one, flow.dtype or None) for one, flow in zip(inputs, self.inputs, strict=True)]
        try:
            with quietly():
                found = self.graph(given)
        except Exception as error:
            shapes = ", ".join("x".join(map(str, one.shape)) for one in inputs)
            raise UsageError(
                f"the model does not take inputs of {shapes}: {reason(error)}",
                hint="--data SPEC shows what it takes, or --input x:1,224,224,3:f32 says it",
            ) from error
        return {name: one.numpy() for name, one in zip(self.answers, found, strict=True)}

    def specs(self, flows: tuple[InputSpec, ...]) -> list[Any]:
        """Return what goes in, as TensorFlow says it."""
        return [_tf.TensorSpec(flow.shape, flow.dtype or "float32", name=flow.name) for flow in flows]


_WHERE = ("Graph execution error", "Detected at", "<stack", "[[", "File ", "Traceback")


def reason(error: Exception) -> str:
    """Return the line in which TensorFlow comes to the point, behind those that say where it was."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(_WHERE)]
    return told[0][:300].rstrip(".:") if told and lines[0].startswith(_WHERE) else first_line(error)


_tf = keras_two().tensorflow
DEFAULT = "serving_default"
fingerprint_pb2 = importlib.import_module("tensorflow.core.protobuf.fingerprint_pb2")


def open_live(model: ModelFile, origin: ModelOrigin) -> TfRunnable:
    """Return what a SavedModel serves."""
    # It is run as it is, whatever builds the model.
    user_code.check(model, replace(origin, model=""))
    return _served(model.path)


def _served(path: Path) -> TfRunnable:
    try:
        with quietly():
            root = _tf.saved_model.load(str(path))
    except Exception as error:
        raise InputError(f"{path} cannot be loaded by this TensorFlow: {first_line(error)}") from error
    names = list(root.signatures)
    if not names:
        raise InputError(
            f"{path} serves nothing: it has variables, and no function that says how they are used",
            hint="save it with signatures=",
        )
    chosen = DEFAULT if DEFAULT in names else names[0]
    function = root.signatures[chosen]
    # By their names: a signature knows no other order.
    specs = dict(sorted(function.structured_input_signature[1].items()))
    answers = tuple(sorted(function.structured_outputs))
    inputs = tuple(InputSpec(name, _axes(spec), spec.dtype.name) for name, spec in specs.items())

    def call(given: Sequence[Any]) -> list[Any]:
        found = function(**dict(zip(specs, given, strict=True)))
        return [found[name] for name in answers]

    notes = () if len(names) == 1 else (f"Of its signatures ({', '.join(names)}) it is {chosen}.",)
    return TfRunnable(inputs, answers, call, call, root, notes=notes)


def _axes(spec: Any) -> tuple[int | None, ...] | None:
    return None if spec.shape.rank is None else tuple(None if one is None else int(one) for one in spec.shape)


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write a SavedModel that serves what the model answers."""
    save(job, target)
    return ()


def save(job: ExportJob, target: Path) -> None:
    """Write a SavedModel with one signature, its inputs and outputs named as in the source."""
    live: TfRunnable = job.live

    def serve(*given: Any) -> dict[str, Any]:
        return dict(zip(live.answers, live.call(given), strict=True))

    module = _tf.Module()
    # Every variable is held once, under the module alone.
    module.held = list(_variables(live.holder))
    module.kept = live.holder if not module.held else None
    module.serve = _tf.function(serve, input_signature=live.specs(job.flows))
    try:
        with quietly():
            _tf.saved_model.save(module, str(target), signatures={DEFAULT: module.serve})
    except Exception as error:
        raise WorkError(f"TensorFlow cannot save {job.file.path}: {first_line(error)}") from error
    _forget_chance(target / "fingerprint.pb")


def _forget_chance(place: Path) -> None:
    """Leave the random number out of the fingerprint; what is left is hashes of what was written."""
    found = fingerprint_pb2.FingerprintDef.FromString(place.read_bytes())
    found.ClearField("uuid")
    place.write_bytes(found.SerializeToString(deterministic=True))


def _variables(holder: Any) -> list[Any]:
    found = getattr(holder, "variables", ())
    return [getattr(one, "value", one) if not isinstance(one, _tf.Variable) else one for one in found]


def runner(job: ExportJob, target: Path) -> Run:
    """Return what runs the result, loaded from its folder."""
    live = _served(target)

    def run(inputs: tuple[Array, ...]) -> dict[str, Array]:
        try:
            return live.run(inputs)
        except UsageError as error:
            why = reason(error.__cause__) if isinstance(error.__cause__, Exception) else error.message
            raise WorkError(
                f"TensorFlow cannot run the SavedModel that it made of {job.file.path}: {why}; nothing was written"
            ) from error

    return run
