"""Is more of a metric better, or less? Told by a table of names that are known, and by nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable

_UP = """
accuracy acc binary_accuracy categorical_accuracy sparse_categorical_accuracy top_k_categorical_accuracy
sparse_top_k_categorical_accuracy auc precision recall precision_at_recall recall_at_precision
sensitivity_at_specificity specificity_at_sensitivity true_positives true_negatives f1 f1_score fbeta_score
iou binary_iou one_hot_iou mean_iou one_hot_mean_iou cosine_similarity r2 r2_score pearson_correlation
concordance_correlation
"""
_DOWN = """
loss mae mean_absolute_error mse mean_squared_error rmse root_mean_squared_error mape mean_absolute_percentage_error
msle mean_squared_logarithmic_error mean_relative_error logcosh log_cosh log_cosh_error huber huber_loss
hinge squared_hinge categorical_hinge kl kld kl_divergence kullback_leibler_divergence poisson nll
ce cross_entropy crossentropy bce binary_crossentropy categorical_crossentropy sparse_categorical_crossentropy
binary_focal_crossentropy categorical_focal_crossentropy categorical_generalized_cross_entropy ctc circle
false_positives false_negatives
"""
_TOP = re.compile(r"top\d+(?:accuracy)?")
_COUNTED = re.compile(r"_\d+$")
"""What Keras adds to a name that it has given before."""


def _plain(name: str) -> str:
    """Return a name as the table has it: `MeanIoU`, `mean_io_u` and `mean-iou` are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


_KNOWN = {**{_plain(name): True for name in _UP.split()}, **{_plain(name): False for name in _DOWN.split()}}


def is_up(name: str, outputs: Iterable[str] = ()) -> bool | None:
    """Return whether more of a metric is better; None if nobody knows. Keras puts an output's name before it."""
    word = name.rpartition(":")[2].removeprefix("val_")
    for one in (word, *(word[len(output) + 1 :] for output in outputs if word.startswith(f"{output}_"))):
        for plain in (_plain(one), _plain(_COUNTED.sub("", one))):
            if plain in _KNOWN:
                return _KNOWN[plain]
            if _TOP.fullmatch(plain):
                return True
    return None
