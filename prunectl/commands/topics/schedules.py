"""How sparsity rises while a model is trained."""

from __future__ import annotations

from prunectl.commands.topics.table import aligned, builtin


def text() -> str:
    """Return the text."""
    curves = ((choice.name, choice.line.replace("``", "")) for choice in builtin("schedules"))
    return f"""
Schedules: how sparsity rises while a model is trained

{aligned(curves)}

  --sparsity 90%          where it ends
  --initial-sparsity 50%  where it begins; else at 0
  --begin 10% --end 75%   when
  --frequency 100         steps from one turn to the next
  --schedule-param K=V    a parameter of the curve, as in power=2

A point in time is 2000 (steps; a step is one batch), 20% of all steps, or 3ep
(epochs).

  prunectl finetune model.h5 -o sparse.h5 --data train.npz -s 90% --end 60%
  prunectl plugins schedules --plot      draws the curves

prune --schedule NAME --end STEP writes tfmot's wrappers into a model of Keras
2, with the schedule inside, for a training script of your own.
"""
