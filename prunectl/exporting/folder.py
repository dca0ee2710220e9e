"""Export of a model folder to a folder: its weights in another container, sharding or precision, its files copied."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, UsageError
from prunectl.exporting.compare import ExportResult
from prunectl.exporting.job import ExportJob
from prunectl.exporting.request import ExportRequest
from prunectl.exporting.routes import TARGETS, Target, check_options
from prunectl.exporting.weights import (
    cast_tensor,
    check_equal,
    check_types,
    exported_dtype,
    exported_tensors,
    save_tensors,
)
from prunectl.formats import atomic
from prunectl.formats.base import QUANTISED, ModelFile, Tensor
from prunectl.formats.families import CONFIG, HEAD, read_config, tie_flags
from prunectl.formats.folder import MASKS_IN_SHARDS, companions, copy_companions, training_state
from prunectl.formats.registry import SUFFIXES, by_name, is_inside_folder, open_model, resolve
from prunectl.formats.safe_json import require, write_object
from prunectl.formats.safetensors import CODES, shard_of
from prunectl.pruning.destination import Destination
from prunectl.pruning.plan import QUANTISER
from prunectl.pruning.strip import stats_for_report

_STEMS = {
    "safetensors": {"pytorch_model": "model"},
    "torch": {"model": "pytorch_model"},
}
"""New file stems of weights by target container and old stem, as `transformers` names them."""
_SUFFIX = {"safetensors": ".safetensors", "torch": ".bin"}
_QUANTISATION = ("quantization_config", "compression_config")
"""Objects of a config about quantisation; the second is that of older compressed-tensors."""
_SHARD = re.compile(r"-\d+-of-\d+$")
_COPY = re.compile(r"(?:^|\.)(encoder|decoder)\.embed_tokens\.weight$")
_SHARED = re.compile(r"(?:^|\.)shared\.weight$")
"""The embedding that encoder and decoder share: `transformers` ties their own embeddings to it."""


def makes_folder(path: Path, request: ExportRequest, output: Destination) -> bool:
    """Whether the output is a folder: the source is one, and neither --output nor --to asks for a single file."""
    suffixes = SUFFIXES | {target.suffix for target in TARGETS if target.suffix}
    is_file = output.to_stdout or output.target.suffix.lower() in suffixes
    return not is_file and request.to in {"", *_SUFFIX} and path.is_dir() and resolve(path) != path


@dataclass(frozen=True, slots=True)
class _Shard:
    """A file of weights to write."""

    name: str
    tensors: tuple[Tensor, ...]


def export_folder(path: Path, request: ExportRequest, output: Destination) -> ExportResult:
    """Write a folder's weights in another container, sharding or precision, and copy its other files."""
    target = next(target for target in TARGETS if target.name == (request.to or "safetensors"))
    request = replace(request, to=target.name)
    _check(request, target)
    model = open_model(path)
    if model.about.pruning_wrappers:
        hint = f"remove them first: prunectl strip {path} -o OUT"
        if model.format == "shards":
            hint = MASKS_IN_SHARDS
        raise InputError(f"{path} contains pruning masks", hint=hint)
    atomic.check_target(model, output.target, is_forced=output.is_forced, is_in_place=False)
    if target.name == "torch":
        require("torch", extra="torch")
    job = ExportJob(model, request)
    check_types(job, frozenset(CODES), target.title)
    tensors, copies = _without_copies(model, exported_tensors(model))
    shards, index = _shards(job, tensors)
    config, changed = _config(model, request)
    with atomic.atomic_replace(output.target, may_replace=output.is_forced, model=model) as folder:
        inside = folder / output.target.name
        inside.mkdir()
        for shard in shards:
            _write(job, shard, inside / shard.name)
        if index is not None:
            _write_index(job, shards, inside / index)
        left_out = {*training_state(model), *([Path(CONFIG)] if changed else [])}
        copy_companions(model, inside, left_out)
        if changed:
            write_object(inside / CONFIG, config)
        written = open_model(inside)
        by_name_written = {tensor.name: tensor for tensor in written.tensors}
        check_equal(job, tensors, by_name_written, lambda name: written.read(by_name_written[name]))
        before, after = stats_for_report(model), replace(stats_for_report(written), path=str(output.target))
    uncopied = companions(model).notes(path, "the same weights in another form, and not copied")
    notes = (*changed, *_note_copies(copies), *uncopied)
    return ExportResult(before, after, by_name(model.format).title, target.title, None, notes)


def _check(request: ExportRequest, target: Target) -> None:
    check_options(target, request.given_options)
    if request.half and request.bf16:
        raise UsageError("--half and --bf16 cannot be used together")
    if request.shard_size is not None and request.shard_size < 1:
        raise UsageError(
            f"--shard-size must be at least 1 byte, not {request.shard_size}", hint="write --shard-size 5GB"
        )
    for option in ("code", "sparse", "pack", "card"):
        if getattr(request, option):
            raise UsageError(
                f"--{option} cannot be used with a folder as output", hint=f"write one file: -o OUT{target.suffix}"
            )
    if request.metadata and target.name != "safetensors":
        raise UsageError("--metadata cannot be used with .bin files")


