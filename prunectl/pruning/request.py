"""The prune request: all options that determine the values in the output, parsed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

from prunectl.analysis import patterns
from prunectl.analysis.patterns import BlockPattern, NMPattern
from prunectl.errors import UsageError
from prunectl.plugins import find
from prunectl.pruning import BATCH_SIZE, MATCHED_SAMPLES, RANDOM_PREFIX, SAMPLES
from prunectl.pruning.engine import PruningMethod
from prunectl.pruning.masks import NonFinitePolicy, Pooling
from prunectl.pruning.plan import MIN_SIZE, POLICIES, Allocation, PlanCriteria, Policy, Scope, adapt_policy, min_size
from prunectl.pruning.strategies import STRATEGIES, Requires, Strategy, adapt_strategy, erk

if TYPE_CHECKING:
    from prunectl.pruning.clustering import Clustering


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """All options that determine the values in the output."""

    sparsity: float | None = None
    compression: float | None = None
    target_gzip: int | None = None
    target_packed: int | None = None
    strategy: str = "magnitude"
    params: tuple[str, ...] = ()
    scope: str = "layer"
    pattern: str = ""
    policy: str = "default"
    only: str = ""
    exclude: tuple[str, ...] = ()
    layers: tuple[tuple[str, float], ...] = ()
    seed: int = 0
    nan: str = "error"
    is_packed: bool = False
    data: str = ""
    """Spec of the calibration data, for strategies that need some."""
    samples: int = SAMPLES
    batch_size: int | None = BATCH_SIZE
    """The batch size; None in output matching for a default that depends on the data."""
    loss: str = ""
    """The loss for gradients and output matching; empty to infer it from the file or its outputs."""
    model: str = ""
    """The function that builds the model, for a file of weights only."""
    custom_objects: str = ""
    inputs: tuple[str, ...] = ()
    """Input shapes, for a network that has to be run and whose file does not have them."""
    is_repaired: bool = False
    """Whether kept weights are reconstructed by least squares, layer by layer (--repair layers)."""
    is_matched: bool = False
    """Whether kept weights are trained to match the outputs of the dense model (--repair outputs)."""
    repair_steps: int | None = None
    """The number of steps of output matching; None for the default."""
    blocks: int | None = None
    """The number of blocks to remove, for the pattern layers."""
    cluster: str = ""
    """The number of distinct values in each tensor, and how the centroids are initialised: `16:linear`."""


class Repair(StrEnum):
    """The outputs that kept weights are changed to match."""

    LAYERS = "layers"
    """The outputs of each layer, by least squares."""
    OUTPUTS = "outputs"
    """The outputs of the model, by training."""


_AMOUNTS = ("sparsity", "compression", "target_gzip", "target_packed")
UNSTRUCTURED = "unstructured"
"""The name of the pattern with zeros anywhere."""
_OPTION_OF = {
    "is_packed": "pack",
    "inputs": "input",
    "params": "param",
    "is_repaired": "repair",
    "only": "layers",
    "layers": "layer",
    "model": "builder",
}
OPTIONS = {
    _OPTION_OF.get(field.name, field.name): field.name for field in fields(PruneRequest) if field.name != "is_matched"
}
"""From option names to the fields of a request; --repair sets `is_repaired` or `is_matched`."""


def parse_request(options: Mapping[str, Any], *, is_by_layer: bool = False) -> PruneRequest:
    """Parse options by their names on the command line; missing ones have their defaults.

    With `is_by_layer` the default scope is `layer`.
    """
    given = {
        OPTIONS.get(name, name): [*value] if isinstance(value, tuple) else value for name, value in options.items()
    }
    default = PruneRequest().strategy
    if given.get("pattern") == patterns.LAYERS and given.get("strategy") == default:
        raise UsageError(
            f"the strategy {default} cannot be used with --pattern layers", hint="use last, even or block-influence"
        )
    repaired = given.get("is_repaired")
    if isinstance(repaired, str) and repaired:
        if repaired not in set(Repair):
            raise UsageError(f"--repair cannot be {repaired!r}", hint=f"use --repair {' or --repair '.join(Repair)}")
        given["is_repaired"] = repaired == Repair.LAYERS
        if repaired == Repair.OUTPUTS:
            # Training needs more examples than layer statistics.
            given = {"samples": MATCHED_SAMPLES, "batch_size": None, **given, "is_matched": True}
    if given and given.get("scope", Scope.AUTO) == Scope.AUTO:
        is_clustered = given.get("cluster") and all(given.get(amount) is None for amount in _AMOUNTS)
        is_by_layer = is_by_layer or bool(given.get("layers") or is_clustered)
        strategy, pattern = str(given.get("strategy", default)), str(given.get("pattern", ""))
        given["scope"] = default_scope(strategy, pattern, is_by_layer=is_by_layer)
    return from_json(given)


def default_scope(strategy: str, pattern: str = "", *, is_by_layer: bool = False) -> str:
    """The default scope: global if the scores of different layers are comparable, else layer.

    It is layer, too, with a pattern or with sparsities for single layers.
    """
    is_free = pattern in {"", UNSTRUCTURED} and not is_by_layer
    is_comparable = any(known.name == strategy and known.is_comparable for known in STRATEGIES)
    return str(Scope.GLOBAL if is_free and is_comparable else Scope.LAYER)


def from_json(data: dict[str, Any]) -> PruneRequest:
    """Parse a request from JSON values, as in a recipe or a manifest."""
    defaults = {field.name: field.default for field in fields(PruneRequest)}
    if unknown := sorted(set(data) - defaults.keys()):
        raise UsageError(
            f"{unknown[0]} is not a known option", did_you_mean=tuple(get_close_matches(unknown[0], defaults))
        )
    lists = {name: tuple(map(_to_tuple, value)) for name, value in data.items() if isinstance(value, list)}
    values = {**data, **lists}
    for name, value in values.items():
        if not _check_type(name, value, defaults[name]):
            known = {"scope": "layer, global or erk", "nan": "zero, keep or error"}.get(name)
            hint = f"choose {known}" if known else ""
            raise UsageError(f"{value!r} is not a valid {name.replace('_', ' ')}", hint=hint)
    return PruneRequest(**values)


def _check_type(name: str, value: Any, default: Any) -> bool:
    """Whether a value is of the type of a field."""
    if name in {"scope", "nan"}:
        choices = set(Scope) - {Scope.AUTO} if name == "scope" else set(NonFinitePolicy)
        return value in {str(choice) for choice in choices}
    if name == "layers":
        return isinstance(value, tuple) and all(
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], int | float)
            for pair in value
        )
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if default is None or (name == "batch_size" and value is None):
        number = int | float if name in {"sparsity", "compression"} else int
        return value is None or (isinstance(value, number) and not isinstance(value, bool))
    return type(value) is type(default)


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def parse_pattern(request: PruneRequest) -> tuple[NMPattern | BlockPattern | None, Pooling]:
    """The pattern, and how its blocks are scored."""
    if request.pattern in {"", UNSTRUCTURED}:
        return None, Pooling.AVG
    text, pool = request.pattern, Pooling.AVG
    for choice in Pooling:
        if text.startswith("block:") and text.endswith(f":{choice}"):
            text, pool = text.removesuffix(f":{choice}"), choice
    pattern = patterns.parse(text)
    if isinstance(pattern, NMPattern | BlockPattern):
        return pattern, pool
    raise UsageError("the pattern channel cannot be used here", hint=f"write 2:4, block:1x4 or {UNSTRUCTURED}")


def resolve_method(request: PruneRequest) -> PruningMethod:
    """Resolve the names in a request: its strategy, policy, pattern and clustering."""
    return _method(request, _strategy(request), parse_pattern(request))


def _method(
    request: PruneRequest, strategy: Strategy, pattern_and_pool: tuple[NMPattern | BlockPattern | None, Pooling]
) -> PruningMethod:
    pattern, pool = pattern_and_pool
    allocation: Allocation | None = erk if request.scope == Scope.ERK else None
    if strategy.allocation is not None:
        allocation = partial(strategy.allocation, seed=request.seed, **strategy.params)
    criteria = PlanCriteria(
        scope=Scope(request.scope),
        policy=_policy(request.policy),
        only=request.only,
        exclude=request.exclude,
        pattern=pattern,
        layers=request.layers,
        allocation=allocation,
    )
    return PruningMethod(
        strategy,
        criteria,
        request.seed,
        NonFinitePolicy(request.nan),
        pool,
        clustering=_parse_clustering(request.cluster),
    )


def _strategy(request: PruneRequest) -> Strategy:
    titles = {strategy.name: strategy.summary for strategy in STRATEGIES}
    builtin = {strategy.name: strategy for strategy in STRATEGIES}
    return adapt_strategy(find("strategy", request.strategy, builtin, titles), request)


def _policy(name: str) -> Policy:
    if name.startswith(MIN_SIZE):
        return min_size(name)
    builtin: dict[str, object] = {policy.name: policy for policy in POLICIES}
    # No policy has this literal name; it is listed so that an error about a misspelt name can suggest it.
    builtin[f"{MIN_SIZE}N"] = min_size
    return adapt_policy(find("policy", name, builtin))


def check(request: PruneRequest, *, allow_empty: bool = False) -> PruningMethod:
    """Resolve the names in a request, and refuse contradictory options before a file is opened.

    A sparsity of 1 is taken for a mistake, unless `allow_empty` is set.
    """
    strategy = _strategy(request)
    needs = strategy.needs
    if needs is Requires.TRAINING:
        raise UsageError(
            f"the strategy {request.strategy} needs training",
            hint=f"use it in: prunectl finetune --strategy {request.strategy}",
        )
    is_repaired = request.is_repaired or request.is_matched
    uses_data = needs is not Requires.NOTHING or is_repaired
    if uses_data and not request.data:
        who = "--repair" if is_repaired else f"the strategy {request.strategy}"
        raise UsageError(f"{who} needs data", hint="add --data train.npz")
    if request.data and not uses_data:
        raise UsageError(
            f"--data has no effect: the strategy {request.strategy} uses no data",
            hint="leave out --data, add --repair, or use --strategy activation-magnitude or obs",
        )
    if not request.data and (request.loss, request.samples, request.batch_size) != ("", SAMPLES, BATCH_SIZE):
        raise UsageError("--samples, --batch-size and --loss need --data", hint="add --data SPEC, or leave them out")
    check_matching(request)
    if request.sparsity == 1 and not allow_empty:
        raise UsageError(_ALL, hint=f"{_PERCENT}; for zeros alone add --allow-empty")
    numbers = {"--samples": request.samples, "--batch-size": request.batch_size, "--repair-steps": request.repair_steps}
    for option, number in numbers.items():
        if number is not None and number < 1:
            raise UsageError(f"{option} must be at least 1")
    return _check_shape(request, strategy)


def check_matching(request: PruneRequest) -> None:
    """Refuse options of `--repair outputs` that lack what they need."""
    if request.repair_steps is not None and not request.is_matched:
        raise UsageError("--repair-steps needs --repair outputs", hint="add --repair outputs, or leave it out")
    if request.is_matched and not request.data:
        raise UsageError("--repair needs data", hint="add --data train.npz")


def _parse_clustering(text: str | None) -> Clustering | None:
    if not text:
        return None
    from prunectl.pruning import clustering  # noqa: PLC0415 - few ask for clusters

    return clustering.parse(text)


_ALL, _PERCENT = "a sparsity of 1 would set every weight to zero", "for 1 percent write 1%, for 99 percent 99%"


def check_shape(request: PruneRequest) -> PruningMethod:
    """Resolve a request for training, whose strategy may need training; check amount, scope, pattern and clusters."""
    if request.sparsity == 1:
        raise UsageError(_ALL, hint=_PERCENT)
    return _check_shape(request, _strategy(request))


def _check_shape(request: PruneRequest, strategy: Strategy) -> PruningMethod:
    _parse_clustering(request.cluster)
    pattern, pool = parse_pattern(request)
    _check_amounts(request, pattern)
    if pattern is not None:
        if strategy.params.get("stages", 1) > 1:
            raise UsageError(
                f"--param stages ranks single weights again, and cannot be used with the pattern {request.pattern}",
                hint="leave out --param stages, or --pattern",
            )
    is_by_layer = request.scope == Scope.LAYER
    if isinstance(pattern, NMPattern):
        if not is_by_layer:
            raise UsageError(
                f"the scope {request.scope} cannot be used with the pattern {request.pattern}, the same in every layer",
                hint="use the scope layer",
            )
        if request.layers:
            raise UsageError(
                f"the pattern {request.pattern} fixes the sparsity of every layer", hint="leave out --layer"
            )
    if isinstance(pattern, BlockPattern) and not is_by_layer:
        raise UsageError(
            f"the scope {request.scope} cannot be used with blocks, which are ranked within each layer",
            hint="use the scope layer",
        )
    if request.layers and not is_by_layer:
        raise UsageError(f"--layer cannot be used with --scope {request.scope}, which sets the sparsity of every layer")
    if strategy.allocation is not None and (request.layers or pattern or not is_by_layer):
        raise UsageError(
            f"the strategy {request.strategy} sets the sparsity of each layer itself",
            hint="use the scope layer, without --layer and without a pattern",
        )
    return _method(request, strategy, (pattern, pool))


def _check_amounts(request: PruneRequest, pattern: NMPattern | BlockPattern | None) -> None:
    amounts = [request.sparsity, request.compression, request.target_gzip, request.target_packed]
    amount_count = sum(amount is not None for amount in amounts)
    for ratio in (request.sparsity, *(own for _, own in request.layers)):
        if ratio is not None and not 0 <= ratio <= 1:
            raise UsageError(f"the sparsity must be from 0 to 1, not {ratio:g}", hint="write 0.8 or 80%")
    if isinstance(pattern, NMPattern):
        if amount_count and request.sparsity != pattern.zeros / pattern.group:
            raise UsageError(f"the pattern {request.pattern} fixes the sparsity", hint="leave out --sparsity")
    elif amount_count > 1:
        raise UsageError("only one of --sparsity, --compression, --target-gzip and --target-packed can be used")
    elif not amount_count and not request.layers and not request.cluster:
        raise UsageError("no sparsity is given", hint="add --sparsity 80%, --compression 5 or --target-gzip 400KB")


def code_specs(request: PruneRequest) -> tuple[str, ...]:
    """The values of all options that may name code, as `package.module:name` or `./file.py:name`."""
    policy = "" if request.policy.startswith(MIN_SIZE) else request.policy
    data = "" if request.data.startswith(RANDOM_PREFIX) else request.data
    return request.strategy, policy, data, request.loss, request.model, request.custom_objects


def names_code(request: PruneRequest) -> bool:
    """Whether a request may name code, so that a recorded one must be trusted before it is repeated."""
    return any(":" in name for name in code_specs(request))
