"""ONNX weights in fewer bits, by onnxruntime's own tools."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunectl.errors import WorkError, first_line
from prunectl.exporting.job import Job
from prunectl.exporting.onnx_bfloat import bfloat
from prunectl.exporting.onnx_order import order
from prunectl.formats.base import Array
from prunectl.formats.optional import require

_DYNAMIC = ["MatMul", "Gemm", "LSTM", "Gather"]
"""Operators that run on 8-bit weights without knowing how large their inputs are."""


def smaller(job: Job, proto: Any) -> tuple[Any, tuple[str, ...]]:
    """Return a model with the weights that were asked for, and what the user should know of it."""
    if job.request.is_half:
        return _half(job, proto), ("Its weights are 16-bit floats; what goes in and comes out stays as it was.",)
    if job.request.is_bf16:
        return bfloat(proto, job.request), ("Its kernels are bfloat16, and widened where they are used.",)
    if job.request.is_int8:
        return (_static if job.request.data else _dynamic)(job, proto)
    return proto, ()


def _half(job: Job, proto: Any) -> Any:
    tools = require("onnxruntime.transformers.float16", extra="onnx")
    try:
        found = tools.convert_float_to_float16(proto, keep_io_types=True)
    except Exception as error:
        raise _failed(job, "--half", error) from error
    # It puts its casts behind what they are for.
    order(found.graph)
    return found


def _dynamic(job: Job, proto: Any) -> tuple[Any, tuple[str, ...]]:
    tools = require("onnxruntime.quantization", extra="onnx")
    # It infers every shape anew, and exporters leave some between that no longer hold, which it would stumble over.
    del proto.graph.value_info[:]

    def quantize(before: Path, after: Path) -> None:
        tools.quantize_dynamic(
            str(before),
            str(after),
            op_types_to_quantize=_DYNAMIC,
            weight_type=tools.QuantType.QInt8,
            extra_options={"WeightSymmetric": True},
        )

    return _through_files(job, proto, quantize), (
        "Weights of dense and recurrent layers are 8-bit integers; those of convolutions stay floats without --data.",
    )


def _static(job: Job, proto: Any) -> tuple[Any, tuple[str, ...]]:
    tools = require("onnxruntime.quantization", extra="onnx")
    feeds = [
        {port.name: one for port, one in zip(proto.graph.input, batch, strict=True)} for batch in job.inputs.batches
    ]

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc, name-defined]
        """Gives one batch after the other."""

        def __init__(self) -> None:
            self._left: Iterator[dict[str, Array]] = iter(feeds)

        def get_next(self) -> dict[str, Array] | None:
            return next(self._left, None)

    def quantize(before: Path, after: Path) -> None:
        tools.quantize_static(
            str(before),
            str(after),
            Reader(),
            quant_format=tools.QuantFormat.QDQ,
            weight_type=tools.QuantType.QInt8,
            per_channel=True,
            # Of eight bits, products of two overflow the sixteen that x86 processors without VNNI add them up in.
            reduce_range=True,
            extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
        )

    return _through_files(job, proto, quantize), (
        f"Weights and activations are 8-bit integers, their ranges by {job.inputs.examples} examples.",
        "Weights use 7 of the 8 bits, so that sums overflow on no processor.",
    )


def _through_files(job: Job, proto: Any, quantize: Any) -> Any:
    onnx = require("onnx", extra="onnx")
    before, after = job.scratch / "floats.onnx", job.scratch / "integers.onnx"
    onnx.save(proto, str(before))
    before_disabled = logging.root.manager.disable
    logging.disable(max(logging.WARNING, before_disabled))
    try:
        quantize(before, after)
    except Exception as error:
        raise _failed(job, "--int8", error) from error
    finally:
        logging.disable(before_disabled)
    return onnx.load(str(after))


def _failed(job: Job, option: str, error: Exception) -> WorkError:
    return WorkError(f"onnxruntime cannot do {option} for {job.file.path}: {first_line(error)}")
