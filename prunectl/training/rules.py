"""From what the user asks to what decides the masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from prunectl.errors import UsageError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.table import by_name
from prunectl.measuring.patterns import ZerosOf
from prunectl.pruning import plan as planning
from prunectl.pruning import request as requests
from prunectl.pruning.plan import Choice
from prunectl.pruning.schedules import Ramp, Schedule
from prunectl.pruning.selection import Mask
from prunectl.pruning.strategies import Needs
from prunectl.training.course import Course
from prunectl.training.evidence import WATCHED, Evidence
from prunectl.training.keeper import Rules
from prunectl.training.points import parse_point, usual_frequency
from prunectl.training.regrow import Regrowth
from prunectl.training.request import MaskMode, Ramping, Request

_REGROWS_UNTIL = 0.75
_RAMP_UNTIL = "75%"


def rules_of(model: ModelFile, request: Request, course: Course) -> Rules:
    """Return what decides the masks during a course."""
    asked = request.pruning
    if request.prunes:
        requests.check_shape(asked)
    wish, method = requests.wish_of(asked), requests.method_of(asked)
    evidence = WATCHED.get(asked.strategy, Evidence.NONE)
    if method.strategy.needs is not Needs.NOTHING and evidence is Evidence.NONE:
        raise UsageError(
            f"the strategy {asked.strategy} looks at a model that stands still",
            hint=f"prunectl prune --strategy {asked.strategy} --data …, and finetune keeps its zeros; "
            f"in finetune: {', '.join(WATCHED)}",
        )
    wish = replace(wish, exclude=(*wish.exclude, *request.frozen))
    choice = planning.choose(model, wish, can_reencode=by_name(model.format).is_reencoded)
    schedule = None
    if request.prunes:
        pattern = wish.pattern
        is_grouped = isinstance(pattern, ZerosOf)
        # A layer with a ratio of its own is as far on its way as the others: of the whole way if there are no others.
        final = pattern.zeros / pattern.group if isinstance(pattern, ZerosOf) else asked.sparsity
        ramping = replace(request.ramping, name=request.ramping.name or ("constant" if is_grouped else "polynomial"))
        schedule = schedule_of(ramping, 1.0 if final is None else final, course)
        if evidence is not Evidence.NONE and schedule.prunes_at(0) and schedule.sparsity_at(0) > 0:
            raise UsageError(
                f"the strategy {asked.strategy} watches training, and the schedule prunes before the first step",
                hint="let it watch for a while: --begin 10%",
            )
    growth = None
    if request.mask is MaskMode.REGROW:
        growth = Regrowth(0, int(_REGROWS_UNTIL * course.steps), _frequency(request.ramping, course.steps))
    has_others = asked.sparsity is not None or not asked.layers
    return Rules(model, choice, wish, method, schedule, evidence, growth, has_others=has_others)


def schedule_of(ramping: Ramping, final: float, course: Course) -> Schedule:
    """Return a schedule with its points in steps."""
    begin = parse_point(ramping.begin).step(course.steps, course.steps_per_epoch)
    if ramping.end:
        end: int | None = parse_point(ramping.end).step(course.steps, course.steps_per_epoch)
    else:
        # What is left afterwards is for the network to recover in.
        default = parse_point(_RAMP_UNTIL).step(course.steps, course.steps_per_epoch)
        end = None if ramping.name == "constant" else max(default, begin)
    for word, step in (("begin", begin), ("end", end or 0)):
        if step > course.steps:
            raise UsageError(
                f"the schedule would {word} at step {step}, training has {course.steps}",
                hint=f"one step is one batch; write --{word} as a share (75%) or in epochs (2ep), or train longer",
            )
    frequency = _frequency(ramping, (course.steps if end is None else end) - begin)
    return Ramp(ramping.name, final, begin, end, ramping.initial, frequency, ramping.params)


def _frequency(ramping: Ramping, steps: int) -> int:
    return ramping.frequency or usual_frequency(steps)


def zeros_of(choice: Choice, weights: dict[str, Array]) -> dict[str, Mask]:
    """Return masks of the zeros that there are; none where there are none."""
    masks = {tensor.name: np.asarray(weights[tensor.name] != 0) for tensor in choice.tensors}
    return masks if any(not mask.all() for mask in masks.values()) else {}
