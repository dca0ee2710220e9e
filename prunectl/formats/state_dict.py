"""Judge layers and roles in a state dict by the names of its tensors, after the conventions of PyTorch.

A state dict holds only names and shapes. A tensor is a kernel if its name is one that layers give their kernels; a
matrix with any other name may be a position table, a grid of anchors or a mel filter bank, and is not pruned.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from prunectl.formats.base import PARAMETRIZATION, PRUNABLE, PruningWrapper, Role, Tensor
from prunectl.formats.kernel_axes import KernelAxes, Shapes, split_name, unusual_axes

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
"""Names of module attributes that are not trained: statistics, tables, grids, bases."""
_CONSTANT_LAYERS = re.compile(
    r"(^|[./])(stft|istft|mel_?spec(trogram)?|(spectrogram|logmel)_extractor|sub_mean|add_mean|dfl[./]conv"
    r"|blur_?pool\d*|relative_attention_bias)[./]|(^|[./])cq_?t(1992|2010)(v2)?(_\d+)?[./]",
    re.IGNORECASE,
)
"""Layers with fixed weights: bases of Fourier and mel transforms, shifts by a mean, the integral of a distribution.

For the constant-Q transform, the classes of nnAudio only, also as Keras and TensorFlow write them, `cq_t2010v2_1`."""
_CONSTANT_BEGINS = re.compile(
    r"i?stft|mel_?spec|spectrogram|logmel|sub_mean|add_mean|dfl|blur_?pool|relative_attention_bias|cq_?t", re.IGNORECASE
)
"""Start of the names of such layers."""
_LAYER_KERNELS = frozenset(
    {
        *("weight", "weight_ih", "weight_hh", "weight_bar", "in_proj_weight", "q_proj_weight", "k_proj_weight"),
        *("v_proj_weight", "out_proj_weight", "fc1_weight", "fc2_weight", "lora_A", "lora_B", "lora_down", "lora_up"),
    }
)
"""Names of kernels in layers of PyTorch and of widely used libraries."""
_RECURRENT = re.compile(r"weight_(ih|hh|hr)_l\d+(_reverse)?")
_EXPERTS = re.compile(r"(^|[./])\w*experts?([./]|$)")
_EXPERT_KERNELS = frozenset(
    {"gate_up_proj", "down_proj", "gate_proj", "up_proj", "w1", "w2", "w3", "wi", "wo", "wi_0", "wi_1", "v1"}
)
"""Names of the stacks of matrices in mixtures of experts."""
_STACK, _STACK_RANK = "input_linear.weight", 3
_MIXTURE = re.compile(rf"(?<![^./])experts?[./]|(?<![^./]){re.escape(_STACK)}$")
"""The experts of a layer, which lie beside its router; GraniteMoe and JetMoe have two stacks instead."""
_MAX_MIXTURES = 4
"""Matches in one name: JetMoe's attention has stacks and a router inside a module that is named `experts`."""
_ROUTER = re.compile(
    r"(?<![^./])(gate|router|shared_expert_gate)([./](layer|wg|classifier|proj|gate|linear))?[./](weight|kernel)$"
)
_NORMS = re.compile(
    r"(\w*_)?(layer|batch|group|rms|instance)?_?norm_?\d*|ln_?(\d+|f|pre|post|final|attn|mlp|in|out)?|bn_?\d*"
)
_MAGNITUDES = re.compile(r"(^|[./])lora_magnitude_vector[./]")
_WEIGHT_AND_BIAS = tuple(
    (weight, bias, re.compile(rf"(.*_)?{weight}(_?\d+)?"))
    for weight, bias in (("weight", "bias"), ("kernel", "bias"), ("W", "b"), ("w", "b"))
)
_MAX_RANK = 5
"""The rank of the kernel of a 3D convolution."""


