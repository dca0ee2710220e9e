"""A layer as rows times columns gives what PyTorch gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prunectl.calibration import im2col as module
from prunectl.calibration.im2col import scatter_rows, weight_matrix
from prunectl.training.backend import SlidingWindow, WeightUse
from tests.calibration.by_hand import as_rows, every_column, normal, of_outputs, product, run, use_of
from tests.calibration.layers import LAYERS, made


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_times_columns_are_the_outputs_of_a_layer(kind: str) -> None:
    layer, shape = made(kind)
    x, use = normal(3, *shape), use_of(layer)
    np.testing.assert_allclose(product(layer.weight.detach().numpy(), x, use), as_rows(run(layer, x), use), atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_columns_come_in_chunks_of_a_bounded_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = made(kind)
    x, use, kernel = normal(7, *shape), use_of(layer), tuple(layer.weight.shape)
    whole = every_column(x, use, kernel)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    pieces = [np.array(piece) for piece in module.im2col(x, use, kernel)]
    assert len(pieces) >= 7
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_was_taken_apart_goes_back_to_its_place(kind: str) -> None:
    layer, _ = made(kind)
    weights, use = layer.weight.detach().numpy(), use_of(layer)
    before, rows = weights.copy(), weight_matrix(weights, use)
    np.testing.assert_array_equal(scatter_rows(rows, use, np.zeros_like(weights)), weights)
    other = normal(*rows.shape, seed=5)
    np.testing.assert_array_equal(weight_matrix(scatter_rows(other, use, weights), use), other)
    np.testing.assert_array_equal(weights, before)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_convolution_is_rows_times_columns(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))

    def sizes(least: int, most: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(least, most), min_size=rank, max_size=rank)))

    groups, more, into = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    kernel, strides, dilations, padding, space = sizes(1, 3), sizes(1, 3), sizes(1, 2), sizes(0, 2), sizes(1, 6)
    is_transposed = data.draw(st.booleans())
    added = (0,) * rank
    if is_transposed:
        added = tuple(min(extra, max(s, d) - 1) for extra, s, d in zip(sizes(0, 1), strides, dilations, strict=True))
        lengths = [
            (n - 1) * s - 2 * p + d * (k - 1) + a + 1
            for n, s, p, d, k, a in zip(space, strides, padding, dilations, kernel, added, strict=True)
        ]
    else:
        lengths = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(space, padding, dilations, kernel, strict=True)]
    assume(min(lengths) >= 1)
    names = ("ConvTranspose" if is_transposed else "Conv") + f"{rank}d"
    options = {"output_padding": added} if is_transposed else {}
    layer = getattr(torch.nn, names)(
        groups * into, groups * more, kernel, strides, padding, groups=groups, dilation=dilations, bias=False, **options
    ).double()
    x, use = normal(2, groups * into, *space), use_of(layer)
    weights = layer.weight.detach().numpy()
    np.testing.assert_allclose(product(weights, x, use), as_rows(run(layer, x), use), atol=1e-10)
    np.testing.assert_array_equal(scatter_rows(weight_matrix(weights, use), use, np.zeros_like(weights)), weights)


def test_the_channels_of_one_window_position_lie_side_by_side() -> None:
    weights = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    use = WeightUse(0, 1, window=SlidingWindow((1, 1), (1, 1), ((0, 0), (0, 0))))
    np.testing.assert_array_equal(weight_matrix(weights, use)[0], weights.transpose(0, 2, 3, 1).reshape(2, -1))


def test_a_depthwise_kernel_of_keras_has_its_groups_on_an_axis_of_their_own() -> None:
    kernel, x = normal(3, 2, 4, 2), normal(2, 4, 6, 5, seed=1)
    use = WeightUse(3, None, groups=4, group_axis=2, window=SlidingWindow((2, 1), (1, 1), ((1, 1), (0, 1))))
    padded = torch.from_numpy(np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 1))))
    theirs = torch.from_numpy(kernel.transpose(2, 3, 0, 1).reshape(8, 1, 3, 2))
    expected = torch.nn.functional.conv2d(padded, theirs, stride=(2, 1), groups=4).numpy()
    np.testing.assert_allclose(product(kernel, x, use), as_rows(expected, use), atol=1e-12)
    np.testing.assert_array_equal(scatter_rows(weight_matrix(kernel, use), use, np.zeros_like(kernel)), kernel)


def test_matrices_that_are_stacked_each_see_their_own_inputs() -> None:
    stack, x = normal(3, 5, 4), normal(7, 15, seed=1)
    use = WeightUse(2, 1, groups=3, group_axis=0)
    expected = np.concatenate([x[:, 5 * at : 5 * at + 5] @ stack[at] for at in range(3)], axis=1)
    np.testing.assert_allclose(product(stack, x, use), expected, atol=1e-12)
    np.testing.assert_array_equal(scatter_rows(weight_matrix(stack, use), use, np.zeros_like(stack)), stack)


@pytest.mark.parametrize("use", [WeightUse(0, 1), WeightUse(1, 0)], ids=["rows", "columns"])
def test_a_part_of_the_outputs_is_seen_and_placed_alone(use: WeightUse) -> None:
    weights, x = normal(6, 6), normal(9, 6, seed=1)
    whole, part = product(weights, x, use), of_outputs(use, 2, 5)
    np.testing.assert_allclose(product(weights, x, part), whole[:, 2:5], atol=1e-12)
    changed = scatter_rows(np.zeros((1, 3, 6)), part, weights)
    expected = weights.copy()
    expected[(slice(2, 5), slice(None)) if use.out_axis == 0 else (slice(None), slice(2, 5))] = 0
    np.testing.assert_array_equal(changed, expected)


def test_a_tensor_may_be_seen_in_another_shape() -> None:
    weights, x = normal(2, 3, 4), normal(5, 6, seed=1)
    use = WeightUse(1, 0, shape=(6, 4))
    np.testing.assert_allclose(product(weights, x, use), x @ weights.reshape(6, 4), atol=1e-12)
    rows = normal(1, 4, 6, seed=2)
    np.testing.assert_array_equal(scatter_rows(rows, use, weights), rows[0].T.reshape(2, 3, 4))


def test_weights_that_do_not_lie_in_order_are_seen_as_they_are() -> None:
    weights, x = np.asfortranarray(normal(4, 6)), normal(5, 6, seed=1)
    np.testing.assert_allclose(product(weights, x, WeightUse(0, 1)), x @ weights.T, atol=1e-12)
    np.testing.assert_array_equal(scatter_rows(normal(1, 4, 6, seed=2), WeightUse(0, 1), weights), normal(4, 6, seed=2))
