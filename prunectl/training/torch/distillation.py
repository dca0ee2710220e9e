"""How far outputs are from a teacher's (Hinton et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from prunectl.errors import UsageError
from prunectl.training.torch.losses import Chosen


def distilled(
    losses: Sequence[Chosen], outs: Sequence[torch.Tensor], guides: Sequence[torch.Tensor], temperature: float
) -> torch.Tensor:
    """Return the divergence of classes at a temperature, or the squared distance of numbers.

    The teacher's outputs come as the model's own would: as probabilities where it ends in them.
    """
    parts = []
    for chosen, out, guide in zip(losses, outs, guides, strict=False):
        if out.shape != guide.shape:
            raise UsageError(f"the teacher gives {tuple(guide.shape)}, the model {tuple(out.shape)}")
        if chosen.classifies:
            student = functional.log_softmax(chosen.logits(out.float()) / temperature, 1)
            teacher = functional.log_softmax(chosen.logits(guide) / temperature, 1)
            divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
            parts.append(divergence * temperature**2)
        else:
            parts.append(functional.mse_loss(out.float(), guide))
    return torch.stack(parts).sum()
