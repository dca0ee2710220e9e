"""The wrappers of tfmot taken off a Keras configuration: nothing but dictionaries and lists."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prunectl.formats.keras.config import inner_layer
from prunectl.formats.keras.strip import LayerNameConflictError, unwrap_config
from prunectl.formats.keras.wrapped import MasksNotAppliedError, Weight, match_masks


def layer(name: str, *calls: Any, kind: str = "Dense", **facts: Any) -> dict[str, Any]:
    """A layer as functional models of Keras 2 put it down."""
    return {"class_name": kind, "config": {"name": name, **facts}, "name": name, "inbound_nodes": list(calls)}


def around(inner: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """The same layer in a pruning wrapper, which has taken its place in the graph."""
    own = {"class_name": inner["class_name"], "config": inner["config"], "module": "keras.layers", "build_config": {}}
    name = f"prune_low_magnitude_{inner['name']}"
    config = {"name": name, "layer": own, "pruning_schedule": {"class_name": "ConstantSparsity"}, **facts}
    return {**inner, "class_name": "PruneLowMagnitude", "config": config, "name": name}


def model(layers: list[Any], output: str, **more: Any) -> dict[str, Any]:
    config = {"name": "model", "layers": layers, "output_layers": [[output, 0, 0]], **more}
    return {"class_name": "Functional", "config": config}


OTHER = {"name": "by_hand", "layer": layer("one")}


def test_a_layer_takes_the_place_of_its_wrapper_and_all_calls_follow() -> None:
    inputs = layer("in", kind="InputLayer")
    twice = layer("twice", [["in", 0, 0, {}]], [["prune_low_magnitude_one", 0, 0, {"training": False}]], units=3)
    one = layer("one", [["prune_low_magnitude_twice", 0, 0, {"mask": ["prune_low_magnitude_twice", 0, 0]}]])
    found = unwrap_config(model([inputs, around(twice), around(one)], "prune_low_magnitude_twice"))
    plain_twice = layer("twice", [["in", 0, 0, {}]], [["one", 0, 0, {"training": False}]], units=3)
    plain_one = layer("one", [["twice", 0, 0, {"mask": ["twice", 0, 0]}]])
    assert found.config == model([inputs, plain_twice, plain_one], "twice")
    assert set(found.wrappers) == {"prune_low_magnitude_twice", "prune_low_magnitude_one"}


def test_a_history_of_the_newer_format_follows() -> None:
    tensor = {"class_name": "__keras_tensor__", "config": {"keras_history": ["prune_low_magnitude_one", 0, 0]}}
    after = layer("after", {"args": [tensor], "kwargs": {}})
    found = unwrap_config(model([around(layer("one")), after], "after")).config["config"]["layers"]
    assert found[1]["inbound_nodes"][0]["args"][0]["config"]["keras_history"] == ["one", 0, 0]


def test_names_in_a_model_mean_its_own_layers() -> None:
    inner = model([around(layer("same")), layer("next", [["prune_low_magnitude_same", 0, 0, {}]])], "next")
    outer = [{**inner, "name": "model", "inbound_nodes": []}, layer("prune_low_magnitude_same", [["model", 1, 0, {}]])]
    found = unwrap_config(model(outer, "prune_low_magnitude_same")).config
    assert found["config"]["output_layers"] == [["prune_low_magnitude_same", 0, 0]]
    assert found["config"]["layers"][0]["config"]["layers"][1]["inbound_nodes"] == [[["same", 0, 0, {}]]]


def test_the_first_layer_keeps_the_shape_of_its_input() -> None:
    wrapper = around(layer("first"), batch_input_shape=[None, 4])
    found = unwrap_config({"class_name": "Sequential", "config": {"layers": [wrapper]}}).config
    assert found["config"]["layers"][0]["config"] == {"batch_input_shape": [None, 4], "name": "first"}


@pytest.mark.parametrize("has_module", [True, False])
def test_a_layer_is_put_down_in_the_format_of_those_around_it(has_module: bool) -> None:
    facts = {"module": "tfmot", "registered_name": "PruneLowMagnitude", "build_config": {"input_shape": [None, 4]}}
    wrapper = {**around(layer("one")), **(facts if has_module else {})}
    found = unwrap_config(model([wrapper], "one")).config["config"]["layers"][0]
    assert found.get("module") == ("keras.layers" if has_module else None)
    assert ("build_config" in found) == has_module
    assert "registered_name" not in found


def test_other_wrappers_stay_around_the_plain_layer() -> None:
    timed = layer("timed", kind="TimeDistributed", layer=around(layer("inside")))
    found = unwrap_config(model([timed], "timed")).config["config"]["layers"][0]["config"]
    assert found["layer"]["class_name"] == "Dense"
    assert found["layer"]["config"] == {"name": "inside"}


@pytest.mark.parametrize("other", [layer("one"), {**around(layer("one")), "config": OTHER}])
def test_a_name_that_another_layer_has_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(LayerNameConflictError, match="one"):
        unwrap_config(model([around(layer("one")), other], "one"))


@pytest.mark.parametrize("broken", [None, {}, {"class_name": 3}, {"class_name": "PruneLowMagnitude", "config": []}])
def test_what_is_no_wrapper_has_nothing_inside(broken: Any) -> None:
    assert inner_layer(broken) is None


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["class_name", "config", "layers", "layer", "name", "inbound_nodes", "keras_history"]),
            inner,
        )
    ),
)


@given(JSON)
def test_what_has_no_wrappers_stays_as_it_is(config: Any) -> None:
    assert unwrap_config(config).config == config
    assert unwrap_config(config).wrappers == {}


@example({"name": "x"})
@given(JSON)
def test_a_broken_wrapper_does_no_harm(inner: Any) -> None:
    config = {"class_name": "PruneLowMagnitude", "config": {"name": "x", "layer": {"class_name": "D", "config": inner}}}
    assert "PruneLowMagnitude" not in json.dumps(unwrap_config({"layers": [config]}).config)


# --- Masks ---


def weights(*entries: tuple[str, tuple[int, ...]]) -> list[Weight]:
    return [Weight(f"layer/{number}", leaf, shape) for number, (leaf, shape) in enumerate(entries)]


def test_a_mask_belongs_to_a_kernel_before_anything_else_of_its_shape() -> None:
    of_one = weights(("depthwise_kernel", (1, 1, 3, 1)), ("pointwise_kernel", (1, 1, 3, 1)), ("bias", (1,)))
    assert match_masks([Weight("mask", "mask", (1, 1, 3, 1))], of_one) == {"layer/1": "mask"}


def test_masks_of_one_shape_belong_to_kernels_in_their_order() -> None:
    cells = weights(
        ("kernel", (2, 6)), ("recurrent_kernel", (2, 6)), ("bias", (2, 6)), ("kernel", (2, 6)), ("bias", (6,))
    )
    masks = [Weight(f"mask_{number}", "mask", (2, 6)) for number in range(3)]
    assert match_masks(masks, cells) == {"layer/0": "mask_0", "layer/1": "mask_1", "layer/3": "mask_2"}


def test_a_mask_of_a_layer_that_tfmot_does_not_know_belongs_to_what_has_its_shape() -> None:
    assert match_masks([Weight("mask", "mask", (3,))], weights(("w", (2, 3)), ("v", (3,)))) == {"layer/1": "mask"}


def test_two_masks_for_one_weight_are_refused() -> None:
    with pytest.raises(
        MasksNotAppliedError, match=r"mask_1 has the shape \[2, 3\], but no weight of its layer has this shape"
    ):
        match_masks([Weight(f"mask_{number}", "mask", (2, 3)) for number in range(2)], weights(("kernel", (2, 3))))