def is_constant(name: str, layer: str = "") -> bool:
    """Whether a name is that of a table, a statistic or a fixed basis, which no policy prunes.

    A converter may rename the tensor, but not the layers that use it: `layer` lists these, separated by semicolons.
    """
    parts = (name.replace("/", ".") if "/" in name else name).split(".")
    if parts[-1] in _CONSTANTS or (any(map(_may_be_constant, parts)) and _CONSTANT_LAYERS.search(name)):
        return True
    return bool(layer) and all(_CONSTANT_LAYERS.search(f"{part}/") for part in layer.split(";"))


@lru_cache(maxsize=4096)
def _may_be_constant(part: str) -> bool:
    """Whether a part of a name may be a layer with fixed weights; cached, because names share most of their parts."""
    return _CONSTANT_BEGINS.match(part) is not None


def is_kernel(tensor: Tensor, shapes: Shapes, *, is_flax: bool) -> bool:
    """Whether a tensor is the kernel of a layer, judged by the names and shapes of a model."""
    if not 2 <= len(tensor.shape) <= _MAX_RANK:
        return False
    prefix, leaf = split_name(tensor.name, shapes)
    if leaf in {"weight_v", "weight_v_orig"}:
        # The directions of weight_norm; spectral_norm has a vector of this name, without a weight_g.
        return f"{prefix}weight_g" in shapes
    plain = leaf.removesuffix("_orig")
    if plain in _LAYER_KERNELS or _RECURRENT.fullmatch(plain):
        return not _is_norm(tensor, prefix, shapes) and _MAGNITUDES.search(tensor.name) is None
    if _EXPERTS.search(prefix) and plain in _EXPERT_KERNELS:
        return True
    return _has_bias(prefix, plain, tensor.shape, shapes) or (is_flax and plain == "kernel")


def has_own_norm(name: str, names: Collection[str]) -> bool:
    """Whether weight_norm stores the norms of this tensor's rows apart: pruning then scales up a row's other values."""
    norms = f"{name[:-1]}g" if name.endswith("weight_v") else f"{name.removesuffix('1')}0"
    return name.endswith(("weight_v", ".original1")) and norms in names


def may_change_zeros(name: str, names: Collection[str]) -> bool:
    """Whether an unknown parametrization computes the weight from this tensor; spectral_norm and masks keep zeros."""
    before = name.removesuffix("original")
    known = (f"{before}{number}.{part}" for number in range(_MAX_PARAMETRIZATIONS) for part in ("_u", "_v", "mask"))
    is_parametrized = name.endswith(".original") and ".parametrizations." in f".{name}"
    return is_parametrized and not any(part in names for part in known)


_MAX_PARAMETRIZATIONS = 4
"""Successive parametrizations of one weight that are searched for."""


def _is_norm(tensor: Tensor, prefix: str, shapes: Shapes) -> bool:
    """Whether a tensor is the scale of a norm: by its layer's name, or, with several axes, a bias of the same shape."""
    if shapes.get(f"{prefix}bias") == tensor.shape:
        return True
    is_window = len(tensor.shape) > 3 and tensor.shape[0] > 1
    layer = prefix.rstrip("./")
    return not is_window and _NORMS.fullmatch(layer, max(layer.rfind("."), layer.rfind("/")) + 1) is not None


def _has_bias(prefix: str, leaf: str, shape: tuple[int, ...], shapes: Shapes) -> bool:
    """Whether there is a bias of matching length under the name that belongs to this weight's name."""
    for weight, bias, pattern in _WEIGHT_AND_BIAS:
        if weight not in leaf or not pattern.fullmatch(leaf):
            continue
        head, _, tail = leaf.rpartition(weight)
        if shapes.get(f"{prefix}{head}{bias}{tail}") in {(shape[0],), (shape[-1],)}:
            return True
    return False


