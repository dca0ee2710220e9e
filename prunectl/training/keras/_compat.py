"""All private APIs of Keras 2 and 3 that prunectl uses, each wrapped in a function of this module."""
# ruff: noqa: SLF001

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prunectl.formats.safe_json import require

_GLOBAL_GENERATOR = "global_seed_generator"


def flat_layers(model: Any, *, include_self: bool = True) -> list[Any]:
    """A model (unless left out) and its layers at any depth; a layer that is reached twice is listed twice."""
    return list(model._flatten_layers(include_self=include_self))


def distinct_layers(model: Any) -> list[Any]:
    """A model and its layers at any depth, each listed once."""
    return list({id(layer): layer for layer in flat_layers(model)}.values())


def is_graph_network(model: Any) -> bool:
    """Whether a model is functional: a graph of layers."""
    return bool(getattr(model, "_is_graph_network", False))


def takes_training(model: Any) -> bool:
    """Whether the call of a model has an argument `training`."""
    return bool(getattr(model, "_call_has_training_arg", True))


def weights_of(model: Any) -> list[Any]:
    """The weights of a model, without the vocabularies that Keras 2 lists among them."""
    return [weight for weight in model.weights if hasattr(weight, "shape")]


def structure(model: Any, which: str) -> Any:
    """The nested structure of a functional model's `inputs` or `outputs`, None if it has none."""
    nested = getattr(model, f"_{which}_struct", None)
    return getattr(model, f"_nested_{which}", None) if nested is None else nested


def producer(tensor: Any) -> tuple[Any, int] | None:
    """The layer that makes a symbolic tensor, and the index among its outputs."""
    history = getattr(tensor, "_keras_history", None)
    return None if history is None else (history[0], history[2])


def built_shape(model: Any) -> Any:
    """The input shape that a subclassed model was built for, None if it is unknown."""
    shape = getattr(model, "_build_input_shape", None)
    if shape is None:
        shape = next(iter((getattr(model, "_build_shapes_dict", None) or {}).values()), None)
    return shape


def layer_statistics(layer: Any, *, is_keras2: bool) -> tuple[Any, ...]:
    """The variables that a layer created as not trainable, without those that a user froze."""
    return tuple(getattr(layer, "_non_trainable_weights" if is_keras2 else "_non_trainable_variables", ()))


def rnn_inputs(layer: Any, sequences: Any, states: Any, constants: Any) -> tuple[Any, Any, Any]:
    """Sequences, initial states and constants of a recurrent Keras 2 layer, separated as in its call."""
    inputs: tuple[Any, Any, Any] = layer._process_inputs(sequences, states, constants)
    return inputs


def is_loss_built(model: Any) -> bool:
    """Whether the compiled losses of Keras 3 have their variables."""
    loss = getattr(model, "_compile_loss", None)
    return loss is None or bool(loss.built)


def count_step(model: Any, verb: str) -> None:
    """Increment the counter of training or test steps, as Keras 2's own step functions do."""
    getattr(model, f"_{verb}_counter").assign_add(1)


def trained_variables(optimizer: Any) -> list[Any]:
    """The variables that an optimizer of Keras 3 was built for."""
    return list(optimizer._trainable_variables)


def seed_generators(layer: Any) -> tuple[Any, ...]:
    """The random generators of a layer of Keras 3."""
    return tuple(getattr(layer, "_seed_generators", ()))


def make_stateful(tf: Any, layer: Any) -> Iterator[Any]:
    """Give a random Keras 2 layer a generator whose state can be set, in place of operations with hidden state."""
    generator = getattr(layer, "_random_generator", None)
    if generator is None or not hasattr(generator, "RNG_STATEFUL"):
        return
    generator._rng_type = generator.RNG_STATEFUL
    generator._generator = tf.random.Generator.from_seed(1)
    generator._built = True
    yield generator._generator


@contextmanager
def kept_kernels() -> Iterator[None]:
    """Keep TensorFlow's compiled kernels while it is seeded, as rebuilding and optimising them takes time."""
    library = require("tensorflow.python.eager.context", extra="tensorflow").pywrap_tfe
    clear = library.TFE_ContextClearCaches
    library.TFE_ContextClearCaches = lambda _: None
    try:
        yield
    finally:
        library.TFE_ContextClearCaches = clear


def global_generator() -> Any:
    """The generator of Keras 3 for layers without their own, None if it does not exist yet."""
    return _global_state().get_global_attribute(_GLOBAL_GENERATOR)


def set_global_generator(generator: Any) -> None:
    """Set the generator of Keras 3 for layers without their own."""
    _global_state().set_global_attribute(_GLOBAL_GENERATOR, generator)


def _global_state() -> Any:
    return require("keras.src.backend.common.global_state", extra="tensorflow")


def compile_arguments(config: Mapping[str, Any], objects: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `compile` in Keras 2 for a training configuration."""
    saving = require("tf_keras.src.saving.legacy.saving_utils", extra="tensorflow")
    arguments: dict[str, Any] = saving.compile_args_from_training_config(dict(config), dict(objects))
    return arguments


def application_classes() -> dict[str, Any]:
    """Layers defined in `tf_keras.applications`, which Keras 2 does not find when it loads a file."""
    modules = (
        ("convnext", ("LayerScale", "StochasticDepth")),
        ("inception_resnet_v2", ("CustomScaleLayer",)),
    )
    return {
        name: getattr(require(f"tf_keras.src.applications.{module}", extra="tensorflow"), name)
        for module, names in modules
        for name in names
    }


def rename(variable: Any, name: str) -> None:
    """Rename a Keras 2 variable, whose name is otherwise fixed at creation."""
    variable._handle_name = name
