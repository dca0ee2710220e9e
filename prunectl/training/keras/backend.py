"""One interface to Keras 2 and Keras 3 on any backend: imports, variables, devices and random generators."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from prunectl.errors import MissingExtraError, UsageError
from prunectl.formats.base import Array
from prunectl.formats.packages import command_for
from prunectl.formats.safe_json import require
from prunectl.formats.tensorflow import rebuild_worker
from prunectl.training.host import before_seeding
from prunectl.training.keras._compat import (
    flat_layers,
    global_generator,
    kept_kernels,
    make_stateful,
    seed_generators,
    set_global_generator,
)
from prunectl.training.quiet import ignore_warnings, raise_log_levels, silence

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
        """Whether the backend is TensorFlow."""
        return self.backend == "tensorflow"

    @property
    def tensorflow(self) -> Any:
        """The imported TensorFlow."""
        return require("tensorflow", extra="tensorflow")

    @property
    def generators(self) -> tuple[str, ...]:
        """The libraries whose random generators it seeds, and its layers draw from: its own and those of frameworks."""
        own = "tf_keras" if self.is_keras2 else "keras"
        return ("tensorflow", own, "torch") if self.backend == "torch" else ("tensorflow", own)

    @property
    def ops(self) -> Any:
        """`keras.ops`, or in Keras 2 TensorFlow operations under the same names."""
        return _tensorflow_ops() if self.is_keras2 else self.keras.ops

    @property
    def torch(self) -> Any:
        """The imported PyTorch."""
        return require("torch", extra="torch")

    @property
    def jax(self) -> Any:
        """The imported JAX."""
        return require("jax", extra="jax")

    @property
    def mismatch_errors(self) -> tuple[type[Exception], ...]:
        """Exceptions that Keras raises for arrays of mismatched shapes or types."""
        more = (self.tensorflow.errors.InvalidArgumentError,) if self.is_on_tensorflow else ()
        return (ValueError, TypeError, *more)


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
    """Import Keras 2 (tf_keras)."""
    with quiet_import():
        return KerasLibrary(require("tf_keras", extra="tensorflow"), is_keras2=True, backend="tensorflow")


def load_tfmot() -> Any:
    """Import tfmot's module for sparsity in Keras 2."""
    load_keras2()
    legacy = os.environ.get(_LEGACY)
    try:
        with ignore_warnings():
            module = rebuild_worker.load_tfmot()
    finally:
        # tfmot sets this variable, which would make later imports of Keras, also in child processes, Keras 2.
        if legacy is None:
            os.environ.pop(_LEGACY, None)
        else:
            os.environ[_LEGACY] = legacy
    return module.sparsity.keras


def load_keras3() -> KerasLibrary:
    """Import Keras 3 with the backend that the user has configured."""
    try:
        with quiet_import():
            keras = require("keras", extra="tensorflow")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise MissingExtraError(
            f"Keras uses the backend {missing}, which is not installed",
            hint=f"{command_for(missing, missing)}, or set KERAS_BACKEND to an installed backend",
        ) from error
    backend = keras.backend.backend()
    if backend not in TRAINING_BACKENDS:
        raise UsageError(
            f"Keras uses the backend {backend}, which cannot train",
            hint=f"set KERAS_BACKEND to one of {', '.join(TRAINING_BACKENDS)}",
        )
    return KerasLibrary(keras, is_keras2=False, backend=backend)


@contextmanager
def quiet_import() -> Iterator[None]:
    """Silence the import of TensorFlow and JAX below errors, unless TF_CPP_MIN_LOG_LEVEL is set."""
    raise_log_levels()
    if os.environ["TF_CPP_MIN_LOG_LEVEL"] != "3" or "tensorflow" in sys.modules:
        with ignore_warnings():
            yield
        return
    # While they are loaded, TensorFlow's libraries write to the file descriptor, whatever the log level.
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


def set_value(variable: Any, value: Array) -> None:
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
    """The outputs of a model as one array or a tuple of them, of a dictionary in the order of its keys."""
    if isinstance(outputs, dict):
        outputs = tuple(outputs[name] for name in sorted(outputs))
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


_CPU, _AUTO = "cpu", "auto"
_ACCELERATORS = ("gpu", "cuda")


@dataclass(slots=True)
class DevicePlacement:
    """The device and the distribution strategy for creating variables and running steps."""

    strategy: Any = None
    device: str = ""
    """A forced device such as `cpu:0` or `gpu:1`; empty for the framework's choice."""

    @contextmanager
    def scope(self, library: KerasLibrary) -> Iterator[None]:
        """Use this device and strategy in a context."""
        with ExitStack() as stack:
            if self.strategy is None and _num_processes() > 1:
                self.strategy = _distribution_strategy(library)
            if self.strategy is not None:
                stack.enter_context(self.strategy.scope())
            if self.device:
                stack.enter_context(_device_scope(library, self.device))
            yield

    @property
    def processes(self) -> tuple[int, int]:
        """The index of this process, and the number of processes."""
        return (_process_index(), _num_processes()) if self.strategy is not None else (0, 1)


def resolve_device(library: KerasLibrary, device: str) -> str:
    """The device to force for `--device`, empty if the framework chooses it anyway; raise if it is missing."""
    name, _, number = device.strip().lower().partition(":")
    if name in {"", _AUTO}:
        return ""
    if name not in {_CPU, *_ACCELERATORS} or not (number.isdecimal() or not number):
        raise UsageError(f"Keras has no device {device}", hint="known: auto, cpu, gpu, gpu:1")
    num_accelerators = _num_accelerators(library)
    if name == _CPU:
        return "cpu:0" if num_accelerators else ""
    if not num_accelerators:
        raise UsageError(f"{library.backend} finds no GPU", hint="use --device cpu, or auto")
    index = int(number or 0)
    if index >= num_accelerators:
        raise UsageError(
            f"{library.backend} finds no {device}: this machine has {num_accelerators} GPU, numbered from 0"
        )
    return f"gpu:{index}" if index else ""


