"""Roles of the arguments of PyTorch's operations (kernel, embedding, bias), and the data flow of weights to them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from prunectl.formats import budgets
from prunectl.formats.base import Role
from prunectl.formats.state_dict import StateUse

_WEIGHT, _BIAS = {"weight": (1, Role.KERNEL)}, {"bias": (2, Role.BIAS)}
_CELL = {"w_ih": (2, Role.KERNEL), "w_hh": (3, Role.RECURRENT)}
_TABLE = {"weight": (0, Role.EMBEDDING)}
_SCALED = {"weight": (2, Role.NORM), "bias": (3, Role.BIAS)}
_NORMALISED = {
    "weight": (1, Role.NORM),
    "bias": (2, Role.BIAS),
    "running_mean": (3, Role.STATE),
    "running_var": (4, Role.STATE),
}
WEIGHT_ARGUMENTS: Mapping[str, Mapping[str, tuple[int, Role]]] = {
    **{key: {**_WEIGHT, **_BIAS} for key in ("conv1d", "conv2d", "conv3d", "convolution", "_convolution")},
    **{key: {**_WEIGHT, **_BIAS} for key in ("_convolution_mode", "conv_tbc", "linear")},
    **{key: {**_WEIGHT, **_BIAS} for key in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")},
    "deform_conv2d": {**_WEIGHT, "bias": (4, Role.BIAS)},
    "bilinear": {"weight": (2, Role.KERNEL), "bias": (3, Role.BIAS)},
    **{key: {"self": (0, Role.KERNEL), "other": (1, Role.KERNEL)} for key in ("matmul", "__matmul__")},
    **{key: {"self": (0, Role.KERNEL), "mat2": (1, Role.KERNEL)} for key in ("mm", "bmm")},
    "addmm": {"self": (0, Role.BIAS), "mat1": (1, Role.KERNEL), "mat2": (2, Role.KERNEL)},
    **{key: {"batch1": (1, Role.KERNEL), "batch2": (2, Role.KERNEL)} for key in ("baddbmm", "addbmm")},
    "mv": {"self": (0, Role.KERNEL)},
    "addmv": {"self": (0, Role.BIAS), "mat": (1, Role.KERNEL)},
    "einsum": {"tensors": (1, Role.KERNEL)},
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _CELL),
    **dict.fromkeys(("embedding", "embedding_bag", "_embedding_bag"), _TABLE),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm"), _SCALED),
    "group_norm": _SCALED,
    "native_group_norm": {"weight": (1, Role.NORM), "bias": (2, Role.BIAS)},
    **dict.fromkeys(("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training"), _NORMALISED),
    "_native_multi_head_attention": {
        "qkv_weight": (5, Role.KERNEL),
        "qkv_bias": (6, Role.BIAS),
        "proj_weight": (7, Role.KERNEL),
        "proj_bias": (8, Role.BIAS),
    },
    "_transformer_encoder_layer_fwd": {
        "qkv_weight": (3, Role.KERNEL),
        "qkv_bias": (4, Role.BIAS),
        "proj_weight": (5, Role.KERNEL),
        "proj_bias": (6, Role.BIAS),
        "ffn_weight_1": (14, Role.KERNEL),
        "ffn_bias_1": (15, Role.BIAS),
        "ffn_weight_2": (16, Role.KERNEL),
        "ffn_bias_2": (17, Role.BIAS),
    },
}
"""By operation: the name, the position and the role of each argument that may be a weight."""
RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
"""Operations that take all their weights in one list."""
_COLUMNS = frozenset({("matmul", "other"), ("__matmul__", "other"), ("mm", "mat2"), ("addmm", "mat2")})
"""Arguments that are matrices of shape (in, out); every other kernel has its outputs on the first axis."""
TRANSPOSING = frozenset({"t", "transpose", "permute", "numpy_T", "T", "mT"})
PASSTHROUGH = TRANSPOSING | {
    *("view", "reshape", "contiguous", "detach", "alias", "to", "_to_copy", "clone", "unsqueeze", "squeeze", "expand"),
    *("expand_as", "flatten", "unflatten", "slice", "narrow", "select", "chunk", "split", "split_with_sizes", "unbind"),
    *("cat", "stack", "concat", "_weight_norm", "_weight_norm_interface", "lift_fresh_copy", "_unsafe_view"),
    *("type_as", "half", "float", "double", "bfloat16", "getitem", "annotate", "unchecked_cast", "_cast_Float"),
}
"""Operations whose result still counts as the weight that is their first argument."""
ARITHMETIC = frozenset({"mul", "mul_", "div", "sub", "add", "rsub", "true_divide"})
"""Operations that apply masks and scales to a weight. Their operands are kernels only if their names say so, too."""
FIRST = frozenset({"v", "self", "input", "tensors", "tensor"})
"""Names of the first argument of pass-through operations in exported programs."""


class ValueOrigin(NamedTuple):
    """A tensor of the model that a value comes from."""

    key: Hashable
    is_transposed: bool = False
    """Whether its axes were permuted on the way."""
    is_weak: bool = False
    """Whether it went through arithmetic on the way."""


Origins = frozenset[ValueOrigin]
NOTHING: Origins = frozenset()


def join_origins(groups: Iterable[Origins]) -> Origins:
    """All origins of several values; none if there are too many."""
    union: set[ValueOrigin] = set()
    for origins in groups:
        union |= origins
        if len(union) > budgets.MAX_ORIGINS:
            return NOTHING
    return frozenset(union)


def pass_through(op: str, origins: Origins) -> Origins:
    """The origins of the result of an operation, from those of its argument."""
    if op in TRANSPOSING:
        return frozenset(origin._replace(is_transposed=not origin.is_transposed) for origin in origins)
    if op in ARITHMETIC:
        return frozenset(origin._replace(is_weak=True) for origin in origins)
    return origins if op in PASSTHROUGH else NOTHING


class Flow:
    """The data flow of tensors through names, function parameters and pass-through operations to their uses."""

    def __init__(self) -> None:
        self._into: dict[Hashable, set[ValueOrigin]] = {}
        self._uses: list[tuple[ValueOrigin, StateUse]] = []

    def lead(self, origins: Origins, key: Hashable) -> None:
        """Record that a value with these origins flows into a key, such as a parameter of a function."""
        if origins:
            self._into.setdefault(key, set()).update(origins)

    def use(self, op: str, arguments: Mapping[str, Origins], *, is_transposed: bool = False) -> None:
        """Record the weights that an operation takes."""
        weight_arguments = WEIGHT_ARGUMENTS.get(op, {})
        kind = "conv_transpose" if is_transposed else op
        for argument, origins in arguments.items():
            if argument in weight_arguments:
                role = weight_arguments[argument][1]
                axis = -1 if (op, argument) in _COLUMNS else None
                self._uses += ((origin, StateUse(role, kind, axis)) for origin in origins)

    def recur(self, op: str, weights: Sequence[Origins]) -> None:
        """Record the weights of a recurrent layer."""
        self._uses += ((origin, StateUse(Role.RECURRENT, op)) for origins in weights for origin in origins)

    def resolve(self) -> dict[Hashable, StateUse]:
        """The use of each key: an embedding lookup if there is one, else the first kernel use, else the first use."""
        best: dict[tuple[Hashable, bool], StateUse] = {}
        # An embedding's lookup comes first, since the embedding may also be the output layer; then come kernels.
        order = {Role.EMBEDDING: 0, Role.KERNEL: 1, Role.RECURRENT: 1}
        todo = sorted(self._uses, key=lambda item: order.get(item[1].role, 2), reverse=True)
        while todo:
            origin, use = todo.pop()
            if (origin.key, origin.is_weak) in best or (origin.key, False) in best:
                continue
            if origin.is_transposed and use.out_axis is not None:
                use = use._replace(out_axis=None)
            best[origin.key, origin.is_weak] = use._replace(is_weak=origin.is_weak)
            for source in self._into.get(origin.key, ()):
                more = ValueOrigin(source.key, source.is_transposed, source.is_weak or origin.is_weak)
                todo.append((more, use))
        weak_first = sorted(best.items(), key=lambda item: not item[0][1])
        return {key: use for (key, _), use in weak_first}
