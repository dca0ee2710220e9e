"""Depth pruning: remove whole blocks from a model folder, and adapt its config and the block numbers in names.

ShortGPT (Men et al. 2024) and LaCo showed how little many of the later blocks contribute. No model is built: tensors
are copied under their new names, file by file; only block influence runs the model.
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
    INFLUENCE: "blocks that change their inputs least, as --data shows",
}
"""The strategies that choose blocks, if --layers does not name them."""
Measure = Callable[[ModelFile], tuple[Sequence[float], tuple[str, ...]]]
"""Measures the influence of each block; also returns notes on the data."""
_EXTRA = "num_nextn_predict_layers"
"""Key of the number of blocks after the counted ones that predict further tokens (DeepSeek's MTP)."""
_RANGE = re.compile(r"(?:([a-z]+):)?(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True, slots=True)
class RemovedBlocks:
    """The blocks that were removed from one stack."""

    name: str
    """The prefix before the block numbers, such as `model.layers`."""
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
    """Notes for the user, such as on changes of the config."""

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
    """Remove blocks from a model folder; without an output nothing is written."""
    check(request)
    model = open_model(path)
    _check_model(model, output)
    outputs.check(model, output)
    config = read_config(model, CONFIG)
    family = _family(model, config)
    influence: Sequence[float] = ()
    data_notes: tuple[str, ...] = ()
    if measure is not None and _strategy(request) == INFLUENCE:
        # Refuses an impossible request before the model is run.
        _cuts(model, config, family, request, ())
        with unchanged(model.states):
            influence, data_notes = measure(model)
    cuts = _cuts(model, config, family, request, influence)
    names = new_names(model.tensors, cuts)
    new_config, notes = shortened(model, config, family, cuts)
    notes = (*notes, *data_notes, *_note_influence(influence, cuts))
    stacks = tuple(RemovedBlocks(_shown(model, cut), cut.count, cut.removed) for cut in cuts)
    before = _stats(model)
    if output is None:
        kept = [tensor for tensor in model.tensors if tensor.name in names]
        with unchanged(model.states):
            after = measure_stats(model, kept, has_channels=False, has_zeros=model.nbytes <= outputs.BIG_BYTES)
        saved = sum(tensor.nbytes for tensor in model.tensors) - sum(tensor.nbytes for tensor in kept)
        return BlocksPruned(
            request, stacks, before, replace(after, path="the result", bytes=SizeStats(before.bytes.raw - saved)), notes
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
    """Sizes and parameters; the zeros of a big model are not counted, since its tensors are copied unchanged.

    The output of a big model is measured in the same way as the model, beside which it is shown.
    """
    if max(model.nbytes, beside) <= outputs.BIG_BYTES:
        return stats_for_report(model)
    return measure_stats(model, model.tensors, has_zeros=False)


def check(request: PruneRequest) -> None:
    """Refuse options that cannot be used with depth pruning, before a file is opened."""
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
    """The strategy that chooses blocks: by default the last ones."""
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
    # By content, since a pickle may have the suffix of safetensors.
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
    """A note with the influence of the removed blocks, and the least influence of a kept one."""
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
    """The blocks to remove from each stack, checked against the blocks that the model has."""
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
    """The numbers of the blocks that a strategy removes.

    >>> sorted(chosen("even", 12, 4))
    [2, 4, 7, 9]
    """
    if influence:
        return set(sorted(range(count), key=influence.__getitem__)[:number])
    if strategy == LAST:
        return set(range(count - number, count))
    # The first and the last block contribute most, and are kept as long as others can be removed.
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
    """The prefix before the block numbers of a stack, as in the names of the tensors."""
    for tensor in model.tensors:
        if match := cut.pattern.search(tensor.name):
            return tensor.name[: match.start(1) - 1]
    return cut.stack.name


def new_names(tensors: Sequence[Tensor], cuts: Sequence[BlockCut]) -> dict[str, str]:
    """The new names of the kept tensors, by their old names."""
    names = {tensor.name: tensor.name for tensor in tensors}
    for cut in cuts:
        first, parts, removed = cut.kept[0], cut.stack.first_only, set(cut.removed)
        matches = {name: match for name in names if (match := cut.pattern.search(name)) is not None}
        has_own = any(int(match[1]) == first and parts in name for name, match in matches.items()) if parts else True
        for name, match in matches.items():
            number = int(match[1])
            if number not in removed:
                names[name] = f"{name[: match.start(1)]}{cut.new_number(number)}{name[match.end(1) :]}"
            elif number != 0 or has_own or parts not in name:
                del names[name]
    return names


def _write_weights(model: ModelFile, names: Mapping[str, str], folder: Path) -> None:
    """Write each file of weights without the removed tensors, and the index; empty files are left out."""
    by_file: dict[Path, list[Tensor]] = {file: [] for file in _weight_files(model)}
    for tensor in model.tensors:
        if tensor.name in names and tensor.storage.extent is not None:
            by_file[tensor.storage.extent.path].append(tensor)
    filled = {file: tensors for file, tensors in by_file.items() if tensors}
    file_names = {file: file.name for file in filled}
    if len(filled) < len(by_file):
        numbers = re.compile(r"-\d+-of-\d+(?=\.safetensors$)")
        file_names = {
            file: numbers.sub(f"-{number:05}-of-{len(filled):05}", file.name) for number, file in enumerate(filled, 1)
        }
    for file, tensors in filled.items():
        entries = [unchanged_entry(tensor, names[tensor.name]) for tensor in sorted(tensors, key=_offset)]
        write_entries(folder / file_names[file], header_without_tensors(file), entries)
    if model.format != "shards":
        return
    index = read_object(model.path, "the index")
    kept = [tensor for tensors in filled.values() for tensor in tensors]
    owners = {names[tensor.name]: file_names[file] for file, tensors in filled.items() for tensor in tensors}
    metadata = index.get("metadata")
    totals = {"total_size": sum(tensor.nbytes for tensor in kept), "total_parameters": sum(t.size for t in kept)}
    if isinstance(metadata, dict):
        index["metadata"] = {**metadata, **{key: total for key, total in totals.items() if key in metadata}}
    index["weight_map"] = dict(sorted(owners.items()))
    (folder / model.path.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _offset(tensor: Tensor) -> int:
    return tensor.storage.extent.offset if tensor.storage.extent is not None else 0


def _verify(model: ModelFile, names: Mapping[str, str], result: ModelFile) -> None:
    """Compare the written tensors with those of the input, bit by bit."""
    written = {tensor.name: tensor for tensor in result.tensors}
    if odd := written.keys() ^ set(names.values()):
        raise WorkError(f"{min(odd)} is missing or unexpected in the output; nothing was written")
    for tensor in model.tensors:
        if tensor.name in names and not bitwise_equal(model, tensor, result, written[names[tensor.name]]):
            raise WorkError(f"{tensor.name} has different values in the output; nothing was written")
