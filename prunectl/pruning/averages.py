"""Weights that a checkpoint holds twice: as they were trained, and averaged over the training (EMA, SWA)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from prunectl.analysis.stats import MOST_ROOTS, averaged_copies
from prunectl.errors import InputError, UsageError, abbreviated
from prunectl.formats.base import CopyChoice, ModelFile, Role, Tensor


class Keep(StrEnum):
    """Which of two copies of the weights stays."""

    EMA = "ema"
    RAW = "raw"


def parse_keep(text: str) -> Keep | None:
    """The copy that a word names; None for no word."""
    if text not in {"", *Keep}:
        raise UsageError(f"keep is ema or raw, not {abbreviated(text)!r}")
    return Keep(text) if text else None


@dataclass(frozen=True, slots=True)
class _Copies:
    """Where both copies lie: in the place where the weights are looked for, and beside it."""

    home: str
    other: str
    is_home_average: bool = False


_FORMATS = frozenset({"torch", "torch-legacy", "safetensors"})
_WRAPPERS = ("module", "_orig_mod")
"""What DistributedDataParallel and torch.compile put in front of all names."""
_CURRENT, _STATE = "current_model_state", "state_dict"
_MMENGINE = "ema_state_dict"


def choose(model: ModelFile, keep: Keep | None, *, is_asked: bool) -> CopyChoice | None:
    """Which copy of the weights stays; None where there is one, or where the loader of the file says which it takes."""
    if model.format not in _FORMATS and not model.stream:
        if keep is not None:
            raise UsageError(f"--keep cannot be used: in {model.path}, copies of the weights are not told apart")
        return None
    copies = _find(model)
    if copies is None:
        if keep is not None:
            raise UsageError(
                f"--keep {keep}: {model.path} holds one copy of the weights, or none that is known by its names",
                hint="leave out --keep",
            )
        return None
    if keep is None:
        if not is_asked or _is_of_yolo(model, copies):
            return None
        average, raw = (copies.home, copies.other) if copies.is_home_average else (copies.other, copies.home)
        raise UsageError(
            f"{model.path} holds the weights twice: {abbreviated(raw) or 'the top level'} as they were trained, and "
            f"their average under {abbreviated(average) or 'the top level'}",
            hint="add --keep ema for the average, or --keep raw",
        )
    return _choice(model, copies, takes_other=(keep is Keep.EMA) != copies.is_home_average)


def _is_of_yolo(model: ModelFile, copies: _Copies) -> bool:
    """Whether it is laid out as Ultralytics does it, whose loader takes the average if there is one."""
    return copies.other == "ema" and any(fact.startswith("updates ") for fact in model.about.training)


def _find(model: ModelFile) -> _Copies | None:
    # What callbacks keep counts as training's otherwise, as it does where it is no average.
    tensors = [replace(one, role=Role.OTHER) if one.name.startswith("callbacks.") else one for one in model.tensors]
    sections = {tensor.name.partition(".")[0] for tensor in tensors}
    if {_CURRENT, _STATE} <= sections:
        # Lightning's WeightAveraging saves the average as the model.
        return _Copies(_STATE, _CURRENT, is_home_average=True)
    names = [tensor.name.removeprefix(f"{_MMENGINE}.") for tensor in tensors if tensor.name.startswith(f"{_MMENGINE}.")]
    if _STATE in sections and "steps" in names and all(name == "steps" or name.startswith("module.") for name in names):
        # The hook of MMEngine swaps both when it saves.
        return _Copies(_STATE, _MMENGINE, is_home_average=True)
    found = averaged_copies(tensors)
    return None if found is None else _Copies(found[0], found[1])


def _inside(tensors: Sequence[Tensor], place: str) -> dict[str, Tensor]:
    prefix = f"{place}." if place else ""
    return {tensor.name.removeprefix(prefix): tensor for tensor in tensors if tensor.name.startswith(prefix)}


def _choice(model: ModelFile, copies: _Copies, *, takes_other: bool) -> CopyChoice:
    """The tensors of the copy that stays, under the names that the class of the network knows."""
    others = _inside(model.tensors, copies.other)
    copied = {tensor.name for tensor in others.values()}
    outside = [tensor for tensor in model.tensors if tensor.name not in copied]
    home, plain = copies.home, copies.home
    own = _inside([tensor for tensor in outside if tensor.role not in {Role.OPTIMIZER, Role.MASK}], home)
    for wrapper in _WRAPPERS * 2:
        if own and all(name.startswith(f"{wrapper}.") for name in own):
            home = f"{home}.{wrapper}".lstrip(".")
            own = {name.removeprefix(f"{wrapper}."): tensor for name, tensor in own.items()}
    while plain.rpartition(".")[2] in _WRAPPERS:
        plain = plain.rpartition(".")[0]
    sources = _sources(own, others) if takes_other else {}
    if takes_other and not sources:
        raise InputError(f"{model.path}: the tensors under {copies.other} have other names or shapes than the weights")
    lacking = [name for name in own if name not in sources] if takes_other else []
    prefix = f"{plain}." if plain else ""
    return CopyChoice(
        home=home,
        other=copies.other,
        names={tensor.name: f"{prefix}{name}" for name, tensor in own.items()},
        sources={own[name].name: other for name, other in sources.items()},
        lacking=tuple(lacking),
    )


def _sources(own: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, str]:
    """For the tensors of one copy those of the other, whose names may have more in front, or no dots (as in LDM)."""
    joined = Counter(name.replace(".", "") for name in own)
    known = {name.replace(".", ""): name for name in own}
    found: dict[str, str] = {}
    for name, other in others.items():
        parts = name.split(".")
        for skip in range(min(MOST_ROOTS + 1, len(parts))):
            key = "".join(parts[skip:])
            plain = known.get(key, "")
            if plain and joined[key] == 1 and own[plain].shape == other.shape and plain not in found:
                found[plain] = other.name
                break
    return found
