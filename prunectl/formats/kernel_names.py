"""Which names are a layer's kernel, and which a constant's? For state dicts, which hold nothing but names and shapes.

A kernel is what its layer calls so; a tensor of two axes with any other name may be a position table, a grid of anchors
or a mel filter bank, and is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from prunectl.formats.base import Tensor

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of all tensors of a model, by their names."""

_CONSTANTS = frozenset(
    {
        *("running_mean", "running_var", "num_batches_tracked"),
        *("position_ids", "relative_position_index", "relative_coords_table", "attn_mask", "causal_mask"),
        *("inv_freq", "freqs", "freqs_cis", "freqs_cos", "freqs_sin", "cos_cached", "sin_cached", "rope"),
        *("anchors", "anchor_grid", "grid", "grids", "strides", "stride", "priors", "prior_boxes"),
        *("mel", "mel_filters", "mel_basis", "mel_fb", "melW", "mel_filterbank", "fb", "filterbank", "dct_mat"),
        *("window", "hann_window", "fourier", "fourier_basis", "forward_basis", "inverse_basis"),
        *("forward_basis_buffer", "inverse_basis_buffer", "dft", "idft", "window_sum", "wsin", "wcos"),
        *("cqt_kernels_real", "cqt_kernels_imag", "lowpass_filter", "early_downsample_filter"),
        *("sinusoidal", "sinusoid", "pe", "pos_table", "position_table", "sinusoid_table"),
        *("mean", "std", "pixel_mean", "pixel_std", "input_mean", "input_std", "image_mean", "image_std", "img_mean"),
        *("img_std", "mean_buf", "std_buf", "norm_mean", "norm_std", "rgb_mean", "rgb_std"),
    }
)
"""What attributes of modules are called that training does not learn: statistics, tables, grids, bases."""
_CONSTANT_LAYERS = re.compile(
    r"(^|[./])(stft|istft|mel_?spec(trogram)?|(spectrogram|logmel)_extractor|sub_mean|add_mean|dfl[./]conv"
    r"|blur_?pool\d*|relative_attention_bias)[./]|(^|[./])cq_?t(1992|2010)(v2)?(_\d+)?[./]",
    re.IGNORECASE,
)
"""Layers of fixed weights: bases of Fourier and mel transforms, shifts by a mean, the integral of a distribution.

Of the constant-Q transform only the classes of nnAudio, also as Keras and TensorFlow write them, `cq_t2010v2_1`."""
_LAYER_KERNELS = frozenset(
    {
        *("weight", "weight_ih", "weight_hh", "weight_bar", "in_proj_weight", "q_proj_weight", "k_proj_weight"),
        *("v_proj_weight", "out_proj_weight", "fc1_weight", "fc2_weight", "lora_A", "lora_B", "lora_down", "lora_up"),
    }
)
"""What layers of PyTorch and of its best known libraries call their kernels."""
_RECURRENT = re.compile(r"weight_(ih|hh|hr)_l\d+(_reverse)?")
_EXPERTS = re.compile(r"(^|[./])\w*experts?([./]|$)")
_EXPERT_KERNELS = frozenset(
    {"gate_up_proj", "down_proj", "gate_proj", "up_proj", "w1", "w2", "w3", "wi", "wo", "wi_0", "wi_1", "v1"}
)
"""What mixtures of experts call their stacks of matrices."""
_NORMS = re.compile(
    r"(^|[./])(\w*_)?(layer|batch|group|rms|instance)?_?norm_?\d*$|(^|[./])(ln_?(\d+|f|pre|post|final|attn|mlp|in|out)?|bn_?\d*)$"
)
_MAGNITUDES = re.compile(r"(^|[./])lora_magnitude_vector[./]")
_SWITCHED = (("weight", "bias"), ("kernel", "bias"), ("W", "b"), ("w", "b"))
_MAX_RANK = 5
"""That of a convolution over three axes."""


def is_constant(name: str, layer: str = "") -> bool:
    """Whether a name is that of a table, a statistic or a fixed basis, which no policy prunes.

    A converter may have renamed the tensor, but not the operations that take it, with semicolons between them.
    """
    leaf = re.split(r"[./]", name)[-1]
    if leaf in _CONSTANTS or _CONSTANT_LAYERS.search(name):
        return True
    return all(_CONSTANT_LAYERS.search(f"{part}/") for part in layer.split(";"))


def is_kernel(tensor: Tensor, shapes: Shapes) -> bool:
    """Whether the names and shapes say that a layer multiplies by a tensor."""
    if not 2 <= len(tensor.shape) <= _MAX_RANK or is_constant(tensor.name):
        return False
    prefix, leaf = _parted(tensor.name, shapes)
    if leaf in {"weight_v", "weight_v_orig"}:
        # Of weight_norm; spectral_norm has a vector of this name.
        return f"{prefix}weight_g" in shapes
    plain = leaf.removesuffix("_orig")
    if plain in _LAYER_KERNELS or _RECURRENT.fullmatch(plain):
        return not _is_norm(tensor, prefix, shapes) and _MAGNITUDES.search(tensor.name) is None
    if _EXPERTS.search(prefix) and plain in _EXPERT_KERNELS:
        return True
    return _has_bias(prefix, plain, tensor.shape, shapes) or _is_of_flax(plain, shapes)


def _parted(name: str, shapes: Shapes) -> tuple[str, str]:
    """Return the layer with its dot, and the name in it: the weight itself for what a parametrization keeps."""
    inside = ".parametrizations."
    if inside in f".{name}":
        before, _, rest = f".{name}".partition(inside)
        leaf, _, part = rest.partition(".")
        # weight_norm keeps the lengths as original0, and what is multiplied by them as original1.
        is_weight = part == "original" or (part == "original1" and f"{name.removesuffix('1')}0" in shapes)
        return f"{before.removeprefix('.')}." if before else "", leaf if is_weight else f"{leaf} {part}"
    at = max(name.rfind("."), name.rfind("/")) + 1
    return name[:at], name[at:]


def _is_norm(tensor: Tensor, prefix: str, shapes: Shapes) -> bool:
    """Whether it scales what it stands beside: a norm over several axes has a bias of the same shape."""
    if shapes.get(f"{prefix}bias") == tensor.shape:
        return True
    is_window = len(tensor.shape) > 3 and tensor.shape[0] > 1
    return not is_window and _NORMS.search(prefix.rstrip("./")) is not None


def _has_bias(prefix: str, leaf: str, shape: tuple[int, ...], shapes: Shapes) -> bool:
    """Whether a vector of as many outputs has the name that the bias of such a weight would have."""
    for weight, bias in _SWITCHED:
        if not re.fullmatch(rf"(.*_)?{weight}(_?\d+)?", leaf):
            continue
        head, _, tail = leaf.rpartition(weight)
        if shapes.get(f"{prefix}{head}{bias}{tail}") in {(shape[0],), (shape[-1],)}:
            return True
    return False


def _is_of_flax(leaf: str, shapes: Shapes) -> bool:
    """Whether it is called kernel in a model of Flax, where nothing is called weight."""
    return leaf == "kernel" and not any(name.endswith(".weight") for name in shapes)
