"""Entry point of the process in which Keras 2 rebuilds a SavedModel without its pruning wrappers."""

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
    """Do what standard input asks for, and say on standard output what went wrong."""
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
    except Exception as error:  # noqa: BLE001 - TensorFlow raises what it likes on a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        response = {"kind": "input", "message": f"Keras cannot rebuild it: {reason}", "hint": ""}
    os.write(channel, json.dumps(response).encode())
    # TensorFlow's threads have nothing left to do, and take their time to end.
    os._exit(0)


def load_tfmot() -> Any:
    """The toolkit, without Keras 3: it asks for a module of Keras 2 under that name, and goes on without it."""
    # Its own Keras is to be loaded before: TensorFlow looks for the folder of Keras 3.
    is_free = "keras" not in sys.modules
    if is_free:
        sys.modules["keras"] = None  # type: ignore[assignment]  # which is how Python says that it cannot be imported
    try:
        return require(_TFMOT, extra=EXTRA)
    finally:
        if is_free:
            sys.modules.pop("keras")


def _rebuild(config: Mapping[str, Any], source: Path, target: Path) -> None:
    # Imports make no garbage to speak of, and to look for it takes a sixth of their time.
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
    left = [layer.name for layer in stripped.submodules if hasattr(layer, "pruning_vars")]
    if left:
        raise InputError(f"the pruned layer {left[0]} is inside another wrapper, from which tfmot does not remove it")
    signature = _signature(tensorflow, model, stripped, source)
    stripped.save(str(target), save_format="tf", include_optimizer=False, signatures=signature)


def _signature(tensorflow: Any, model: Any, stripped: Any, source: Path) -> Any:
    """A function that serves the stripped model under the names of inputs and outputs that it had."""
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
    """A configuration with tuples where JSON has words for them."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("class_name") in {"__tuple__", "TensorShape"} and isinstance(value.get("items"), list):
        return tuple(_plain(item) for item in value["items"])
    return {key: _plain(item) for key, item in value.items()}


if __name__ == "__main__":
    main()
