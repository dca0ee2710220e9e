"""What is asked of a cut: how many channels, by which measure, and what must be left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from prunectl.channels.goals import Goal, What, goal_of
from prunectl.channels.plugged import KIND, as_measure
from prunectl.channels.scores import MEASURES, RANDOM, Measure, Needs
from prunectl.errors import UsageError
from prunectl.plugins import find
from prunectl.pruning.plan import Scope
from prunectl.pruning.request import BATCH_SIZE, SAMPLES, Request

MIN_CHANNELS = 2
_DEFAULT = "magnitude"
"""What `prune` takes if no strategy is named: for channels, their norm."""


@dataclass(frozen=True, slots=True)
class Cutting:
    """Every choice that decides which channels go."""

    ratio: float
    """Share of the channels that can go."""
    measure: Measure | None
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
    goal: Goal | None = None
    """What the ratio is to be found for."""
    is_dead: bool = False
    """Whether only channels go that make no difference."""

    @property
    def is_nothing(self) -> bool:
        """Whether it was said that no channel goes."""
        is_told = self.goal is not None or self.is_dead or self.threshold is not None
        return not is_told and not self.ratio and not any(ratio for _, ratio in self.layers)


def cutting_of(
    request: Request,
    *,
    min_channels: int = MIN_CHANNELS,
    round_to: int = 1,
    max_ratio: float = 1.0,
    params: str = "",
    flops: str = "",
    dead: bool = False,
) -> Cutting:
    """Return what a request asks of channels, and refuse what it asks of single weights only."""
    _check(request)
    goals = [goal_of(what, text) for what, text in ((What.PARAMS, params), (What.FLOPS, flops)) if text]
    if request.target_gzip is not None:
        goals.append(Goal(What.GZIP, request.target_gzip))
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
    return Cutting(
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


def _check_amount(request: Request, goals: Sequence[Goal], *, dead: bool, has_threshold: bool) -> None:
    asked = [request.sparsity is not None, dead, has_threshold, *(True for _ in goals)]
    if sum(asked) > 1:
        raise UsageError(
            "how many channels go is said once: by --sparsity, --params, --flops, --target-gzip, --dead or a threshold"
        )
    if not sum(asked) and not request.layers:
        raise UsageError("how many channels? say --sparsity", hint="such as --sparsity 50%, or --flops -50%")
    if dead and (request.layers or request.strategy != _DEFAULT or request.scope != Scope.LAYER):
        raise UsageError("--dead takes what makes no difference: there is nothing to rank")


_OTHERS: tuple[tuple[str, Callable[[Request], bool]], ...] = (
    ("--compression", lambda asked: asked.compression is not None),
    ("--target-packed", lambda asked: asked.target_packed is not None),
    ("--policy", lambda asked: asked.policy != "default"),
    ("--nan", lambda asked: asked.nan != "error"),
    ("--repair", lambda asked: asked.is_repaired),
    ("--cluster", lambda asked: bool(asked.cluster)),
    ("--loss", lambda asked: bool(asked.loss) and asked.strategy != "taylor"),
)


def _check(request: Request) -> None:
    for word, is_asked in _OTHERS:
        if is_asked(request):
            raise UsageError(f"{word} does not go with channels that are cut out", hint=f"leave out {word}")
    if not request.data and (request.samples, request.batch_size) != (SAMPLES, BATCH_SIZE):
        raise UsageError("--samples and --batch-size are about data", hint="add --data SPEC, or leave them out")


def _measure(request: Request) -> tuple[Measure | None, float | None]:
    """Return what channels are ranked by, and from which similarity on they go if that is said."""
    name = MEASURES[0].name if request.strategy == _DEFAULT else request.strategy
    known: dict[str, Measure | None] = {**{measure.name: measure for measure in MEASURES}, RANDOM: None}
    meant = find(KIND, name, known)
    if meant is not None and not isinstance(meant, Measure):
        return as_measure(meant, name, request.params), None
    found, threshold = meant, None
    for word in request.params:
        key, _, value = word.partition("=")
        if found is not None and found.has_threshold and key == "threshold":
            threshold = _share(value)
        elif found is not None and key == found.key and value in found.choices:
            found = replace(found, of=found.choices[value], choice=value)
        else:
            raise UsageError(f"the strategy {name} takes no --param {word}", hint=_params(found))
    needs_data = found is not None and found.needs is not Needs.NOTHING
    if needs_data and not request.data:
        raise UsageError(f"the strategy {name} looks at data: say which", hint="--data train.npz")
    return found, threshold


def _params(measure: Measure | None) -> str:
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
