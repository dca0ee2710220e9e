"""Policies: which tensors may be pruned, and the reason why others are skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prunectl.errors import UsageError
from prunectl.formats.base import PRUNABLE, QUANTISED, ModelFile, Role, Tensor
from prunectl.pruning.xnnpack import check_sparse_inference

MIN_SIZE = "min-size:"
UNKNOWN = "not known to be a kernel"
"""Why a tensor is left alone whose name and use do not tell what it is for."""
_ROLE_REASONS = {
    Role.EMBEDDING: "an embedding",
    Role.OPTIMIZER: "optimizer state",
    Role.OTHER: UNKNOWN,
}
Verdict = str
"""Reason to skip a tensor; empty if it may be pruned."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A rule that selects tensors."""

    name: str
    skip_reason: Callable[[ModelFile], Callable[[Tensor], Verdict]]
    summary: str
    """What it does, in a line."""


def _among_kernels(reason: Callable[[Tensor], Verdict]) -> Callable[[Tensor], Verdict]:
    """Why a tensor is skipped that is no kernel; of kernels the reason given."""
    return lambda tensor: reason(tensor) if tensor.is_prunable else _ineligible(tensor)


def _default(_: ModelFile) -> Callable[[Tensor], Verdict]:
    return _among_kernels(lambda _: "")


def _all(_: ModelFile) -> Callable[[Tensor], Verdict]:
    dead = {Role.MASK, Role.SCHEDULE, Role.OPTIMIZER}
    return lambda tensor: _ineligible(tensor) if tensor.role in dead else ""


def _skip_first_last(model: ModelFile) -> Callable[[Tensor], Verdict]:
    layers = _prunable_layers(model)
    return _all_except(dict.fromkeys(layers[:1], "the first layer") | dict.fromkeys(layers[-1:], "the last layer"))


def _skip_classifier(model: ModelFile) -> Callable[[Tensor], Verdict]:
    return _all_except(dict.fromkeys(_prunable_layers(model)[-1:], "the classifier"))


def _xnnpack(model: ModelFile) -> Callable[[Tensor], Verdict]:
    check_sparse_inference(model)
    return _among_kernels(lambda tensor: "" if is_pointwise(tensor) else "no 1x1 convolution")


def is_pointwise(tensor: Tensor) -> bool:
    """Whether it is the kernel of a convolution whose window is a single pixel."""
    axes = {tensor.out_axis, tensor.reduction_axis}
    window = [size for axis, size in enumerate(tensor.shape) if axis not in axes]
    return len(tensor.shape) == 4 and None not in axes and all(size == 1 for size in window)


def min_size(spec: str) -> Policy:
    """The policy that `min-size:N` means."""
    text = spec.removeprefix(MIN_SIZE)
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"{spec!r} is no policy", hint=f"write {MIN_SIZE}1000: smaller tensors are left alone")
    least = int(text)
    skip_reason = _among_kernels(lambda tensor: f"fewer than {least:,} weights" if tensor.size < least else "")
    return Policy(spec, lambda _: skip_reason, f"kernels of {least:,} weights and more")


def _all_except(left_out: dict[str, str]) -> Callable[[Tensor], Verdict]:
    return _among_kernels(lambda tensor: left_out.get(tensor.layer, ""))


def _prunable_layers(model: ModelFile) -> Sequence[str]:
    return list(dict.fromkeys(tensor.layer for tensor in model.tensors if tensor.is_prunable))


def non_float_reason(tensor: Tensor) -> Verdict:
    """Why a tensor that is not floating-point cannot be pruned; empty for floats."""
    name = tensor.dtype.name
    if tensor.is_float:
        return ""
    return f"quantised to {name}: prune it before" if name in QUANTISED else f"numbers of type {name}"


def _ineligible(tensor: Tensor) -> Verdict:
    """Why a tensor is not among those that are pruned by default."""
    role = tensor.role
    if role in PRUNABLE:
        return non_float_reason(tensor) or "a kernel with a single axis"
    return _ROLE_REASONS.get(role, f"a {role}")


POLICIES = (
    Policy("default", _default, "kernels; not biases, norms, embeddings"),
    Policy("all", _all, "every tensor of floating-point numbers"),
    Policy("skip-first-last", _skip_first_last, "kernels, but those of the first and the last layer"),
    Policy("skip-classifier", _skip_classifier, "kernels, but those of the last layer"),
    Policy("xnnpack", _xnnpack, "kernels of 1x1 convolutions, which XNNPACK runs faster when they are sparse"),
)