OPTIMIZER_ROOTS = frozenset(
    {"optimizer", "optimizers", "optimizer_state", "optimizer_state_dict", "optimizer_states", "optim"}
)
TRAINING_ROOTS = frozenset(
    {
        *("callbacks", "loops", "lr_scheduler", "lr_schedulers", "scheduler", "schedulers", "scaler", "grad_scaler"),
        *("scheduler_state_dict", "scaler_state_dict", "amp", "rng_state", "rng_states", "cuda_rng_state", "lr_sched"),
    }
)
"""Entries of a checkpoint that, like the optimizer, are only needed to resume training."""
MODEL_ROOTS = frozenset(
    {
        *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params"),
        *("ema", "ema_state_dict", "model_ema", "state_dict_ema", "ema_model", "model_dict", "net_state_dict"),
    }
)
"""Entries of a checkpoint that contain the model; they are not part of its layers' names."""
GRADIENT_LEAVES = (".grad", ".main_grad")
"""Suffixes of a gradient's name, after the name of its weight."""
AVERAGES = frozenset(
    {
        *("ema", "ema_state_dict", "model_ema", "state_dict_ema", "ema_model", "ema_state", "model_state_dict_ema"),
        *("swa_model", "averaged_model"),
    }
)
"""Entries of a checkpoint that contain averages of the weights."""
_EMBEDDING_PARTS = ("embed", "emb.", "wte", "wpe", "lookup")
_TABLE = re.compile(r"tokens?|query_feat|queries_features|reference_points")
"""Layers that are embedding tables: of tokens, or of the queries of detectors."""
_LEARNED_TOKENS = re.compile(r"(?!to_)\w+_tokens?")
"""Learned tokens, such as `iou_token` of SAM; `to_tokens` is a layer that computes tokens."""
_MAX_TOKENS = 16
_NOT_EMBEDDING = re.compile(r"proj|linear|conv|dense|mapping|(^|_)fc|^embed_out$")
"""Layers that multiply, although a module around them is named an embedding: `patch_embeddings.projection`."""
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
"""An output layer, whose weight is the embedding too where a file has no token embedding."""
_FIRST_BLOCK = re.compile(r"([^.\d][^.]*\.)*(h|layers?|blocks?)\.0\.")
"""A tensor of the first block; experts are numbered too, but only inside a block, whose number does not match here."""
_NOT_TOKENS = re.compile(r"wpe|pos|type")
"""Embeddings of positions and of segments, which are never tied to an output layer."""
_NORM_PARTS = ("norm", "bn", "ln_", ".ln")
_NORM_KINDS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm", "SyncBatchNorm")
_EMBEDDING_KINDS = ("Embedding", "embedding")
_KERNEL_KINDS = (
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose", "Linear", "Bilinear", "NonDynamicallyQuantizableLinear"),
    *("LSTM", "GRU", "RNN", "MultiheadAttention"),
)
_TRANSPOSED_KINDS = ("ConvTranspose", "LazyConvTranspose", "conv_transpose")


class StateUse(NamedTuple):
    """The use of a tensor in a graph or in TorchScript code."""

    role: Role
    kind: str
    """The operation."""
    out_axis: int | None = None
    """The output axis, where it is not the usual one of this kind of layer."""
    is_weak: bool = False
    """Whether other operations precede the use, such as a product with a mask: then its name must confirm the role."""


@dataclass(frozen=True, slots=True)
class _Names:
    """The context that decides a tensor's role: the names of all tensors, and the entries of the checkpoint."""

    all: frozenset[str]
    training: frozenset[str]
    model: str
    shapes: Mapping[str, tuple[int, ...]]
    axes: Mapping[str, KernelAxes]
    uses: Mapping[str, StateUse | None]
    is_flax: bool
    """Whether no tensor is named weight, as in models of Flax, whose kernels are named kernel."""
    mixtures: frozenset[str]
    """Name prefixes that the experts of a layer share with its router."""

    def has_beside(self, prefix: str, leaf: str) -> bool:
        return (f"{prefix}.{leaf}" if prefix else leaf) in self.all


