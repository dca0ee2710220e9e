"""SavedModels: what one serves, and one made of whatever TensorFlow runs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.exporting.job import Job
from prunectl.exporting.live import Flow
from prunectl.exporting.parity import Run
from prunectl.exporting.tf_live import TfLive, reason
from prunectl.formats.base import Array, ModelFile
from prunectl.training import trusted
from prunectl.training.keras.library import keras_two, quietly
from prunectl.training.keras.loading import first_line
from prunectl.training.network import Origin

_tf = keras_two().tensorflow
DEFAULT = "serving_default"
fingerprint_pb2 = importlib.import_module("tensorflow.core.protobuf.fingerprint_pb2")


def open_live(model: ModelFile, origin: Origin) -> TfLive:
    """Return what a SavedModel serves."""
    # It is run as it is, whatever builds the model.
    trusted.check(model, replace(origin, model=""))
    return _served(model.path)


def _served(path: Path) -> TfLive:
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
    inputs = tuple(Flow(name, _axes(spec), spec.dtype.name) for name, spec in specs.items())

    def call(given: Sequence[Any]) -> list[Any]:
        found = function(**dict(zip(specs, given, strict=True)))
        return [found[name] for name in answers]

    notes = () if len(names) == 1 else (f"Of its signatures ({', '.join(names)}) it is {chosen}.",)
    return TfLive(inputs, answers, call, call, root, notes=notes)


def _axes(spec: Any) -> tuple[int | None, ...] | None:
    return None if spec.shape.rank is None else tuple(None if one is None else int(one) for one in spec.shape)


def write(job: Job, target: Path) -> tuple[str, ...]:
    """Write a SavedModel that serves what the model answers."""
    save(job, target)
    return ()


def save(job: Job, target: Path) -> None:
    """Write a SavedModel with one signature, its inputs and outputs named as in the source."""
    live: TfLive = job.live

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


def runner(job: Job, target: Path) -> Run:
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
