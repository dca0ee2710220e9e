"""Keras 2 or Keras 3 on one of its backends: imports, operations and variables behind one interface."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from prunectl.errors import MissingExtraError, UsageError
from prunectl.formats.base import Array
from prunectl.formats.safe_json import require
from prunectl.training.quiet import ignore_warnings, silence

_BACKEND_EXTRAS = frozenset({"tensorflow", "torch"})
_LEGACY = "TF_USE_LEGACY_KERAS"
TRAINING_BACKENDS = ("tensorflow", "torch", "jax")


@dataclass(frozen=True, slots=True)
class KerasLibrary:
    """An imported Keras."""

    keras: Any
    is_keras2: bool
    backend: str

    @property
    def is_on_tensorflow(self) -> bool:
        """Whether TensorFlow does the work."""
        return self.backend == "tensorflow"

    @property
    def tensorflow(self) -> Any:
        """TensorFlow, where it does the work."""
        return require("tensorflow", extra="tensorflow")

    @property
    def ops(self) -> Any:
        """`keras.ops`, or under Keras 2 those operations of TensorFlow by the same names."""
        return _tensorflow_ops() if self.is_keras2 else self.keras.ops

    @property
    def torch(self) -> Any:
        """PyTorch, where it does the work."""
        return require("torch", extra="torch")

    @property
    def jax(self) -> Any:
        """JAX, where it does the work."""
        try:
            return require("jax", extra="jax")
        except MissingExtraError as error:
            # Nothing but Keras 3 on its own backend asks for it, and prunectl has no extra that brings it.
            raise MissingExtraError(str(error), hint="pip install jax") from error


@cache
def _tensorflow_ops() -> SimpleNamespace:
    tf = require("tensorflow", extra="tensorflow")
    return SimpleNamespace(
        cast=tf.cast,
        convert_to_tensor=tf.convert_to_tensor,
        exp=tf.exp,
        log=tf.math.log,
        log_sigmoid=tf.math.log_sigmoid,
        log_softmax=tf.nn.log_softmax,
        maximum=tf.maximum,
        mean=tf.reduce_mean,
        sigmoid=tf.sigmoid,
        square=tf.square,
        sum=tf.reduce_sum,
        where=tf.where,
        zeros_like=tf.zeros_like,
    )


def load_keras2() -> KerasLibrary:
    """Keras 2."""
    with quiet_import():
        return KerasLibrary(require("tf_keras", extra="tensorflow"), is_keras2=True, backend="tensorflow")


def load_tfmot() -> Any:
    """What tfmot has for sparsity in Keras 2."""
    load_keras2()
    legacy = os.environ.get(_LEGACY)
    try:
        with ignore_warnings():
            module = require("tensorflow_model_optimization", extra="tensorflow")
    finally:
        # tfmot turns every Keras that is imported later, in this process and in those it starts, into Keras 2.
        if legacy is None:
            os.environ.pop(_LEGACY, None)
        else:
            os.environ[_LEGACY] = legacy
    return module.sparsity.keras


def load_keras3() -> KerasLibrary:
    """Keras 3 on the backend that the user set it to."""
    try:
        with quiet_import():
            keras = require("keras", extra="tensorflow")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        package = f"'prunectl[{missing}]'" if missing in _BACKEND_EXTRAS else missing
        raise MissingExtraError(
            f"Keras is set to work on {missing}, which is not installed",
            hint=f"pip install {package}, or set KERAS_BACKEND to what there is",
        ) from error
    backend = keras.backend.backend()
    if backend not in TRAINING_BACKENDS:
        raise UsageError(
            f"Keras is set to the backend {backend}, which cannot train",
            hint=f"set KERAS_BACKEND to one of {', '.join(TRAINING_BACKENDS)}",
        )
    return KerasLibrary(keras, is_keras2=False, backend=backend)


@contextmanager
def quiet_import() -> Iterator[None]:
    """Silence the import of TensorFlow and JAX below errors, unless TF_CPP_MIN_LOG_LEVEL is set."""
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for name in ("tensorflow", "absl", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if level != "3" or "tensorflow" in sys.modules:
        with ignore_warnings():
            yield
        return
    # What TensorFlow's libraries find while they are loaded goes to the file itself, whatever that level.
    with silence(2), ignore_warnings():
        yield


def get_value(library: KerasLibrary, variable: Any) -> Array:
    """A copy of a variable's value, in its own dtype."""
    if library.is_keras2:
        return np.array(variable.numpy())
    if library.is_on_tensorflow:
        return np.array(variable.value.numpy())
    with ignore_warnings():
        return np.array(library.keras.ops.convert_to_numpy(variable.value)).astype(dtype(variable), copy=False)


def set_value(_: KerasLibrary, variable: Any, value: Array) -> None:
    """Assign a variable."""
    variable.assign(np.asarray(value).astype(dtype(variable), copy=False))


def dtype(variable: Any) -> np.dtype[Any]:
    """The NumPy dtype of a variable."""
    name = variable.dtype if isinstance(variable.dtype, str) else variable.dtype.name
    return np.dtype(getattr(ml_dtypes, name)) if name.startswith(("bfloat", "float8")) else np.dtype(name)


def shape(variable: Any) -> tuple[int, ...]:
    """The shape of a variable."""
    return tuple(int(size) for size in variable.shape)


def is_float(variable: Any) -> bool:
    """Whether a variable can have a gradient."""
    kind_dtype = dtype(variable)
    return kind_dtype.kind == "f" or kind_dtype.name.startswith(("bfloat", "float"))


def as_arrays(outputs: Any) -> Any:
    """The outputs of a model as one array or a tuple of them."""
    if isinstance(outputs, dict):
        outputs = tuple(outputs[name] for name in outputs)
    if isinstance(outputs, list | tuple):
        return tuple(np.asarray(output) for output in outputs) if len(outputs) != 1 else np.asarray(outputs[0])
    return np.asarray(outputs)


def mask_gradient(tf: Any, mask: Any, gradient: Any) -> Any:
    """A gradient zeroed where a mask is False; sparse gradients stay `tf.IndexedSlices`."""
    if isinstance(gradient, tf.IndexedSlices):
        rows = tf.gather(mask, gradient.indices)
        return tf.IndexedSlices(
            tf.where(rows, gradient.values, tf.zeros_like(gradient.values)), gradient.indices, gradient.dense_shape
        )
    return tf.where(mask, gradient, tf.zeros_like(gradient))


def densify(tf: Any, gradient: Any) -> Any:
    """A sparse gradient as a dense tensor."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, gradient.dense_shape[0])
    return gradient