def describe(
    tensors: Iterable[Tensor],
    sections: frozenset[str] = frozenset(),
    uses: Mapping[str, StateUse | None] | None = None,
) -> tuple[Tensor, ...]:
    """The tensors with their layers, roles and axes, judged by their names.

    A tensor that has the role STATE already, because of the file's content, keeps it unless it is a mask.
    The sections are the entries of a checkpoint that contain further entries, such as `state_dict`.
    Uses in a graph, if given, decide which tensors are kernels; a tensor that is not among them is judged by its name.
    """
    tensors = tuple(tensors)
    training = OPTIMIZER_ROOTS | {section for section in sections if _is_for_training(section, sections)}
    models = {tensor.name.split(".", 1)[0] for tensor in tensors} & MODEL_ROOTS & sections
    # With two models in one checkpoint, only the whole names distinguish their layers.
    model = f"{models.pop()}." if len(models) == 1 else ""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    is_flax = not any(name.endswith(".weight") for name in shapes)
    axes = unusual_axes(shapes, is_flax=is_flax)
    mixtures = frozenset(
        name[: match.start()]
        for name in shapes
        for match in islice(_MIXTURE.finditer(name), _MAX_MIXTURES)
        if match[0] != _STACK or len(shapes[name]) == _STACK_RANK
    )
    names = _Names(frozenset(shapes), training, model, shapes, axes, uses or {}, is_flax, mixtures)
    described = [_describe(tensor, names) for tensor in tensors]
    return _averages_as_their_originals(_tied_heads_as_embeddings(described, names))


def _tied_heads_as_embeddings(described: list[Tensor], names: _Names) -> list[Tensor]:
    """A file may store tied weights under the name of the output layer only: then the output layer is the embedding."""
    heads = [index for index, t in enumerate(described) if _HEAD.search(t.name) and _may_be_table(t, names)]
    if not heads or any(t.role is Role.EMBEDDING and not _NOT_TOKENS.search(t.name) for t in described):
        return described
    # A single later shard, without the first block, does not show whether the model has an embedding.
    if any(_FIRST_BLOCK.match(tensor.name) for tensor in described):
        for index in heads:
            described[index] = replace(described[index], role=Role.EMBEDDING, out_axis=None)
    return described


def _may_be_table(head: Tensor, names: _Names) -> bool:
    """Whether an output layer is a kernel by its name only, not by a class or a graph, and without a bias."""
    is_by_name = head.role is Role.KERNEL and not head.kind and head.name not in names.uses
    return is_by_name and not _has_bias_of_rows(head, "weight", names)


_DOTLESS = re.compile(rf"(^|\.)({'|'.join(sorted(AVERAGES))})\.[^.]+$")
_MAX_ENTRIES = 3
"""Leading parts of a weight's name that the name of its average may lack."""


