"""Entry point of the child process in which Keras 2 rebuilds a SavedModel without its pruning wrappers."""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, PrunectlError
from prunectl.formats.safe_json import require

EXTRA = "tensorflow"
_TFMOT = "tensorflow_model_optimization"
MODULES = ("tensorflow", "tf_keras", _TFMOT)
_SERVING = "serving_default"


def main() -> None:
    """Read a request from standard input, rebuild the model, and report the outcome on standard output."""
    channel = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (request["memory_bytes"],) * 2)
    response = {"kind": "done"}
    try:
        _rebuild(request["config"], Path(request["source"]), Path(request["target"]))
    except PrunectlError as error:
        response = {"kind": error.kind, "message": error.message, "hint": error.hint}
    except Exception as error:  # noqa: BLE001 - TensorFlow raises errors of any type on a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        response = {"kind": "input", "message": f"Keras cannot rebuild it: {reason}", "hint": ""}
    os.write(channel, json.dumps(response).encode())
    # Exit without waiting for TensorFlow's idle threads, which take a while to end.
    os._exit(0)


def load_tfmot() -> Any:
    """Import tfmot without Keras 3: it tries to import `keras` for a module of Keras 2, and works without it."""
    # tf_keras must be imported before this, because TensorFlow looks for the folder of Keras 3.
    is_free = "keras" not in sys.modules
    if is_free:
        sys.modules["keras"] = None  # type: ignore[assignment]  # None makes the import fail
    try:
        return require(_TFMOT, extra=EXTRA)
    finally:
        if is_free:
            sys.modules.pop("keras")


def _rebuild(config: Mapping[str, Any], source: Path, target: Path) -> None:
    # Imports create hardly any garbage, and collecting it takes a sixth of their time.
    gc.disable()
    tensorflow, keras = require("tensorflow", extra=EXTRA), require("tf_keras", extra=EXTRA)
    toolkit = load_tfmot()
    gc.freeze()
    gc.enable()
    with toolkit.sparsity.keras.prune_scope():
        model = keras.models.model_from_config(_plain(config))
    if not model.built:
        raise InputError("it does not give the shape of its input", hint="build the model, and save it again")
    model.load_weights(str(source)).assert_existing_objects_matched()
    for layer in model.submodules:
        for weight, mask, _ in getattr(layer, "pruning_vars", ()):
            values, kept = weight.numpy(), mask.numpy()
            weight.assign(np.where(kept != 0, values * kept, np.zeros((), values.dtype)))
    stripped = toolkit.sparsity.keras.strip_pruning(model)
    pruned = [layer.name for layer in stripped.submodules if hasattr(layer, "pruning_vars")]
    if pruned:
        raise InputError(f"the pruned layer {pruned[0]} is inside another wrapper, from which tfmot does not remove it")
    signature = _signature(tensorflow, model, stripped, source)
    stripped.save(str(target), save_format="tf", include_optimizer=False, signatures=signature)


def _signature(tensorflow: Any, model: Any, stripped: Any, source: Path) -> Any:
    """A serving function of the stripped model, with the original names of inputs and outputs."""
    messages = require("tensorflow.core.protobuf.saved_model_pb2", extra=EXTRA)
    signatures = messages.SavedModel.FromString((source / "saved_model.pb").read_bytes()).meta_graphs[0].signature_def
    if _SERVING not in signatures:
        return None
    inputs, outputs = signatures[_SERVING].inputs, signatures[_SERVING].outputs
    if set(inputs) != set(model.input_names) or set(outputs) != set(model.output_names):
        raise InputError(
            "its serving_default was not written by Keras: its names are not those of the model's inputs "
            f"and outputs ({', '.join([*sorted(inputs), *sorted(outputs)])})"
        )
    specs = [
        tensorflow.TensorSpec(tensor.shape, tensor.dtype, name)
        for name, tensor in zip(model.input_names, model.inputs, strict=True)
    ]

    def serve(*tensors: Any) -> dict[str, Any]:
        result = stripped(tensors[0] if len(tensors) == 1 else list(tensors), training=False)
        return dict(zip(model.output_names, tensorflow.nest.flatten(result), strict=True))

    return {_SERVING: tensorflow.function(serve, input_signature=specs)}


def _plain(value: Any) -> Any:
    """A configuration in which the tuples that Keras encodes for JSON are decoded."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("class_name") in {"__tuple__", "TensorShape"} and isinstance(value.get("items"), list):
        return tuple(_plain(item) for item in value["items"])
    return {key: _plain(item) for key, item in value.items()}


if __name__ == "__main__":
    main()
