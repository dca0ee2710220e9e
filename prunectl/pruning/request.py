"""What the user asked for, in the words of the command line: kept in the manifest, replayed from a recipe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile
from prunectl.measuring import patterns
from prunectl.measuring.patterns import Block, ZerosOf
from prunectl.measuring.survey import survey
from prunectl.plugins import find
from prunectl.pruning.execute import Method
from prunectl.pruning.masks import Pool
from prunectl.pruning.not_finite import NotFinite
from prunectl.pruning.plan import Scope, Wish
from prunectl.pruning.plugged import as_policy, as_strategy
from prunectl.pruning.policies import POLICIES
from prunectl.pruning.strategies import STRATEGIES


@dataclass(frozen=True, slots=True)
class Request:
    """Every choice that decides the numbers in the output."""

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


def from_json(said: dict[str, Any]) -> Request:
    """Return the request in a recipe."""
    known = {field.name for field in fields(Request)}
    if unknown := sorted(set(said) - known):
        raise UsageError(f"no choice is called {unknown[0]}", did_you_mean=tuple(get_close_matches(unknown[0], known)))
    lists = {name: tuple(map(_frozen, value)) for name, value in said.items() if isinstance(value, list)}
    return Request(**{**said, **lists})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def shape_of(request: Request) -> tuple[ZerosOf | Block | None, Pool]:
    """Return the pattern, and how its blocks are scored."""
    if request.pattern in {"", "unstructured"}:
        return None, Pool.AVG
    text, pool = request.pattern, Pool.AVG
    for choice in Pool:
        if text.startswith("block:") and text.endswith(f":{choice}"):
            text, pool = text.removesuffix(f":{choice}"), choice
    found = patterns.parse(text)
    if isinstance(found, ZerosOf | Block):
        return found, pool
    raise UsageError("channels are not cut yet", hint="write 2:4, block:1x4 or unstructured")


def method_of(request: Request) -> Method:
    """Return how weights are ranked."""
    pattern, pool = shape_of(request)
    strategy = as_strategy(find("strategy", request.strategy, {known.name: known for known in STRATEGIES}), request)
    return Method(strategy, request.seed, NotFinite(request.nan), pattern, pool)


def wish_of(model: ModelFile, request: Request, sparsity: float | None = None) -> Wish:
    """Return what is asked of a model, at the sparsity of the request or at one that is tried."""
    pattern, _ = shape_of(request)
    return Wish(
        sparsity=_sparsity(model, request, pattern) if sparsity is None else sparsity,
        scope=Scope(request.scope),
        policy=as_policy(find("policy", request.policy, {known.name: known for known in POLICIES})),
        only=request.only,
        exclude=request.exclude,
        pattern=pattern,
        layers=request.layers,
    )


def check(request: Request) -> None:
    """Refuse what contradicts itself, before a file is opened."""
    pattern, _ = shape_of(request)
    amounts = [request.sparsity, request.compression, request.target_gzip, request.target_packed]
    given = sum(amount is not None for amount in amounts)
    if isinstance(pattern, ZerosOf):
        if given and request.sparsity != pattern.zeros / pattern.group:
            raise UsageError(
                f"the pattern {request.pattern} decides the sparsity by itself", hint="leave out --sparsity"
            )
        if request.scope != Scope.LAYER:
            raise UsageError(f"the pattern {request.pattern} is the same in every layer", hint="leave out --scope")
    elif given > 1:
        raise UsageError("--sparsity, --compression and the targets exclude each other")
    elif not given and not request.layers:
        raise UsageError("how much? say --sparsity, --compression or a target", hint="such as --sparsity 0.8")
    if isinstance(pattern, Block) and request.scope != Scope.LAYER:
        raise UsageError("blocks are ranked within each layer", hint="leave out --scope")


def _sparsity(model: ModelFile, request: Request, pattern: ZerosOf | Block | None) -> float:
    if isinstance(pattern, ZerosOf):
        return pattern.zeros / pattern.group
    if request.compression is None:
        return request.sparsity or 0.0
    counted = survey(model, model.tensors, has_zeros=False).params
    drop = counted.total - counted.total / request.compression
    if drop > counted.prunable:
        most = counted.total / max(counted.total - counted.prunable, 1)
        raise UsageError(
            f"a compression of {request.compression:g} is out of reach in {model.path}: "
            f"without its {counted.prunable:,} prunable weights it is {most:.3g}",
            hint="--policy all prunes biases, norms and embeddings as well",
        )
    return drop / counted.prunable