def _averages_as_their_originals(described: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Give averages whose names lack the dots, as in Stable Diffusion, the roles of the weights that they average."""
    dotless = {t.name for t in described if t.role is Role.OTHER and t.shape and _DOTLESS.search(t.name)}
    parts = [(tensor, tensor.name.split(".")) for tensor in described if dotless and tensor.name not in dotless]
    originals = {("".join(names[skip:]), t.shape): t for t, names in parts for skip in range(_MAX_ENTRIES)}

    def like_original(tensor: Tensor) -> Tensor:
        weight = originals.get((tensor.name.rpartition(".")[2], tensor.shape)) if tensor.name in dotless else None
        if weight is None:
            return tensor
        return replace(tensor, role=weight.role, kind=weight.kind, out_axis=weight.out_axis, in_axis=weight.in_axis)

    return tuple(map(like_original, described))


def _is_for_training(section: str, sections: frozenset[str]) -> bool:
    # A bare optimizer state is {"state": ..., "param_groups": ...}.
    is_bare = section == "state" and "param_groups" in sections
    return is_bare or section in TRAINING_ROOTS or "optim" in section.lower()


def wrappers(tensors: Iterable[Tensor]) -> tuple[PruningWrapper, ...]:
    """The wrappers found by names; where a layer has a pruning wrapper, its other parametrizations are left out."""
    candidates = []
    names = {tensor.name: tensor for tensor in tensors}
    for name, tensor in names.items():
        if ".parametrizations." in f".{name}":
            is_mask = name.endswith(".mask")
            candidates.append(PruningWrapper("torch.ao.pruning" if is_mask else PARAMETRIZATION, tensor.layer))
        elif name.endswith("_mask"):
            owner, _, leaf = name.rpartition(".")
            plain = leaf.removesuffix("_mask")
            if f"{name.removesuffix('_mask')}_orig" in names:
                candidates.append(PruningWrapper("torch.nn.utils.prune", tensor.layer))
            elif f"{owner}.module.{plain}" in names:
                candidates.append(PruningWrapper("nni", tensor.layer))
    pruning = {wrapper.layer for wrapper in candidates if wrapper.kind != "parametrization"}
    unique = dict.fromkeys(candidates)
    return tuple(wrapper for wrapper in unique if wrapper.kind != "parametrization" or wrapper.layer not in pruning)


def _describe(tensor: Tensor, names: _Names) -> Tensor:
    layer, _, leaf = tensor.name.rpartition(".")
    if ".parametrizations." in f".{tensor.name}":
        # conv.parametrizations.weight.original is the weight of conv, and ….weight.0.mask is its mask.
        layer, _, rest = f".{tensor.name}".partition(".parametrizations.")
        layer, leaf = layer.removeprefix("."), rest.split(".")[0]
        if rest.endswith("mask"):
            return replace(tensor, layer=layer.removeprefix(names.model), role=Role.MASK)
    role = _role(tensor, layer, leaf, names)
    layer = layer.removeprefix(names.model) if layer != names.model.rstrip(".") else layer
    use = names.uses.get(tensor.name)
    kind = tensor.kind or (use.kind if use is not None else "")
    out_axis, in_axis = _axes(tensor, kind, role, use, names)
    # Twice as fast as `replace`, because a model may have a hundred thousand tensors.
    axes = out_axis, in_axis, tensor.start, tensor.strides
    return Tensor(tensor.name, layer, tensor.shape, tensor.dtype, role, tensor.storage, kind, *axes)


def _axes(
    tensor: Tensor, kind: str, role: Role, use: StateUse | None, names: _Names
) -> KernelAxes | tuple[int | None, int | None]:
    if role not in PRUNABLE | {Role.ROUTER} or len(tensor.shape) < 2:
        return None, tensor.in_axis
    if use is not None and use.out_axis is not None:
        return use.out_axis % len(tensor.shape), tensor.in_axis
    if tensor.name in names.axes:
        return names.axes[tensor.name]
    is_transposed = kind.startswith(_TRANSPOSED_KINDS) or (use is not None and use.kind == "conv_transpose")
    return 1 if is_transposed else 0, tensor.in_axis


def _role(tensor: Tensor, layer: str, leaf: str, names: _Names) -> Role:
    if tensor.name.split(".", 1)[0] in names.training:
        return Role.OPTIMIZER
    if leaf.endswith("_mask") and _is_masked(layer, leaf.removesuffix("_mask"), names):
        return Role.MASK
    if tensor.role == Role.STATE or is_constant(tensor.name):
        return Role.STATE
    plain = leaf.removesuffix("_orig")
    if len(tensor.shape) <= 1:
        is_norm = names.has_beside(layer, "running_mean") or any(part in layer.lower() for part in _NORM_PARTS)
        if is_norm or tensor.kind.startswith(_NORM_KINDS):
            return Role.NORM
    if plain.startswith("bias") or plain.endswith("bias"):
        return Role.BIAS
    if not tensor.is_float:
        return Role.OTHER
    return _role_of_numbers(tensor, plain, names)


def _is_masked(layer: str, plain: str, names: _Names) -> bool:
    return names.has_beside(layer, f"{plain}_orig") or names.has_beside(layer, f"module.{plain}")


def _role_of_numbers(tensor: Tensor, leaf: str, names: _Names) -> Role:
    if len(tensor.shape) < 2:
        use = names.uses.get(tensor.name)
        if use is not None and use.role is not Role.EMBEDDING:
            return Role.BIAS if use.role in PRUNABLE else use.role
        return Role.NORM if leaf == "weight" else Role.OTHER
    if _is_embedding(tensor, leaf, names):
        return Role.EMBEDDING
    if not _is_used_as_kernel(tensor, names):
        return Role.OTHER
    if names.mixtures and (router := _ROUTER.search(tensor.name)) and tensor.name[: router.start()] in names.mixtures:
        return Role.ROUTER
    return Role.RECURRENT if leaf.startswith("weight_hh") else Role.KERNEL


def _is_embedding(tensor: Tensor, leaf: str, names: _Names) -> bool:
    """Whether a tensor is an embedding: by its graph or its class, else by its name; a `weight` must be a matrix."""
    use = names.uses.get(tensor.name)
    if tensor.kind.startswith(_EMBEDDING_KINDS) or (use is not None and use.role is Role.EMBEDDING):
        return True
    if tensor.kind.startswith(_KERNEL_KINDS) or (use is not None and use.role in PRUNABLE and not use.is_weak):
        return False
    lowered = tensor.name.lower()
    is_weight = leaf.startswith(("weight", "kernel"))
    # Indices in a list of modules are skipped, as in `altup_unembed_projections.0`.
    layer = next((part for part in reversed(lowered.split(".")[:-1]) if not part.isdecimal()), "")
    if is_weight and (len(tensor.shape) != 2 or leaf == "kernel" or _NOT_EMBEDDING.search(layer)):
        return False
    if is_weight and _has_bias_of_rows(tensor, leaf, names):
        return False
    # In T5, BART and similar models, `shared` is the embedding of the encoder and the decoder.
    is_table = layer == "shared" or _TABLE.fullmatch(layer) is not None or _is_codes_or_tokens(tensor, layer, lowered)
    return (is_weight and is_table) or any(part in lowered for part in _EMBEDDING_PARTS)


def _is_codes_or_tokens(tensor: Tensor, layer: str, lowered: str) -> bool:
    """Whether it is the codebook of a quantizer, or a few learned tokens."""
    if layer == "codebook":
        return "quantiz" in lowered
    return tensor.shape[0] <= _MAX_TOKENS and _LEARNED_TOKENS.fullmatch(layer) is not None


def _has_bias_of_rows(tensor: Tensor, leaf: str, names: _Names) -> bool:
    """Whether a tensor has a bias as long as its first axis, as linear layers do."""
    prefix, _ = split_name(tensor.name, names.shapes)
    return names.shapes.get(f"{prefix}{leaf.replace('weight', 'bias')}") == tensor.shape[:1]


def _is_used_as_kernel(tensor: Tensor, names: _Names) -> bool:
    """Whether a tensor is a kernel: by its use in the graph, else by its name; never by its rank alone."""
    if tensor.name not in names.uses:
        return is_kernel(tensor, names.shapes, is_flax=names.is_flax)
    use = names.uses[tensor.name]
    if use is not None and use.role in PRUNABLE and not use.is_weak:
        return True
    if use is None and not tensor.kind.startswith(_KERNEL_KINDS):
        # No product uses it, and it is not in a layer of PyTorch, whose code a trace may leave out.
        return False
    return (use is None or use.role in PRUNABLE) and is_kernel(tensor, names.shapes, is_flax=names.is_flax)
