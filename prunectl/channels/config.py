"""The configuration of channel pruning: how many channels, by which importance, within which limits."""

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
from prunectl.pruning import BATCH_SIZE, SAMPLES
from prunectl.pruning.choices import Choice
from prunectl.pruning.plan import Scope
from prunectl.pruning.request import PruneRequest, check_matching
from prunectl.pruning.strategies import bind_params
from prunectl.units import parse_size


class TargetKind(StrEnum):
    """The quantity that a target limits."""

    PARAMS = "parameters"
    FLOPS = "FLOPs"
    GZIP = "gzipped bytes"


@dataclass(frozen=True, slots=True)
class SizeTarget:
    """A target for parameters, FLOPs or compressed bytes: a number, or a share of the original number."""

    kind: TargetKind
    number: int = 0
    share: float | None = None

    def limit(self, before: int) -> int:
        """The target as a number, given the number of the original."""
        return self.number if self.share is None else int(self.share * before)


def parse_target(kind: TargetKind, text: str) -> SizeTarget:
    """Parse a target, such as `-50%`, `1.5M` or `200000`."""
    match = re.fullmatch(r"-(\d+(?:\.\d+)?)%", text.strip())
    if match is not None and float(match[1]) <= 100:
        return SizeTarget(kind, share=1 - float(match[1]) / 100)
    if re.fullmatch(r"\d+(?:\.\d+)?[kmg]?", text.strip().lower()) is None:
        raise UsageError(
            f"{text!r} is not a number of {kind}", hint="write -50% for half of them, or a number such as 1.5M"
        )
    return SizeTarget(kind, number=parse_size(text))


def smallest_ratio(
    target: SizeTarget, before: int, channels: int, count_left: Callable[[float], int], tries: int
) -> float:
    """The smallest ratio of channels that reaches a target, found by bisection in a limited number of tries."""
    limit = target.limit(before)
    if before <= limit:
        return 0.0
    smallest = count_left(1.0)
    if smallest > limit:
        raise WorkError(
            f"{limit:,} {target.kind} cannot be reached: with all removable channels removed there are {smallest:,}",
            hint="allow smaller layers with --min-channels 1, or see what is locked: prunectl inspect MODEL --groups",
        )
    low, high = 0, channels
    while high - low > 1 and tries:
        middle = (low + high) // 2
        if count_left(middle / channels) <= limit:
            high = middle
        else:
            low = middle
        tries -= 1
    return high / channels


KIND = "channel strategy"
"""The kind of plugin for `plugins.find`; its entry-point group is `prunectl.channels`."""


def importance_from_function(function: object, name: str, params: tuple[str, ...]) -> Importance:
    """An importance from a user's function, which takes weights with one row for each channel and returns scores."""
    if not callable(function):
        raise UsageError(f"{name} is not a function from rows of weights to scores")
    scorer: Callable[..., Any] = function
    options = bind_params(params, scorer)

    def score(weights: Array, axis: int) -> Scores:
        rows = channel_rows(weights, axis)
        try:
            scores = np.asarray(scorer(rows.copy(), **options), np.float64)
        except PrunectlError:
            raise
        except Exception as error:
            raise WorkError(f"{name} raised {type(error).__name__}: {error}") from error
        if scores.shape != (len(rows),) or not np.isfinite(scores).all():
            raise WorkError(
                f"{name} must return a finite number for each of {len(rows)} channels, but returned {scores.shape}",
                hint="its argument is an array with one row of weights for each channel",
            )
        return scores

    return Importance(name, frozenset({AxisRole.OUT}), score, inspect.getdoc(scorer) or "")


MIN_CHANNELS = 2
_DEFAULT = "magnitude"
"""The strategy that `prune` uses if none is named; for channels it means channel-norm."""


@dataclass(frozen=True, slots=True)
class ChannelConfig:
    """Every choice that decides which channels are removed."""

    ratio: float
    """The share of the prunable channels to remove."""
    importance: Importance | None
    """None for random scores."""
    scope: Scope = Scope.LAYER
    only: str = ""
    exclude: tuple[str, ...] = ()
    layers: tuple[tuple[str, float], ...] = ()
    min_channels: int = MIN_CHANNELS
    """The smallest number of channels that each group keeps."""
    round_to: int = 1
    """The number of kept channels of a group is rounded up to a multiple of this."""
    max_ratio: float = 1.0
    """The largest share of a group that is removed."""
    seed: int = 0
    threshold: float | None = None
    """Channels at least this similar to a kept one are removed, from 0 to 1; None to remove by ratio."""
    target: SizeTarget | None = None
    """If given, the ratio is searched so that this target is reached."""
    only_dead: bool = False
    """Whether only dead channels are removed, which do not change the outputs."""

    @property
    def removes_nothing(self) -> bool:
        """Whether the configuration itself asks for no removal, such as `--sparsity 0`."""
        has_amount = self.target is not None or self.only_dead or self.threshold is not None
        return not has_amount and not self.ratio and not any(ratio for _, ratio in self.layers)


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
    """The channel configuration of a request; options that prune single weights are refused."""
    _refuse_weight_options(request)
    targets = [
        parse_target(kind, text) for kind, text in ((TargetKind.PARAMS, params), (TargetKind.FLOPS, flops)) if text
    ]
    if request.target_gzip is not None:
        targets.append(SizeTarget(TargetKind.GZIP, request.target_gzip))
    importance, threshold = _parse_importance(request)
    _check_amount(request, targets, dead=dead, has_threshold=threshold is not None)
    for ratio in (request.sparsity or 0.0, max_ratio, *(layer_ratio for _, layer_ratio in request.layers)):
        if not 0 <= ratio <= 1:
            raise UsageError(f"the share of channels must be from 0 to 1, not {ratio:g}", hint="write 0.5 or 50%")
    for option, number in (("--min-channels", min_channels), ("--round-to", round_to)):
        if number < 1:
            raise UsageError(f"{option} must be at least 1")
    scope = Scope(request.scope)
    if scope is Scope.ERK:
        raise UsageError(
            f"the scope {scope} cannot be used with the pattern channel", hint="use the scope layer or global"
        )
    if threshold is not None and scope is Scope.GLOBAL:
        raise UsageError("a threshold is applied to each layer separately", hint="use the scope layer")
    if request.layers and scope is Scope.GLOBAL:
        raise UsageError("--layer cannot be used with --scope global, which ranks the channels of all layers together")
    return ChannelConfig(
        ratio=request.sparsity or 0.0,
        importance=importance,
        threshold=threshold,
        scope=scope,
        only=request.only,
        exclude=request.exclude,
        layers=request.layers,
        min_channels=min_channels,
        round_to=round_to,
        max_ratio=max_ratio,
        seed=request.seed,
        target=targets[0] if targets else None,
        only_dead=dead,
    )


