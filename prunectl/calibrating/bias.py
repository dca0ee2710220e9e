"""Biases that make up for what the outputs of a layer lose on the average."""

from __future__ import annotations

import numpy as np

from prunectl.calibrating.columns import matrix
from prunectl.calibrating.moments import Sums, Wide
from prunectl.formats.base import Array, ModelFile, Role, Tensor
from prunectl.formats.writing import is_writable

_NAMES = (("pointwise_kernel", "bias"), ("kernel", "bias"), ("weight", "bias"), ("Weight", "Bias"))


def corrected(wanted: Wide, now: Wide, bias: Array) -> Array:
    """Return a bias to which is added what the outputs of its layer lose on the average."""
    return np.asarray(bias + (wanted - now).reshape(bias.shape)).astype(bias.dtype)


def means(sums: Sums, weights: Array) -> Wide:
    """Return what comes out of a layer on the average, without its bias, output by output."""
    wide = weights.astype(np.float64)
    parts = {
        use.outputs or (0, 0): np.einsum("gof,gf->go", matrix(wide, use), sums.totals[part] / sums.counts[part])
        for part, use in sums.uses.items()
    }
    return np.concatenate([parts[outputs].reshape(-1) for outputs in sorted(parts)])


def bias_of(model: ModelFile, tensor: Tensor) -> Tensor | None:
    """Return the bias that is added to what a tensor makes, if it is clear which."""
    wanted = {tensor.name.replace(*pair) for pair in _NAMES if pair[0] in tensor.name}
    layer = [one for one in model.tensors if one.layer == tensor.layer and one.is_float]
    near = [one for one in layer if one.role is Role.BIAS]
    # Beside other kernels, as of a separable convolution, a bias that is not named for it may be that of another.
    is_shared = any(one.role is Role.KERNEL and one.name != tensor.name for one in layer)
    found = [one for one in near if one.name in wanted] or ([] if is_shared and tensor.role is Role.KERNEL else near)
    return found[0] if len(found) == 1 and is_writable(found[0]) else None
