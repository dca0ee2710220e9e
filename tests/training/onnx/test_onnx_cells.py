"""Recurrent layers of ONNX models: stepping by hand through what is shown gives their states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.training.backend import LayerInput
from tests.contract import Array
from tests.training.onnx.by_hand import meet
from tests.training.onnx.models import load, node, normal, port, run, save, sights

STEPS, BATCH, IN, SIZE = 5, 3, 4, 2
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
X = normal(STEPS, BATCH, IN)


def sigmoid(array: Array) -> Array:
    return 1 / (1 + np.exp(-array))


def weights(op: str, direction: str) -> dict[str, Array]:
    ways, rows = DIRECTIONS[direction], GATES[op] * SIZE
    return {"w": normal(ways, rows, IN), "r": normal(ways, rows, SIZE), "b": normal(ways, 2 * rows)}


def layer(op: str, direction: str, *more: str, **settings: Any) -> Any:
    return node(op, ["x", "w", "r", "b", *more], ["y"], hidden_size=SIZE, direction=direction, **settings)


def gates(held: dict[str, Array], shown: dict[str, Array]) -> tuple[Array, Array]:
    """Sums from inputs and from states with their biases: steps, batch, directions, rows."""
    ways, rows = held["w"].shape[:2]
    of_data, of_states = (shown[name].reshape(*shown[name].shape[:2], ways, rows) for name in "wr")
    return of_data + held["b"][:, :rows], of_states + held["b"][:, rows:]


def states(op: str, held: dict[str, Array], shown: dict[str, Array], direction: str, first: Array) -> Array:
    """The states of all steps: every gate from what is shown, only cells and blends carried from step to step."""
    of_data, of_states = gates(held, shown)
    found = np.zeros((STEPS, DIRECTIONS[direction], BATCH, SIZE))
    for way in range(DIRECTIONS[direction]):
        state, cell = first[way].astype(float), np.zeros((BATCH, SIZE))
        is_back = way == 1 or direction == "reverse"
        for step in reversed(range(STEPS)) if is_back else range(STEPS):
            left, right = (np.split(side[step, :, way], GATES[op], axis=-1) for side in (of_data, of_states))
            if op == "RNN":
                state = np.tanh(left[0] + right[0])
            elif op == "GRU":
                update, reset = sigmoid(left[0] + right[0]), sigmoid(left[1] + right[1])
                state = (1 - update) * np.tanh(left[2] + reset * right[2]) + update * state
            else:
                enter, leave, forget = (sigmoid(left[at] + right[at]) for at in range(3))
                cell = forget * cell + enter * np.tanh(left[3] + right[3])
                state = leave * np.tanh(cell)
            found[step, way] = state
    return found


def shown(held: dict[str, Array], found: list[LayerInput]) -> dict[str, Array]:
    return {sight.name: meet(held[sight.name], sight) for sight in found}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("is_begun", [False, True])
def test_the_states_follow_from_what_is_shown(op: str, direction: str, is_begun: bool, tmp_path: Path) -> None:
    held = weights(op, direction)
    first = normal(DIRECTIONS[direction], BATCH, SIZE) * is_begun
    settings = {"linear_before_reset": 1} if op == "GRU" else {}
    more = ("", "first") if is_begun else ()
    path = save(tmp_path / "m.onnx", [layer(op, direction, *more, **settings)], {**held, "first": first})
    found = sights(path, ["w", "r"], X)
    assert [sight.use.group_axis for sight in found] == [0, 0]
    expected = run(path, X)[0]
    np.testing.assert_allclose(states(op, held, shown(held, found), direction, first), expected, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_last_gate_of_a_gru_meets_the_state_that_is_not_reset(direction: str, tmp_path: Path) -> None:
    held = weights("GRU", direction)
    path = save(tmp_path / "m.onnx", [layer("GRU", direction)], held)
    of_data, gated, last = sights(path, ["w", "r"], X)
    assert (gated.use.outputs, last.use.outputs) == ((0, 2 * SIZE), (2 * SIZE, 3 * SIZE))
    rows = 3 * SIZE
    data = meet(held["w"], of_data) + held["b"][0, :rows]
    states = np.concatenate([meet(held["r"], gated), meet(held["r"], last)], axis=-1) + held["b"][0, rows:]
    update, _, blend = np.split(data + states, 3, axis=-1)
    made = (1 - sigmoid(update)) * np.tanh(blend) + sigmoid(update) * gated.inputs
    np.testing.assert_allclose(made, run(path, X)[0][:, 0], atol=1e-5)


def test_a_gru_that_resets_in_another_way_shows_its_kernel_alone(tmp_path: Path) -> None:
    both = save(tmp_path / "both.onnx", [layer("GRU", "bidirectional")], weights("GRU", "bidirectional"))
    other = layer("GRU", "forward", activations=["HardSigmoid", "Tanh"])
    unusual = save(tmp_path / "unusual.onnx", [other], weights("GRU", "forward"))
    for path in (both, unusual):
        assert [sight.name for sight in sights(path, ["w", "r"], X)] == ["w"]


def test_steps_behind_the_end_of_a_sequence_are_not_shown(tmp_path: Path) -> None:
    held = weights("LSTM", "bidirectional")
    lengths = np.array([5, 2, 4], np.int32)
    ports = [port("x"), port("lengths", dtype=np.int32)]
    path = save(tmp_path / "m.onnx", [layer("LSTM", "bidirectional", "lengths")], held, x=ports)
    found = {sight.name: sight for sight in sights(path, ["w", "r"], (X, lengths))}
    is_real = np.arange(STEPS)[:, None] < lengths
    np.testing.assert_array_equal(found["w"].inputs, np.concatenate([X, X], axis=-1)[is_real])
    # Each sequence by itself has no end before its last step.
    for number, length in enumerate(lengths):
        alone = save(tmp_path / "alone.onnx", [layer("LSTM", "bidirectional")], held)
        of_states = sights(alone, ["r"], X[:length, number : number + 1])[0].inputs[:, 0]
        steps, sequences = np.nonzero(is_real)
        chosen = found["r"].inputs[sequences == number]
        assert list(steps[sequences == number]) == list(range(length))
        np.testing.assert_allclose(chosen, of_states, atol=1e-6)


def test_a_layer_that_gives_its_last_state_alone_is_seen_as_well(tmp_path: Path) -> None:
    held = weights("LSTM", "forward")
    last = node("LSTM", ["x", "w", "r", "b"], ["", "y"], hidden_size=SIZE)
    path = save(tmp_path / "m.onnx", [last], held)
    whole = save(tmp_path / "whole.onnx", [layer("LSTM", "forward")], held)
    (found,), (expected,) = sights(path, ["r"], X), sights(whole, ["r"], X)
    np.testing.assert_array_equal(found.inputs, expected.inputs)
    np.testing.assert_array_equal(load(path).predict(X), run(path, X)[0])
