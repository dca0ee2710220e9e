"""What is asked of a cut: how many channels, by which measure, and what must be left."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from prunectl.channels.importance import MEASURES, RANDOM, Importance, RequiredData, Scores, channel_rows
from prunectl.channels.labels import AxisRole
from prunectl.errors import PrunectlError, UsageError, WorkError
from prunectl.formats.base import Array
from prunectl.plugins import find, installed
from prunectl.pruning.choices import Choice
from prunectl.pruning.plan import Scope
from prunectl.pruning.plugin_adapters import bind_params
from prunectl.pruning.request import BATCH_SIZE, SAMPLES, PruneRequest

_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


class TargetKind(StrEnum):
    """What is counted."""

    PARAMS = "parameters"
    FLOPS = "FLOPs"
    GZIP = "gzipped bytes"


@dataclass(frozen=True, slots=True)
class SizeTarget:
    """How much of something may be left: a number, or a share of what there was."""

    what: TargetKind
    number: int = 0
    share: float | None = None

    def limit(self, before: int) -> int:
        """Return how much may be left."""
        return self.number if self.share is None else int(self.share * before)


def parse_target(what: TargetKind, text: str) -> SizeTarget:
    """Return what `-50%`, `1.5M` or `200000` ask for."""
    found = re.fullmatch(r"-(\d+(?:\.\d+)?)%", text.strip())
    if found is not None and float(found[1]) <= 100:
        return SizeTarget(what, share=1 - float(found[1]) / 100)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)", text.strip().lower())
    if found is None:
        raise UsageError(f"{text!r} is no number of {what}", hint="write -50% for half of it, or how many: 1.5M")
    return SizeTarget(what, number=int(float(found[1]) * _POWERS[found[2]]))


def smallest_ratio(goal: SizeTarget, before: int, channels: int, left: Callable[[float], int], tries: int) -> float:
    """Return the smallest share of so many channels that reaches a goal, as far as so many tries can tell."""
    limit = goal.limit(before)
    if before <= limit:
        return 0.0
    reached = left(1.0)
    if reached > limit:
        raise WorkError(
            f"{limit:,} {goal.what} are out of reach: without all channels that may go, {reached:,} are left",
            hint="let smaller layers stay: --min-channels 1; or see what is locked: prunectl inspect MODEL --groups",
        )
    low, high = 0, channels
    while high - low > 1 and tries:
        middle = (low + high) // 2
        if left(middle / channels) <= limit:
            high = middle
        else:
            low = middle
        tries -= 1
    return high / channels


KIND = "channel strategy"
"""What `plugins.find` calls them; their entry points are `prunectl.channels`."""


def importance_from_function(found: object, name: str, params: tuple[str, ...]) -> Importance:
    """Return a measure made of a function from rows of weights, one for each channel, to a number for each."""
    if not callable(found):
        raise UsageError(f"{name} is not a function from rows of weights to scores")
    function: Callable[..., Any] = found
    words = bind_params(params, function)

    def of(weights: Array, axis: int) -> Scores:
        rows = channel_rows(weights, axis)
        try:
            given = np.asarray(function(rows.copy(), **words), np.float64)
        except PrunectlError:
            raise
        except Exception as error:
            raise WorkError(f"{name} fails: {type(error).__name__}: {error}") from error
        if given.shape != (len(rows),) or not np.isfinite(given).all():
            raise WorkError(
                f"{name} must give a finite number for each of {len(rows)} channels, and gave {given.shape}",
                hint="it gets an array with a row of weights for each channel",
            )
        return given

    return Importance(name, frozenset({AxisRole.OUT}), of, inspect.getdoc(function) or "")


MIN_CHANNELS = 2
_DEFAULT = "magnitude"
"""What `prune` takes if no strategy is named: for channels, their norm."""


@dataclass(frozen=True, slots=True)
class ChannelConfig:
    """Every choice that decides which channels go."""

    ratio: float
    """Share of the channels that can go."""
    measure: Importance | None
    """None for chance."""
    scope: Scope = Scope.LAYER
    only: str = ""
    exclude: tuple[str, ...] = ()
    layers: tuple[tuple[str, float], ...] = ()
    min_channels: int = MIN_CHANNELS
    """How many of a family stay at least."""
    round_to: int = 1
    """What the number of those that stay is a multiple of."""
    max_ratio: float = 1.0
    """Share of a family that goes at most."""
    seed: int = 0
    threshold: float | None = None
    """How much like another a channel is that goes."""
    goal: SizeTarget | None = None
    """What the ratio is to be found for."""
    is_dead: bool = False
    """Whether only channels go that make no difference."""

    @property
    def is_nothing(self) -> bool:
        """Whether it was said that no channel goes."""
        is_told = self.goal is not None or self.is_dead or self.threshold is not None
        return not is_told and not self.ratio and not any(ratio for _, ratio in self.layers)


def parse_config(
    request: PruneRequest,
    *,
    min_channels: int = MIN_CHANNELS,
    round_to: int = 1,
    max_ratio: float = 1.0,
    params: str = "",
    flops: str = "",
    dead: bool = False,
) -> ChannelConfig:
    """Return what a request asks of channels, and refuse what it asks of single weights only."""
    _check(request)
    goals = [
        parse_target(what, text) for what, text in ((TargetKind.PARAMS, params), (TargetKind.FLOPS, flops)) if text
    ]
    if request.target_gzip is not None:
        goals.append(SizeTarget(TargetKind.GZIP, request.target_gzip))
    measure, threshold = _measure(request)
    _check_amount(request, goals, dead=dead, has_threshold=threshold is not None)
    for ratio in (request.sparsity or 0.0, max_ratio, *(own for _, own in request.layers)):
        if not 0 <= ratio <= 1:
            raise UsageError(f"a share of channels is from 0 to 1, not {ratio:g}", hint="write 0.5 or 50%")
    for option, number in (("--min-channels", min_channels), ("--round-to", round_to)):
        if number < 1:
            raise UsageError(f"{option} is at least 1")
    scope = Scope(request.scope)
    if scope is Scope.ERK:
        raise UsageError("channels are chosen in --scope layer or global")
    if threshold is not None and scope is Scope.GLOBAL:
        raise UsageError("a threshold says of each layer by itself what goes: leave out --scope global")
    if request.layers and scope is Scope.GLOBAL:
        raise UsageError("--layer sets the share of a layer, --scope global ranks all together")
    return ChannelConfig(
        ratio=request.sparsity or 0.0,
        measure=measure,
        threshold=threshold,
        scope=scope,
        only=request.only,
        exclude=request.exclude,
        layers=request.layers,
        min_channels=min_channels,
        round_to=round_to,
        max_ratio=max_ratio,
        seed=request.seed,
        goal=goals[0] if goals else None,
        is_dead=dead,
    )


def _check_amount(request: PruneRequest, goals: Sequence[SizeTarget], *, dead: bool, has_threshold: bool) -> None:
    asked = [request.sparsity is not None, dead, has_threshold, *(True for _ in goals)]
    if sum(asked) > 1:
        raise UsageError(
            "how many channels go is said once: by --sparsity, --params, --flops, --target-gzip, --dead or a threshold"
        )
    if not sum(asked) and not request.layers:
        raise UsageError("how many channels? say --sparsity", hint="such as --sparsity 50%, or --flops -50%")
    if dead and (request.layers or request.strategy != _DEFAULT or request.scope != Scope.LAYER):
        raise UsageError("--dead takes what makes no difference: there is nothing to rank")


_OTHERS: tuple[tuple[str, Callable[[PruneRequest], bool]], ...] = (
    ("--compression", lambda asked: asked.compression is not None),
    ("--target-packed", lambda asked: asked.target_packed is not None),
    ("--policy", lambda asked: asked.policy != "default"),
    ("--nan", lambda asked: asked.nan != "error"),
    ("--repair", lambda asked: asked.is_repaired),
    ("--cluster", lambda asked: bool(asked.cluster)),
    ("--loss", lambda asked: bool(asked.loss) and asked.strategy != "taylor"),
)


def _check(request: PruneRequest) -> None:
    for word, is_asked in _OTHERS:
        if is_asked(request):
            raise UsageError(f"{word} does not go with channels that are cut out", hint=f"leave out {word}")
    if not request.data and (request.samples, request.batch_size) != (SAMPLES, BATCH_SIZE):
        raise UsageError("--samples and --batch-size are about data", hint="add --data SPEC, or leave them out")


def _measure(request: PruneRequest) -> tuple[Importance | None, float | None]:
    """Return what channels are ranked by, and from which similarity on they go if that is said."""
    name = MEASURES[0].name if request.strategy == _DEFAULT else request.strategy
    known: dict[str, Importance | None] = {**{measure.name: measure for measure in MEASURES}, RANDOM: None}
    meant = find(KIND, name, known)
    if meant is not None and not isinstance(meant, Importance):
        return importance_from_function(meant, name, request.params), None
    found, threshold = meant, None
    for word in request.params:
        key, _, value = word.partition("=")
        if found is not None and found.has_threshold and key == "threshold":
            threshold = _share(value)
        elif found is not None and key == found.key and value in found.choices:
            found = replace(found, of=found.choices[value], choice=value)
        else:
            raise UsageError(f"the strategy {name} takes no --param {word}", hint=_params(found))
    needs_data = found is not None and found.needs is not RequiredData.NOTHING
    if needs_data and not request.data:
        raise UsageError(f"the strategy {name} looks at data: say which", hint="--data train.npz")
    return found, threshold


def _params(measure: Importance | None) -> str:
    takes = [f"{measure.key}={choice}" for choice in measure.choices] if measure is not None else []
    takes += ["threshold=0.9"] if measure is not None and measure.has_threshold else []
    return f"it takes {', '.join(takes)}" if takes else "it takes none"


def _share(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise UsageError(f"threshold={text} is no number from 0 to 1", hint="threshold=0.9")
    return found


PLURAL = "channels"


def list_importances() -> tuple[Choice, ...]:
    """Return all names, and who brings them."""
    own = [Choice(PLURAL, one.name, "built in", one.line) for one in MEASURES]
    chance = Choice(PLURAL, RANDOM, "built in", "whatever the seed says")
    return (*own, chance, *(Choice(PLURAL, name, package, "") for name, package in installed(KIND).items()))
