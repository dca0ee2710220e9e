"""Depth pruning: whole blocks out of a model folder, with its config and the numbers in its names put right.

ShortGPT (Men et al. 2024) and LaCo showed how little many of the later blocks do. Nothing is loaded or run: tensors are
copied under their new names, a file at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prunectl.analysis import sizes
from prunectl.analysis.stats import ModelStats, SizeStats, measure_stats
from prunectl.analysis.tensor_io import bitwise_equal
from prunectl.errors import InputError, UsageError, WorkError, abbreviated
from prunectl.formats.base import ModelFile, Tensor
from prunectl.formats.extents import unchanged
from prunectl.formats.families import (
    CONFIG,
    COUNTS,
    ModelFamily,
    Stack,
    block_pattern,
    count_of,
    family_of,
    lookup,
    read_config,
)
from prunectl.formats.registry import open_model, recognise
from prunectl.formats.safe_json import read_object, write_object
from prunectl.formats.safetensors import header_without_tensors, unchanged_entry, write_entries
from prunectl.pruning import BATCH_SIZE, SAMPLES
from prunectl.pruning import destination as outputs
from prunectl.pruning.block_config import BlockCut, shortened
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from prunectl.pruning.strip import stats_for_report

_SUFFIX = ".safetensors"
LAST, EVEN, INFLUENCE = "last", "even", "block-influence"
STRATEGIES = {
    LAST: "the last blocks",
    EVEN: "blocks at even distances, the first and the last kept",
    INFLUENCE: "blocks that change least of what goes through them, as --data shows",
}
"""Which blocks go where they are not named."""
Measure = Callable[[ModelFile], tuple[Sequence[float], tuple[str, ...]]]
"""The influence of each block, and notes on the data that showed it."""
_EXTRA = "num_nextn_predict_layers"
"""Blocks behind the counted ones that predict further tokens (DeepSeek's MTP)."""
_RANGE = re.compile(r"(?:([a-z]+):)?(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True, slots=True)
class RemovedBlocks:
    """What went out of one stack."""

    name: str
    """What stands before the numbers of its blocks."""
    before: int
    removed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksPruned:
    """The result of depth pruning."""

    request: PruneRequest
    stacks: tuple[RemovedBlocks, ...]
    before: ModelStats
    after: ModelStats
    notes: tuple[str, ...] = ()
    """What of the config was changed, each a sentence."""

    def record(self) -> Mapping[str, object]:
        """The removed blocks, as a manifest lists them."""
        return {"blocks": [asdict(stack) for stack in self.stacks]}


def prune_blocks(
    path: Path,
    request: PruneRequest,
    output: Destination | None,
    *,
    has_digests: bool = False,
    measure: Measure | None = None,
) -> BlocksPruned:
    """Take blocks out of a model folder; without an output nothing is written."""
    check(request)
    model = open_model(path)
    _check_model(model, output)
    outputs.check(model, output)
    config = read_config(model, CONFIG)
    family = _family(model, config)
    influence: Sequence[float] = ()
    seen: tuple[str, ...] = ()
    if measure is not None and _strategy(request) == INFLUENCE:
        # What cannot be removed is told before anything runs.
        _cuts(model, config, family, request, ())
        with unchanged(model.states):
            influence, seen = measure(model)
    cuts = _cuts(model, config, family, request, influence)
    names = new_names(model.tensors, cuts)
    new_config, notes = shortened(model, config, family, cuts)
    notes = (*notes, *seen, *_note_influence(influence, cuts))
    stacks = tuple(RemovedBlocks(_shown(model, cut), cut.count, cut.removed) for cut in cuts)
    before = _stats(model)
    if output is None:
        kept = [tensor for tensor in model.tensors if tensor.name in names]
        with unchanged(model.states):
            after = measure_stats(model, kept, has_channels=False, has_zeros=model.nbytes <= outputs.BIG_BYTES)
        gone = sum(tensor.nbytes for tensor in model.tensors) - sum(tensor.nbytes for tensor in kept)
        return BlocksPruned(
            request, stacks, before, replace(after, path="the result", bytes=SizeStats(before.bytes.raw - gone)), notes
        )
    with outputs.staging_dir(model, output, {Path(CONFIG)}) as (folder, target):
        _write_weights(model, names, folder)
        write_object(folder / CONFIG, new_config)
        result = open_model(folder)
        _verify(model, names, result)
        after = _stats(result, beside=model.nbytes)
        if has_digests:
            before = replace(before, sha256=sizes.sha256(model))
            after = replace(after, sha256=sizes.sha256(result))
    beside = outputs.notes_on_folder(model, output)
    return BlocksPruned(request, stacks, before, replace(after, path=str(target.parent)), (*notes, *beside))


def _stats(model: ModelFile, *, beside: int = 0) -> ModelStats:
    """Sizes and parameters: what is copied as it is need not be read for the zeros in it, where that takes long.

    What is left of a big model is measured as little as the model, beside which it is shown.
    """
    if max(model.nbytes, beside) <= outputs.BIG_BYTES:
        return stats_for_report(model)
    return measure_stats(model, model.tensors, has_zeros=False)


def check(request: PruneRequest) -> None:
    """Refuse options that do not go with blocks, before a file is opened."""
    plain = PruneRequest()
    others = {"--scope": "scope", "--policy": "policy", "--nan": "nan", "--param": "params", "--pack": "is_packed"}
    for option, field in others.items():
        if getattr(request, field) != getattr(plain, field):
            raise UsageError(f"{option} cannot be used with --pattern layers, which removes whole blocks")
    data_options = (request.loss, request.samples, request.batch_size)
    if request.loss or (not request.data and data_options != ("", SAMPLES, BATCH_SIZE)):
        option = "--loss" if request.loss else "--samples or --batch-size without --data"
        raise UsageError(f"{option} has no effect with --pattern layers", hint="leave it out")
    amounts = [request.blocks is not None, request.sparsity is not None, bool(request.only)]
    if sum(amounts) != 1:
        raise UsageError(
            "--pattern layers needs one of --blocks, --sparsity and --layers",
            hint="add --blocks 4, -s 25%, or --layers 20-23",
        )
    name = _strategy(request)
    if name == INFLUENCE and not request.data:
        raise UsageError(f"the strategy {name} needs data", hint="add --data corpus.txt")
    if request.data and name != INFLUENCE:
        raise UsageError(
            f"--data has no effect: the strategy {name} uses no data",
            hint=f"leave out --data, or use --strategy {INFLUENCE}",
        )
    if request.only:
        _ranges(request.only)


def _strategy(request: PruneRequest) -> str:
    """Which blocks go where they are not named: the last ones unless it is said."""
    name = LAST if request.strategy == PruneRequest().strategy else request.strategy
    if name not in STRATEGIES:
        raise UsageError(
            f"the strategy {request.strategy} cannot be used with --pattern layers",
            hint=f"use {' or '.join(STRATEGIES)}",
        )
    if request.only and name != LAST:
        raise UsageError(f"--layers names the blocks, and --strategy {name} chooses them", hint="leave out one of them")
    return name


def _ranges(text: str) -> dict[str, set[int]]:
    """The numbers that `20-23` or `encoder:0,decoder:4-5` names, by the name of their stack."""
    ranges: dict[str, set[int]] = {}
    name = ""
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None or (match[3] is not None and int(match[3]) < int(match[2])):
            raise UsageError(
                f"--layers {text!r} does not name blocks", hint="write --layers 20-23, or --layers decoder:4,6"
            )
        name = match[1] or name
        ranges.setdefault(name, set()).update(range(int(match[2]), int(match[3] or match[2]) + 1))
    return ranges


def _check_model(model: ModelFile, output: Destination | None) -> None:
    if model.folder is None:
        raise UsageError(
            f"--pattern layers needs a model folder with its {CONFIG}, but {model.path} is a file",
            hint="name the folder",
        )
    # By content: a pickle may have the name of safetensors, and is opened as what it is.
    odd = [file for file in _weight_files(model) if file.suffix != _SUFFIX or recognise(file).name != "safetensors"]
    if odd:
        name = model.path.name if odd[0].suffix != _SUFFIX else f"{odd[0].name}, which holds something else"
        raise UsageError(
            f"--pattern layers needs safetensors, but {model.folder} has {abbreviated(name)}",
            hint=f"prunectl export {model.folder} -o FOLDER",
        )
    if output is not None and (output.is_in_place or not outputs.is_folder(model, output)):
        raise UsageError(
            f"--pattern layers writes a folder, because {CONFIG} changes with the weights", hint="write -o FOLDER"
        )


def _weight_files(model: ModelFile) -> list[Path]:
    return [file for file in model.files if model.format != "shards" or file != model.path]


def _family(model: ModelFile, config: Mapping[str, Any]) -> ModelFamily:
    if not config:
        raise InputError(f"{model.folder} has no {CONFIG}, which says how many blocks there are")
    model_type = config.get("model_type")
    family = family_of(model_type) if isinstance(model_type, str) else None
    if family is None:
        keys = [key for key in sorted(COUNTS) if lookup(config, key) is not None]
        looked = f"{keys[0]} counts its blocks" if keys else f"none of {', '.join(sorted(COUNTS))} counts its blocks"
        raise InputError(
            f"the {CONFIG} of {model.folder} has the model_type {abbreviated(str(model_type))!r}, a family "
            f"whose blocks prunectl does not know: {looked}",
            hint="the families are listed under --pattern layers in docs/prune.md",
        )
    return family


def _note_influence(influence: Sequence[float], cuts: Sequence[BlockCut]) -> tuple[str, ...]:
    """Say how little the removed blocks did, beside those that are kept."""
    if not influence:
        return ()
    removed = {number for cut in cuts for number in cut.removed}
    shown = ", ".join(f"{number} ({influence[number]:.3g})" for number in sorted(removed))
    least = min(value for number, value in enumerate(influence) if number not in removed)
    return (f"Block influence of what was removed: {shown}; of the blocks that were kept at least {least:.3g}.",)


def _cuts(
    model: ModelFile,
    config: Mapping[str, Any],
    family: ModelFamily,
    request: PruneRequest,
    influence: Sequence[float],
) -> list[BlockCut]:
    """Which blocks go, held against the blocks that there are."""
    stacks = {stack.name: (stack, _count(model, config, stack)) for stack in family.stacks}
    shown = ", ".join(f"{name} ({count})" for name, (_, count) in stacks.items())
    last = list(stacks)[-1]
    example = f"--layers {last}:{stacks[last][1] - 1}"
    if request.only:
        wanted = _ranges(request.only)
        if odd := wanted.keys() - stacks.keys():
            several = f"its stacks are {shown}: write {example}"
            hint = several if len(stacks) > 1 else f"write numbers alone: --layers {stacks[last][1] - 1}"
            if min(odd):
                raise UsageError(f"--layers {request.only}: {min(odd)} is not a stack of {model.folder}", hint=hint)
            raise UsageError(f"--layers {request.only} does not say of which stack of {model.folder}", hint=hint)
    elif len(stacks) > 1:
        raise UsageError(f"{model.folder} has several stacks of blocks: {shown}", hint=f"name them: {example}")
    else:
        (_, count), *_ = stacks.values()
        number = request.blocks if request.blocks is not None else round((request.sparsity or 0) * count)
        if not 0 < number < count:
            raise UsageError(f"{number} of {count} blocks cannot be removed from {model.folder}")
        if influence and len(influence) != count:
            raise InputError(f"{model.folder} has {count} blocks ({CONFIG}), but {len(influence)} ran")
        wanted = {"": chosen(_strategy(request), count, number, influence)}
    cuts = []
    for name, numbers in wanted.items():
        stack, count = stacks[name]
        if max(numbers) >= count or len(numbers) == count:
            reason = f"{max(numbers)} is none of them" if max(numbers) >= count else "one must stay"
            raise UsageError(f"{model.folder} has the blocks 0 to {count - 1} ({stack.key}): {reason}")
        cuts.append(BlockCut(stack, count, tuple(sorted(numbers)), block_pattern(stack)))
    return cuts


def chosen(strategy: str, count: int, number: int, influence: Sequence[float] = ()) -> set[int]:
    """Which of so many blocks go by a strategy.

    >>> sorted(chosen("even", 12, 4))
    [2, 4, 7, 9]
    """
    if influence:
        return set(sorted(range(count), key=influence.__getitem__)[:number])
    if strategy == LAST:
        return set(range(count - number, count))
    # The first and the last block do most, and stay as long as others can go.
    first, inner = (1, count - 2) if number <= count - 2 else (0, count)
    return {first + int((place + 0.5) * inner / number) for place in range(number)}


def _count(model: ModelFile, config: Mapping[str, Any], stack: Stack) -> int:
    count = count_of(config, stack)
    if count is None:
        raise InputError(f"the {CONFIG} of {model.folder} has no {stack.key}, which counts the blocks")
    pattern = block_pattern(stack)
    numbers = {int(match[1]) for tensor in model.tensors if (match := pattern.search(tensor.name))}
    extra = lookup(config, _EXTRA)
    most = count + (extra if type(extra) is int and extra > 0 else 0)
    if count > len(numbers) or not set(range(count)) <= numbers or (numbers and max(numbers) >= most):
        raise InputError(
            f"{model.folder} holds {len(numbers)} blocks by the names of its tensors, but its {CONFIG} counts {count} "
            f"({stack.key})"
        )
    return count


def _shown(model: ModelFile, cut: BlockCut) -> str:
    """What stands before the numbers of a stack, as the tensors have it."""
    for tensor in model.tensors:
        if match := cut.pattern.search(tensor.name):
            return tensor.name[: match.start(1) - 1]
    return cut.stack.name


def new_names(tensors: Sequence[Tensor], cuts: Sequence[BlockCut]) -> dict[str, str]:
    """What the tensors that stay are called, by their names so far."""
    names = {tensor.name: tensor.name for tensor in tensors}
    for cut in cuts:
        first, parts, gone = cut.kept[0], cut.stack.first_only, set(cut.removed)
        matches = {name: match for name in names if (match := cut.pattern.search(name)) is not None}
        has_own = any(int(match[1]) == first and parts in name for name, match in matches.items()) if parts else True
        for name, match in matches.items():
            number = int(match[1])
            if number not in gone:
                names[name] = f"{name[: match.start(1)]}{cut.new_number(number)}{name[match.end(1) :]}"
            elif number != 0 or has_own or parts not in name:
                del names[name]
    return names


def _write_weights(model: ModelFile, names: Mapping[str, str], folder: Path) -> None:
    """Write each file of weights without what goes, and the index; a file that would be empty is left out."""
    by_file: dict[Path, list[Tensor]] = {file: [] for file in _weight_files(model)}
    for tensor in model.tensors:
        if tensor.name in names and tensor.storage.extent is not None:
            by_file[tensor.storage.extent.path].append(tensor)
    filled = {file: tensors for file, tensors in by_file.items() if tensors}
    called = {file: file.name for file in filled}
    if len(filled) < len(by_file):
        numbers = re.compile(r"-\d+-of-\d+(?=\.safetensors$)")
        called = {
            file: numbers.sub(f"-{number:05}-of-{len(filled):05}", file.name) for number, file in enumerate(filled, 1)
        }
    for file, tensors in filled.items():
        entries = [unchanged_entry(tensor, names[tensor.name]) for tensor in sorted(tensors, key=_offset)]
        write_entries(folder / called[file], header_without_tensors(file), entries)
    if model.format != "shards":
        return
    index = read_object(model.path, "the index")
    kept = [tensor for tensors in filled.values() for tensor in tensors]
    owners = {names[tensor.name]: called[file] for file, tensors in filled.items() for tensor in tensors}
    metadata = index.get("metadata")
    totals = {"total_size": sum(tensor.nbytes for tensor in kept), "total_parameters": sum(t.size for t in kept)}
    if isinstance(metadata, dict):
        index["metadata"] = {**metadata, **{key: total for key, total in totals.items() if key in metadata}}
    index["weight_map"] = dict(sorted(owners.items()))
    (folder / model.path.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _offset(tensor: Tensor) -> int:
    return tensor.storage.extent.offset if tensor.storage.extent is not None else 0


def _verify(model: ModelFile, names: Mapping[str, str], result: ModelFile) -> None:
    """Compare what was written with what it comes from, bit by bit."""
    written = {tensor.name: tensor for tensor in result.tensors}
    if odd := written.keys() ^ set(names.values()):
        raise WorkError(f"{min(odd)} is missing or unexpected in the output; nothing was written")
    for tensor in model.tensors:
        if tensor.name in names and not bitwise_equal(model, tensor, result, written[names[tensor.name]]):
            raise WorkError(f"{tensor.name} has different values in the output; nothing was written")
