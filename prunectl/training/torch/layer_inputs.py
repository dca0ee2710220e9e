"""Sees which inputs a module's weights meet, by watching the operations that PyTorch dispatches.

Whatever calls them, a layer, a function, a script or an exported program, ends in the same few operations, one operand
of which is the weight itself or a view of it.
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

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default: 0,
    _aten.bmm.default: 0,
    _aten.addmm.default: 1,
    ADDMM_ACTIVATION: 1,
}
"""Where the two factors of a product are among the arguments."""
_CONVOLUTIONS = frozenset({_aten.convolution.default, CONVOLUTION})
_RECURRENT = _aten.mkldnn_rnn_layer.default


@contextmanager
def without_mha_fastpath() -> Generator[None]:
    """Disable the fused fast path of transformer encoders, an operator that hides its weights, of PyTorch alone."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


@contextmanager
def capture_layer_inputs(
    weights: Mapping[str, torch.Tensor],
    see: InputCallback,
    pieces: FixedBatchModule | None = None,
    cache: CachedPass | None = None,
) -> Generator[None]:
    """Show what these weights meet while the context lasts; of pieces, only what does not fill them up.

    Operations that a cache knows are skipped.
    """
    kind = _UncompiledRecorder if "torch._dynamo" in sys.modules else _InputRecorder
    recorder = kind(weights, see, pieces, cache)
    try:
        with without_mha_fastpath(), torch.no_grad(), recorder:
            yield
    except Exception:
        if recorder.failure is not None:
            # A script makes errors of its own from those of others.
            raise recorder.failure from None
        raise


class _InputRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        see: InputCallback,
        pieces: FixedBatchModule | None,
        cache: CachedPass | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see, self._pieces, self._cache = see, pieces, cache
        self.failure: Exception | None = None
        self._weights: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, weight in weights.items():
            self._weights.setdefault(weight.untyped_storage().data_ptr(), []).append((name, weight))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether PyTorch shall import its compiler, to keep it away from here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Who watches the code of the model is not to see this one.
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
        if first.ndim == 3:  # one of a batch of products is a product
            if len(first) != 1:
                return
            first, second = first[0], second[0]
        for name, weight in self._named(second):
            self._show(name, first, _layout_of_view(weight, second))
        for name, weight in self._named(first):
            self._show(name, second.t(), _layout_of_view(weight, first.t()))

    def _recurrent(self, args: tuple[Any, ...], out: torch.Tensor) -> None:
        steps, kernel, recurrent, first, is_reversed = args[0], args[1], args[2], args[5], args[7]
        begin = first.reshape(1, *out.shape[1:])
        before = torch.cat([out[1:], begin] if is_reversed else [begin, out[:-1]])
        for view, inputs in ((kernel, steps), (recurrent, before)):
            for name, weight in self._named(view):
                self._show(name, inputs, _layout_of_view(weight, view.t()))

    def _convolution(self, args: tuple[Any, ...]) -> None:
        inputs, view, _, strides, padding, dilations, is_transposed, output_padding, groups = args[:9]
        more = output_padding if is_transposed else [0] * len(padding)
        pads = tuple((pad, pad - extra) for pad, extra in zip(padding, more, strict=True))
        window = SlidingWindow(tuple(strides), tuple(dilations), pads, is_transposed)
        use = WeightUse(1, 0, groups, window=window) if is_transposed else WeightUse(0, 1, groups, window=window)
        for name, weight in self._named(view):
            is_whole = view.shape == weight.shape and view.stride() == weight.stride()
            self._show(name, inputs, use if is_whole else None)

    def _show(self, name: str, inputs: torch.Tensor, use: WeightUse | None) -> None:
        if use is None:
            return
        pieces = self._pieces
        if pieces is not None and len(inputs) % pieces.size == 0:
            # The examples come first, alone or with what each of them has several of.
            inputs = inputs[: len(inputs) // pieces.size * pieces.kept]
        try:
            self._see(LayerInput(name, _array(inputs), use))
        except Exception as error:
            self.failure = error
            raise


class _UncompiledRecorder(_InputRecorder):  # type: ignore[no-untyped-call]
    """The same where the compiler is there already, and would compile what it meets within a compiled module."""

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
    """How a matrix of inputs by outputs lies in a weight; None if it is not some of its outputs."""
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
