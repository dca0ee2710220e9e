"""Captures the inputs that a module's weights are applied to, by intercepting the operations that PyTorch dispatches.

Layers, functions, scripts and exported programs all end in the same few operations, one operand of which is the weight
itself or a view of it.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from prunectl.formats.base import Array
from prunectl.training.backend import InputCallback, LayerInput, SlidingWindow, WeightUse
from prunectl.training.torch._compat import ADDMM_ACTIVATION, CONVOLUTION, DisableTorchFunction, TorchDispatchMode
from prunectl.training.torch.build import FixedBatchModule
from prunectl.training.torch.cached_pass import CachedPass
from prunectl.training.torch.experts import IS_ROUTED

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default: 0,
    _aten.bmm.default: 0,
    _aten.addmm.default: 1,
    ADDMM_ACTIVATION: 1,
}
"""The index of the first of the two factors among the arguments of each matrix product."""
_CONVOLUTIONS = frozenset({_aten.convolution.default, CONVOLUTION})
_RECURRENT = _aten.mkldnn_rnn_layer.default


@contextmanager
def without_mha_fastpath() -> Generator[None]:
    """Disable the fast path of transformer encoders, a fused operator that hides the products with its weights."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


@contextmanager
def capture_layer_inputs(
    weights: Mapping[str, torch.Tensor],
    callback: InputCallback,
    pieces: FixedBatchModule | None = None,
    cache: CachedPass | None = None,
) -> Generator[None]:
    """Pass the inputs of these weights to a callback within the context, without the padding examples of `pieces`.

    Operations whose results are in a cache are skipped.
    """
    kind = _UncompiledRecorder if "torch._dynamo" in sys.modules else _InputRecorder
    recorder = kind(weights, callback, pieces, cache)
    try:
        with without_mha_fastpath(), torch.no_grad(), recorder:
            yield
    except Exception:
        if recorder.failure is not None:
            # TorchScript replaces an error of the callback by one of its own.
            raise recorder.failure from None
        raise


class _InputRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        callback: InputCallback,
        pieces: FixedBatchModule | None,
        cache: CachedPass | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._callback, self._pieces, self._cache = callback, pieces, cache
        self.failure: Exception | None = None
        self._weights: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, weight in weights.items():
            self._weights.setdefault(weight.untyped_storage().data_ptr(), []).append((name, weight))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, since True makes PyTorch import its compiler."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Function modes that watch the code of the model must not see this code.
        with DisableTorchFunction():
            return self._run(func, args, kwargs or {}, self._cache)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cache: CachedPass | None) -> Any:
        if cache is not None and cache.is_resuming:
            return cache.skip(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _PRODUCTS:
            first, second = args[_PRODUCTS[func] :][:2]
            self._product(first, second)
        elif func in _CONVOLUTIONS:
            self._convolution(args)
        elif func is _RECURRENT:
            self._recurrent(args, result[0])
        if cache is not None:
            cache.note(func, args, kwargs, result)
        return result

    def _named(self, view: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        return self._weights.get(view.untyped_storage().data_ptr(), [])

    def _product(self, first: torch.Tensor, second: torch.Tensor) -> None:
        if first.ndim == 3:  # a batch of one product is a plain product
            if len(first) != 1:
                return
            first, second = first[0], second[0]
        for name, weight in self._named(second):
            self._report(name, first, _layout_of_view(weight, second))
        for name, weight in self._named(first):
            self._report(name, second.t(), _layout_of_view(weight, first.t()))

    def _recurrent(self, args: tuple[Any, ...], out: torch.Tensor) -> None:
        steps, kernel, recurrent, first, is_reversed = args[0], args[1], args[2], args[5], args[7]
        initial = first.reshape(1, *out.shape[1:])
        states = torch.cat([out[1:], initial] if is_reversed else [initial, out[:-1]])
        for view, inputs in ((kernel, steps), (recurrent, states)):
            for name, weight in self._named(view):
                self._report(name, inputs, _layout_of_view(weight, view.t()))

    def _convolution(self, args: tuple[Any, ...]) -> None:
        inputs, view, _, strides, padding, dilations, is_transposed, output_padding, groups = args[:9]
        more = output_padding if is_transposed else [0] * len(padding)
        pads = tuple((pad, pad - extra) for pad, extra in zip(padding, more, strict=True))
        window = SlidingWindow(tuple(strides), tuple(dilations), pads, is_transposed)
        use = WeightUse(1, 0, groups, window=window) if is_transposed else WeightUse(0, 1, groups, window=window)
        for name, weight in self._named(view):
            is_whole = view.shape == weight.shape and view.stride() == weight.stride()
            self._report(name, inputs, use if is_whole else None)

    def _report(self, name: str, inputs: torch.Tensor, use: WeightUse | None) -> None:
        if use is None:
            return
        pieces = self._pieces
        if pieces is not None and len(inputs) % pieces.size == 0:
            # The first axis is examples, or examples times positions.
            inputs = inputs[: len(inputs) // pieces.size * pieces.kept]
        try:
            self._callback(LayerInput(name, _array(inputs), use, is_routed=IS_ROUTED.get()))
        except Exception as error:
            self.failure = error
            raise


class _UncompiledRecorder(_InputRecorder):  # type: ignore[no-untyped-call]
    """An input recorder for when the compiler is imported, which it keeps from compiling the recorder's own code."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


def _array(inputs: torch.Tensor) -> Array:
    array: Array = inputs.detach().float().cpu().numpy()
    return array


def _layout_of_view(weight: torch.Tensor, view: torch.Tensor) -> WeightUse | None:
    """The use of a weight by a view of inputs by outputs; None if the view is not a range of its outputs."""
    if weight.ndim != 2 or not weight.is_contiguous():
        return None
    rows, columns = weight.shape
    inputs, outputs = view.shape
    row, column = divmod(int(view.storage_offset() - weight.storage_offset()), columns)
    down, right = view.stride()
    if inputs == columns and column == 0 and (inputs == 1 or down == 1) and (outputs == 1 or right == columns):
        return WeightUse(0, 1, outputs=None if outputs == rows else (row, row + outputs))
    if inputs == rows and row == 0 and (inputs == 1 or down == columns) and (outputs == 1 or right == 1):
        return WeightUse(1, 0, outputs=None if outputs == columns else (column, column + outputs))
    return None