def _check_amount(request: PruneRequest, targets: Sequence[SizeTarget], *, dead: bool, has_threshold: bool) -> None:
    amounts = [request.sparsity is not None, dead, has_threshold, *(True for _ in targets)]
    if sum(amounts) > 1:
        raise UsageError(
            "only one of --sparsity, --target-params, --target-flops, --target-gzip, --dead and a threshold can be used"
        )
    if not sum(amounts) and not request.layers:
        raise UsageError("no share of channels is given", hint="add --sparsity 50%, or --target-flops -50%")
    if dead and (request.layers or request.strategy != _DEFAULT or request.scope != Scope.LAYER):
        raise UsageError("--dead cannot be used with --strategy, --scope or --layer: dead channels are not ranked")


_WEIGHT_OPTIONS: tuple[tuple[str, Callable[[PruneRequest], bool]], ...] = (
    ("--compression", lambda request: request.compression is not None),
    ("--target-packed", lambda request: request.target_packed is not None),
    ("--policy", lambda request: request.policy != "default"),
    ("--nan", lambda request: request.nan != "error"),
    ("--repair layers", lambda request: request.is_repaired),
    ("--cluster", lambda request: bool(request.cluster)),
    ("--loss", lambda request: bool(request.loss) and request.strategy != "taylor" and not request.is_matched),
)


def _refuse_weight_options(request: PruneRequest) -> None:
    for option, is_given in _WEIGHT_OPTIONS:
        if is_given(request):
            hint = "use --repair outputs" if request.is_repaired else f"leave out {option}"
            raise UsageError(f"{option} cannot be used with --pattern channel", hint=hint)
    check_matching(request)
    if not request.data and (request.samples, request.batch_size) != (SAMPLES, BATCH_SIZE):
        raise UsageError("--samples and --batch-size need --data", hint="add --data SPEC, or leave them out")


def _parse_importance(request: PruneRequest) -> tuple[Importance | None, float | None]:
    """The importance, and the similarity threshold if there is one."""
    name = MEASURES[0].name if request.strategy == _DEFAULT else request.strategy
    known: dict[str, Importance | None] = {**{builtin.name: builtin for builtin in MEASURES}, RANDOM: None}
    chosen = find(KIND, name, known)
    if chosen is not None and not isinstance(chosen, Importance):
        return importance_from_function(chosen, name, request.params), None
    importance, threshold = chosen, None
    for param in request.params:
        key, _, value = param.partition("=")
        if importance is not None and importance.has_threshold and key == "threshold":
            threshold = _parse_threshold(value)
        elif importance is not None and key == importance.key and value in importance.choices:
            importance = replace(importance, function=importance.choices[value], choice=value)
        else:
            raise UsageError(f"the strategy {name} has no --param {param}", hint=_params(importance))
    needs_data = importance is not None and importance.needs is not RequiredData.NOTHING
    if needs_data and not request.data:
        raise UsageError(f"the strategy {name} needs data", hint="add --data train.npz")
    return importance, threshold


def _params(importance: Importance | None) -> str:
    accepted = [f"{importance.key}={choice}" for choice in importance.choices] if importance is not None else []
    accepted += ["threshold=0.9"] if importance is not None and importance.has_threshold else []
    return f"parameters: {', '.join(accepted)}" if accepted else "it has no parameters"


def _parse_threshold(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f"threshold={text} is not a number from 0 to 1", hint="threshold=0.9")
    return share


PLURAL = "channels"


def list_importances() -> tuple[Choice, ...]:
    """All importances by name, built in and installed."""
    builtin = [Choice(PLURAL, importance.name, "built in", importance.summary) for importance in MEASURES]
    random_choice = Choice(PLURAL, RANDOM, "built in", "random channels, chosen by --seed")
    return (*builtin, random_choice, *(Choice(PLURAL, name, package, "") for name, package in installed(KIND).items()))