def _distribution_strategy(library: KerasLibrary) -> Any:
    if not library.is_keras2:
        raise UsageError(
            "Keras 3 cannot train in several processes with MultiWorkerMirroredStrategy",
            hint="unset TF_CONFIG, or save the model with tf_keras",
        )
    return library.tensorflow.distribute.MultiWorkerMirroredStrategy()


def _num_accelerators(library: KerasLibrary) -> int:
    if library.is_on_tensorflow:
        return len(library.tensorflow.config.list_physical_devices("GPU"))
    if library.backend == "torch":
        return int(library.torch.cuda.device_count())
    return sum(device.platform != _CPU for device in library.jax.devices())


def _device_scope(library: KerasLibrary, device: str) -> Any:
    return library.tensorflow.device(f"/{device.upper()}") if library.is_keras2 else library.keras.device(device)


def _tf_config() -> dict[str, Any]:
    """The configuration of distributed processes in TF_CONFIG."""
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        return {}
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UsageError(f"TF_CONFIG is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _processes() -> list[tuple[str, int]]:
    cluster = _tf_config().get("cluster") or {}
    return [(kind, index) for kind in ("chief", "worker") for index in range(len(cluster.get(kind) or []))]


def _num_processes() -> int:
    return max(len(_processes()), 1)


def _process_index() -> int:
    task = _tf_config().get("task") or {}
    own = (str(task.get("type", "")), int(task.get("index", 0)))
    return _processes().index(own) if own in _processes() else 0


_SEED_RANGE = 1 << 32
_INT32_SEEDS = 1 << 31


class RandomState:
    """All random generators of a model."""

    def __init__(self, library: KerasLibrary, model: Any) -> None:
        self._library = library
        self._model = model
        self._generators = _generators(library, model)
        self.needs_retrace = library.is_keras2 and _has_custom_layers(model)
        """Whether some random operations take a new seed only when they are retraced."""
        self.has_hidden_state = not library.is_on_tensorflow or has_foreign_code(model)
        """Whether TensorFlow's kernels may hold random state outside the generators."""

    def seed(self, number: int, *, keeps_kernels: bool = False) -> None:
        """Seed all generators from a number."""
        shared = self._global_generator()
        before_seeding("python", "numpy", *self._library.generators)
        # set_random_seed imports and seeds every installed framework.
        with quiet_import(), kept_kernels() if keeps_kernels else nullcontext():
            self._library.keras.utils.set_random_seed(number % _INT32_SEEDS)
        for generator in shared:
            # Seeding makes Keras drop its global generator, but steps that are already traced still use it.
            set_global_generator(generator)
        source = np.random.default_rng(number % _SEED_RANGE)
        for generator in [*self._generators, *shared]:
            seed = int(source.integers(1, _INT32_SEEDS))
            if self._library.is_keras2:
                generator.reset_from_seed(seed)
            else:
                set_value(generator.state, np.array([seed, 0]))

    def get_state(self) -> list[Array]:
        """The state of each generator, the global one of Keras 3 last."""
        return [
            get_value(self._library, generator.state) for generator in [*self._generators, *self._global_generator()]
        ]

    def set_state(self, states: list[Array]) -> None:
        """Restore the states of `get_state`."""
        num_own = len(self._generators)
        if len(states) not in ((num_own,) if self._library.is_keras2 else (num_own, num_own + 1)):
            raise ValueError(f"a model with {num_own} random generators cannot go on from {len(states)} states")
        shared = self._global_generator()
        if len(states) > num_own and not shared:
            shared = [self._library.keras.random.SeedGenerator(1)]
            set_global_generator(shared[0])
        # A global generator created after `get_state` keeps its state.
        for generator, state in zip([*self._generators, *shared], states, strict=False):
            set_value(generator.state, state)

    def _global_generator(self) -> list[Any]:
        """The generator of Keras 3 for layers without their own, in a list; empty if it does not exist yet."""
        if self._library.is_keras2:
            return []
        generator = global_generator()
        return [generator] if generator is not None else []


def _generators(library: KerasLibrary, model: Any) -> list[Any]:
    if library.is_keras2:
        return [generator for layer in flat_layers(model) for generator in make_stateful(library.tensorflow, layer)]
    by_id = {id(generator): generator for layer in flat_layers(model) for generator in seed_generators(layer)}
    return list(by_id.values())


_KNOWN_PACKAGES = frozenset({"tf_keras", "tensorflow_model_optimization"})
"""Packages whose layers have settable random generators, or no randomness."""


def _has_custom_layers(model: Any) -> bool:
    return any(type(layer).__module__.partition(".")[0] not in _KNOWN_PACKAGES for layer in flat_layers(model))


_RUNS_ANY_CODE = frozenset({"Lambda", "TFOpLambda", "ClassMethod", "TFSMLayer"})
"""Keras layers that may run operations from outside Keras."""


def has_foreign_code(model: Any) -> bool:
    """Whether a model may run random operations from outside Keras, in a layer or in a function that a layer holds."""
    for layer in flat_layers(model):
        parts = (layer, *(value for value in vars(layer).values() if callable(value)))
        modules = {str(getattr(part, "__module__", None)).partition(".")[0] for part in parts}
        if type(layer).__name__ in _RUNS_ANY_CODE or not modules <= {*_KNOWN_PACKAGES, "keras", "prunectl"}:
            return True
    return False
