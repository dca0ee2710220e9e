"""Checkpoints that hold the weights twice: as trained, and averaged over training (EMA, SWA)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from prunectl.analysis.copies import MAX_ENTRY_DEPTH, averaged_copies, common_entry, is_average
from prunectl.errors import InputError, UsageError, abbreviated
from prunectl.formats import safetensors
from prunectl.formats.base import PRUNABLE, WEIGHTS, CopyChoice, ModelFile, Role, Tensor
from prunectl.formats.detect import AVERAGED
from prunectl.formats.pipeline import parts_in_one_file
from prunectl.formats.state_dict import AVERAGES, MODEL_ROOTS


class Keep(StrEnum):
    """Which of two copies of the weights is kept."""

    EMA = "ema"
    RAW = "raw"


def parse_keep(text: str) -> Keep | None:
    """The copy named by the text; None for an empty text."""
    if text not in {"", *Keep}:
        raise UsageError(f"keep is ema or raw, not {abbreviated(text)!r}")
    return Keep(text) if text else None


@dataclass(frozen=True, slots=True)
class _Copies:
    """The prefixes of both copies in a checkpoint."""

    home: str
    """The prefix where loaders look for the weights, such as `state_dict`; empty for the top level."""
    other: str
    is_home_average: bool = False
    is_of_part: bool = False
    """Whether the average is of a part of the network only, such as the generator of a GAN."""
    more: tuple[str, ...] = ()  # the prefixes of further averages
    is_pipeline: bool = False
    """Whether the averages are those of parts of a pipeline, each in a folder beside that of its part."""


_FORMATS = frozenset({"torch", "torch-legacy", "safetensors", "diffusers"})
_WRAPPERS = ("module", "_orig_mod")
"""The prefixes that DistributedDataParallel and torch.compile add to all names."""
_ROOTS = MODEL_ROOTS | {"", *_WRAPPERS}
_TRAINED = WEIGHTS - {Role.STATE}
_CURRENT, _STATE = "current_model_state", "state_dict"
_MMENGINE = "ema_state_dict"
_KERNELS = PRUNABLE | {Role.EMBEDDING, Role.BIAS}
_TOP = "the top level"


def choose(model: ModelFile, keep: Keep | None, *, is_asked: bool) -> CopyChoice | None:
    """Which copy of the weights is kept; None if there is only one, or if the user need not choose."""
    if model.format not in _FORMATS and not model.stream:
        if keep is not None:
            raise UsageError(f"--keep cannot be used: in {model.path}, copies of the weights are not told apart")
        return None
    copies = _find(model)
    if copies is not None and keep is None:
        if not is_asked or _is_of_yolo(model, copies):
            return None
        raise _question(model, copies)
    if is_asked and model.format == "diffusers":
        _refuse_averages_in_parts(model, copies, keep)
    if copies is None or keep is None:
        if keep is not None:
            raise UsageError(
                f"--keep {keep}: {model.path} holds one copy of the weights, or none that is known by its names",
                hint="leave out --keep",
            )
        return None
    return _choice(model, copies, takes_other=(keep is Keep.EMA) != copies.is_home_average)


def _refuse_averages_in_parts(model: ModelFile, copies: _Copies | None, keep: Keep | None) -> None:
    """Refuse a pipeline in which a part that is kept has both the weights and their average in one file."""
    averages = () if copies is None else (copies.other, *copies.more)
    removed = {average.removesuffix(AVERAGED) for average in averages} if keep is Keep.EMA else set(averages)
    for file in parts_in_one_file(model):
        part = replace(safetensors.open_model(file), path=file.parent)
        inside = _find(part)
        if inside is not None and file.parent.name not in removed:
            raise _question(part, inside, is_part=True)


def _question(model: ModelFile, copies: _Copies, *, is_part: bool = False) -> UsageError:
    """The error that asks which copy to keep; the average is offered only if it can replace the weights."""
    average, raw = (copies.home, copies.other) if copies.is_home_average else (copies.other, copies.home)
    some = "some of the weights" if copies.is_of_part else "the weights"
    places = " and ".join(abbreviated(place) or _TOP for place in (average, *copies.more))
    sentence = (
        f"{model.path} holds {some} twice: {abbreviated(raw) or _TOP} as they were trained, and "
        f"their {'averages' if copies.more else 'average'} under {places}"
    )
    which = f"for that under {abbreviated(average)}" if copies.more else "for the average"
    which = "for the averages" if copies.more and copies.is_pipeline else which
    command = f"strip this part first, and put OUT in its place: prunectl strip {model.path} -o OUT"
    offer = f"{command} --keep ema, or --keep raw" if is_part else f"add --keep ema {which}, or --keep raw"
    try:
        _choice(model, copies, takes_other=not copies.is_home_average)
    except InputError as error:
        reason = str(error).removeprefix(f"{model.path}: ")
        sentence = f"{sentence}; but {reason}"
        offer = f"{command} --keep raw" if is_part else "add --keep raw for the weights as they were trained"
    return UsageError(sentence, hint=f"{offer}; --only without training leaves {'all' if copies.more else 'both'}")


def _is_of_yolo(model: ModelFile, copies: _Copies) -> bool:
    """Whether a file is laid out as by Ultralytics, whose loader takes the average if there is one."""
    return copies.other == "ema" and any(fact.startswith("updates ") for fact in model.about.training)


def _find(model: ModelFile) -> _Copies | None:
    if model.format == "diffusers":
        return _find_parts(model)
    # Tensors of callbacks have the role of training state, but may be an average here.
    tensors = [replace(t, role=Role.OTHER) if t.name.startswith("callbacks.") else t for t in model.tensors]
    sections = {tensor.name.partition(".")[0] for tensor in tensors}
    if {_CURRENT, _STATE} <= sections:
        # Lightning's WeightAveraging saves the average as the model.
        return _Copies(_STATE, _CURRENT, is_home_average=True)
    names = [tensor.name.removeprefix(f"{_MMENGINE}.") for tensor in tensors if tensor.name.startswith(f"{_MMENGINE}.")]
    if _STATE in sections and "steps" in names and all(name == "steps" or name.startswith("module.") for name in names):
        # The hook of MMEngine swaps both when it saves.
        return _Copies(_STATE, _MMENGINE, is_home_average=True)
    candidates = [_Copies(home, average) for home, average, _ in averaged_copies(tensors)]
    whole = []
    for copies in candidates:
        # Other averages, of different decay, do not count as weights that this average lacks.
        others = tuple(f"{other.other}." for other in candidates if other != copies)
        if _is_of_most([tensor for tensor in tensors if not tensor.name.startswith(others)], copies):
            whole.append(copies)
    # The part that such an average belongs to is found later, when the average is to replace it.
    parts = [
        replace(copies, home=copies.home.partition(".")[0], is_of_part=True)
        for copies in candidates
        if copies not in whole and _is_dropped(model, copies)
    ]
    averages = [*whole, *parts]
    return replace(averages[0], more=tuple(copies.other for copies in averages[1:])) if averages else None


def _find_parts(model: ModelFile) -> _Copies | None:
    folders = dict.fromkeys(tensor.name.partition(".")[0] for tensor in model.tensors)
    averaged = {f"{home}{AVERAGED}": home for home in folders if f"{home}{AVERAGED}" in folders}
    # An average of an average replaces nothing.
    averages = tuple(average for average, home in averaged.items() if home not in averaged)
    if not averages:
        return None
    return _Copies(averages[0].removesuffix(AVERAGED), averages[0], more=averages[1:], is_pipeline=True)


def _is_dropped(model: ModelFile, copies: _Copies) -> bool:
    """Whether an average, even of unknown weights, counts as a further copy of the weights by its name alone."""
    home, other = (place.partition(".")[0] for place in (copies.home, copies.other))
    is_flat = model.format == "safetensors" and not home
    return other in AVERAGES and home != other and (is_flat or home in MODEL_ROOTS)


def _is_of_most(tensors: Sequence[Tensor], copies: _Copies) -> bool:
    """Whether an average covers most of the model, and is not a submodule that happens to have such a name."""
    root, average = copies.home.rpartition(".")[2], copies.other.rpartition(".")[2]
    if root not in _ROOTS and not average.startswith(f"{root}_") and not average.endswith(f"_{root}"):
        return False
    others = _inside(tensors, copies.other)
    averaged = {tensor.name for tensor in others.values()}
    outside = [tensor for tensor in tensors if tensor.name not in averaged and tensor.role is not Role.OPTIMIZER]
    own = _inside(outside, copies.home)
    sizes = [tensor.size for tensor in outside if tensor.role in _TRAINED]
    covered = [own[name].size for name in _sources(own, others) if own[name].role in _TRAINED]
    return 2 * len(covered) > len(sizes) and 2 * sum(covered) > sum(sizes)


def _inside(tensors: Sequence[Tensor], place: str) -> dict[str, Tensor]:
    prefix = f"{place}." if place else ""
    return {tensor.name.removeprefix(prefix): tensor for tensor in tensors if tensor.name.startswith(prefix)}


def _choice(model: ModelFile, copies: _Copies, *, takes_other: bool) -> CopyChoice:
    """The tensors of the copy to keep, under the names that the class of the network expects."""
    choose_tensors = _choice_of_parts if copies.is_pipeline else _choice_in_file
    return choose_tensors(model, copies, takes_other=takes_other)


def _choice_in_file(model: ModelFile, copies: _Copies, *, takes_other: bool) -> CopyChoice:
    """The tensors of one of two copies in a file."""
    others = _inside(model.tensors, copies.other)
    copied = {tensor.name for tensor in others.values()}
    # All averages of parts are removed together, so that none is left beside the weights.
    more = copies.more if copies.is_of_part else ()
    outside = [tensor for tensor in model.tensors if tensor.name not in copied]
    home, plain = copies.home, copies.home
    own = _inside([tensor for tensor in outside if tensor.role is not Role.OPTIMIZER], home)
    for wrapper in _WRAPPERS * 2:
        if own and all(name.startswith(f"{wrapper}.") for name in own):
            home = f"{home}.{wrapper}".lstrip(".")
            own = {name.removeprefix(f"{wrapper}."): tensor for name, tensor in own.items()}
    while plain.rpartition(".")[2] in _WRAPPERS:
        plain = plain.rpartition(".")[0]
    hint = f"--keep {Keep.EMA if copies.is_home_average else Keep.RAW} keeps the copy that is whole"
    if takes_other and more:
        places = " and ".join(abbreviated(place) for place in (copies.other, *more))
        raise InputError(f"{model.path}: {places} are averages of parts, of which only one could be kept", hint=hint)
    part = ""
    sources: dict[str, str] = {}
    if takes_other and copies.is_of_part:
        fitting = _sources_of_part(own, others)
        if len(fitting) > 1:
            places = " and ".join(abbreviated(place) or _TOP for place in sorted(fitting))
            raise InputError(f"{model.path}: the average under {copies.other} fits {places} alike", hint=hint)
        sources = next(iter(fitting.values()), {})
        part = _common_part(sources)
    elif takes_other:
        sources = _sources(own, others)
    if takes_other and not sources:
        raise InputError(
            f"{model.path}: the tensors under {copies.other} have other names or shapes than the weights", hint=hint
        )
    lacking = [name for name in own if name not in sources and own[name].role is not Role.MASK] if takes_other else []
    # An average of a part may lack everything outside this part, but nothing in it.
    kernels = [name for name in lacking if own[name].role in _KERNELS and name.startswith(part)]
    if kernels:
        raise InputError(
            f"{model.path}: {abbreviated(kernels[0])} has no counterpart of its shape under {copies.other}, so that "
            "what is kept would be a mixture of both copies",
            hint=hint,
        )
    prefix = f"{plain}." if plain else ""
    return CopyChoice(
        home=home,
        other=copies.other,
        names={tensor.name: f"{prefix}{name}" for name, tensor in own.items()},
        sources={own[name].name: other for name, other in sources.items()},
        lacking=tuple(lacking),
        more=more,
    )


def _choice_of_parts(model: ModelFile, copies: _Copies, *, takes_other: bool) -> CopyChoice:
    """The tensors of one of two copies of all parts of a pipeline that have an average."""
    names: dict[str, str] = {}
    sources: dict[str, str] = {}
    for other in (copies.other, *copies.more) if takes_other else ():
        home = other.removesuffix(AVERAGED)
        own, others = _inside(model.tensors, home), _inside(model.tensors, other)
        # Only one of the copies may have masks, gradients or optimizer state beside it.
        plain, averaged = safetensors.weight_names(own), safetensors.weight_names(others)
        shapes = {weight: own[name].shape for weight, name in plain.items()}
        if not shapes or shapes != {weight: others[name].shape for weight, name in averaged.items()}:
            raise InputError(
                f"{model.path}: the tensors under {other} have other names or shapes than those under {home}",
                hint=f"--keep {Keep.RAW} keeps the copy that is whole",
            )
        taken = {name: name for name in own.keys() & others} | {plain[weight]: averaged[weight] for weight in plain}
        names |= {f"{home}.{name}": f"{home}.{source}" for name, source in taken.items()}
        sources |= {f"{home}.{name}": f"{other}.{source}" for name, source in taken.items()}
    return CopyChoice(home=copies.home, other=copies.other, names=names, sources=sources, more=copies.more)


def _sources(own: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, str]:
    """From tensors of one copy to those of the other, whose names may have a prefix, or no dots (as in LDM).

    If several fit, as in the EMA of ema-pytorch, which also holds the raw model, the one whose name says EMA is taken.
    """
    plain_names = {name: _weight(name, own).replace(".", "") for name in own}
    joined = Counter(plain_names.values())
    known = {plain: name for name, plain in plain_names.items()}
    fitting: dict[str, list[tuple[bool, str]]] = {}
    for name, other in others.items():
        parts = _weight(name, others).split(".")
        for skip in range(min(MAX_ENTRY_DEPTH + 1, len(parts))):
            key = "".join(parts[skip:])
            plain = known.get(key, "")
            if plain and joined[key] == 1 and own[plain].shape == other.shape:
                fitting.setdefault(plain, []).append((any(map(is_average, parts[:skip])), other.name))
                break
    averages = {
        plain: [name for is_named, name in names if is_named or len(names) == 1] for plain, names in fitting.items()
    }
    return {plain: names[0] for plain, names in averages.items() if len(names) == 1}


def _weight(name: str, names: Container[str]) -> str:
    """A name without the `_orig` that torch.nn.utils.prune adds to a masked weight."""
    weight = name.removesuffix("_orig")
    return weight if f"{weight}_mask" in names else name


def _sources_of_part(own: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """For the prefix of each part that the whole average fits: from names in the part to tensors of the average.

    The names of the average begin at the part, or have a prefix before that.
    """
    at: dict[tuple[str, tuple[int, ...]], dict[str, str]] = {}
    for name, tensor in own.items():
        parts = _weight(name, own).split(".")
        for skip in range(min(MAX_ENTRY_DEPTH + 1, len(parts))):
            at.setdefault(("".join(parts[skip:]), tensor.shape), {})[".".join(parts[:skip])] = name
    averaged = {tuple(_weight(name, others).split(".")): other for name, other in others.items()}
    # A counter of updates is not part of the network.
    whole = [name for name, other in averaged.items() if other.size > 1 and other.role is not Role.MASK]
    for skip in range(MAX_ENTRY_DEPTH + 1):
        keys = {name: ("".join(name[skip:]), other.shape) for name, other in averaged.items() if name[skip:]}
        wanted = Counter(keys.get(name) for name in whole)
        if not whole or wanted[None] or len(wanted) < len(whole):
            continue
        homes = set.intersection(*(set(at.get(keys[name], ())) for name in whole))
        if homes:
            return {
                home: {at[key][home]: averaged[name].name for name, key in keys.items() if home in at.get(key, ())}
                for home in ({""} if "" in homes else homes)
            }
    return {}


def _common_part(names: Iterable[str]) -> str:
    """The common prefix of the names of several layers, with a dot; empty for a single layer."""
    layers = {name.rpartition(".")[0] for name in names}
    if len(layers) < 2:
        return ""
    # The common prefix of the first and the last name in order is that of all names.
    common = common_entry(min(layers), max(layers))
    return f"{common}." if common else ""