def _without_copies(model: ModelFile, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[str]]:
    """The tensors without tied copies, which `transformers` restores on loading, and the names of these copies."""
    config = read_config(model, CONFIG)
    # Without a config, nothing is tied on loading. If its parts disagree about ties, keeping the copies does no harm.
    if not config or False in tie_flags(config):
        return tuple(tensors), []
    by_view: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        by_view.setdefault(tensor.view_key, []).append(tensor)
    copies: set[str] = set()
    for group in by_view.values():
        names = [tensor.name for tensor in group]
        heads = {name for name in names if HEAD.search(name)}
        if len(names) > len(heads):
            copies |= heads
        if any(map(_SHARED.search, names)):
            copies |= set(filter(_COPY.search, names))
    return tuple(tensor for tensor in tensors if tensor.name not in copies), sorted(copies)


def _note_copies(names: Sequence[str]) -> tuple[str, ...]:
    return (f"{', '.join(names[:3])}: not written, because it is tied to the embedding.",) if names else ()


def _shards(job: ExportJob, tensors: Sequence[Tensor]) -> tuple[list[_Shard], str | None]:
    """The files to write with their tensors, and the name of the index if there are several files."""
    model, size = job.file, job.request.shard_size
    groups: list[list[Tensor]] = []
    if size is None:
        # The sharding of the source is kept.
        by_file: dict[str, list[Tensor]] = {}
        for tensor in tensors:
            by_file.setdefault(shard_of(tensor) if model.format == "shards" else "", []).append(tensor)
        groups = list(by_file.values())
    else:
        full = size
        for tensor in tensors:
            nbytes = tensor.size * exported_dtype(job, tensor).itemsize
            if not groups or full + nbytes > size:
                groups.append([])
                full = 0
            groups[-1].append(tensor)
            full += nbytes
    stem, suffix = _stem(model, job.request.to), _SUFFIX[job.request.to]
    if len(groups) == 1:
        return [_Shard(stem + suffix, tuple(groups[0]))], None
    shards = [
        _Shard(f"{stem}-{number:05}-of-{len(groups):05}{suffix}", tuple(group))
        for number, group in enumerate(groups, 1)
    ]
    return shards, f"{stem}{suffix}.index.json"


def _stem(model: ModelFile, to: str) -> str:
    # A file in a subfolder, as DeepSpeed writes for each step without ZeRO, is not named after the model.
    is_checkpoint = by_name(model.format).is_of_ranks or is_inside_folder(model)
    name = "" if is_checkpoint else model.path.name.partition(".")[0]
    stem = _SHARD.sub("", name) or "model"
    return _STEMS[to].get(stem, stem)


def _write(job: ExportJob, shard: _Shard, path: Path) -> None:
    """Write one file, with one tensor in memory at a time for safetensors, and the whole shard for PyTorch."""
    if job.request.to == "torch":
        arrays = ((tensor.name, tensor.view_key, cast_tensor(job, tensor)) for tensor in shard.tensors)
        importlib.import_module("prunectl.exporting.torch").save_state(arrays, path)
        return
    save_tensors(job, shard.tensors, {"format": "pt", **dict(sorted(job.request.metadata))}, path)


def _write_index(job: ExportJob, shards: Sequence[_Shard], path: Path) -> None:
    total = sum(tensor.size * exported_dtype(job, tensor).itemsize for shard in shards for tensor in shard.tensors)
    owners = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(owners.items()))}
    write_object(path, index)


def _config(model: ModelFile, request: ExportRequest) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config with the dtype that is written, and a note if this changed the config."""
    narrow = "float16" if request.half else "bfloat16" if request.bf16 else ""
    config = read_config(model, CONFIG) if narrow else {}
    is_declared = any(inner.get(key) for inner in _objects(config) for key in _QUANTISATION)
    # A config may also say that nothing is quantised, each method in its own words.
    if is_declared and any(QUANTISER.fullmatch(t.name) or t.dtype.name in QUANTISED for t in model.tensors):
        raise UsageError(
            f"the {CONFIG} of {model.folder} says that the weights are quantized: their scales keep their types",
            hint="use the folder that it was made from",
        )
    is_changed = False
    for inner in _objects(config):
        for key in ("dtype", "torch_dtype"):
            if isinstance(inner.get(key), str) and inner[key] != narrow:
                inner[key] = narrow
                is_changed = True
    return config, (f"{CONFIG} was changed: its dtype is {narrow} now.",) if is_changed else ()


def _objects(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for key, value in config.items():
        if key.endswith("_config") and key not in _QUANTISATION and isinstance(value, dict):
            yield from _objects(value)
