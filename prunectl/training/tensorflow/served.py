"""What a SavedModel serves, as a Keras model around it: the gradient goes through the function that was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, first_line
from prunectl.training.keras.library import keras_two, quietly
from prunectl.training.signature import Port

_DEFAULT = "serving_default"
_Base: Any = keras_two().keras.Model
_tf = keras_two().tensorflow


class Served(_Base):  # type: ignore[misc]
    """A model that answers as the signature does."""

    def __init__(self, function: Any, root: Any) -> None:
        super().__init__()
        # Kept alive beside the function, which holds its variables weakly.
        self._root = [lambda: root]
        self._function = function
        # By their names: a signature knows no other order.
        self._specs: Mapping[str, Any] = dict(sorted(function.structured_input_signature[1].items()))
        self._answers = tuple(sorted(function.structured_outputs))
        self.held = list(function.variables)

    @property
    def piece(self) -> int | None:
        """How many examples it takes at a time, if it takes so many only."""
        sizes = {spec.shape[0] for spec in self._specs.values() if spec.shape.rank}
        return next((int(size) for size in sizes if size is not None), None)

    @property
    def ports(self) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
        """What goes in and what comes out."""
        outputs = self._function.structured_outputs
        return (
            tuple(_port(name, spec) for name, spec in self._specs.items()),
            tuple(_port(name, outputs[name]) for name in self._answers),
        )

    def call(self, inputs: Any) -> Any:
        """Return the answers for a batch of any size."""
        given = [_tf.cast(one, spec.dtype) for one, spec in zip(_each(inputs), self._specs.values(), strict=True)]
        found = self._serve(given) if self.piece is None else self._in_pieces(given, self.piece)
        return found if len(found) > 1 else found[0]

    def _serve(self, given: Sequence[Any]) -> list[Any]:
        answers = self._function(**dict(zip(self._specs, given, strict=True)))
        return [answers[name] for name in self._answers]

    def _in_pieces(self, given: Sequence[Any], size: int) -> list[Any]:
        """Fill the last piece up with its last example, whose answers are left out and so teach nothing."""
        count = _tf.shape(given[0])[0]
        filled = [_tf.concat([one, _tf.repeat(one[-1:], -count % size, axis=0)], axis=0) for one in given]
        pieces = [_tf.reshape(one, [-1, size, *one.shape[1:]]) for one in filled]
        kinds = [self._function.structured_outputs[name].dtype for name in self._answers]
        found = _tf.map_fn(self._serve, pieces, fn_output_signature=kinds)
        return [_tf.reshape(one, _tf.concat([[-1], _tf.shape(one)[2:]], axis=0))[:count] for one in found]


def served(path: Path) -> Served:
    """Return the model that a SavedModel serves."""
    try:
        with quietly():
            root = _tf.saved_model.load(str(path))
    except Exception as error:
        line = first_line(error)
        raise InputError(f"{path} cannot be loaded by this TensorFlow: {line}") from error
    names = list(root.signatures)
    if not names:
        raise InputError(
            f"{path} serves nothing: it has variables, and no function that says how they are used",
            hint="save it with signatures=, or build the model with --model mod:fn",
        )
    function = root.signatures[_DEFAULT if _DEFAULT in names else names[0]]
    if not function.trainable_variables:
        raise InputError(f"{path} has no variables that can be trained: they were frozen into constants")
    return Served(function, root)


def _each(inputs: Any) -> list[Any]:
    return list(inputs) if isinstance(inputs, list | tuple) else [inputs]


def _port(name: str, spec: Any) -> Port:
    dims = None if spec.shape.rank is None else tuple(None if n is None else int(n) for n in spec.shape)[1:]
    return Port(name, dims, spec.dtype.name)
