"""One model in several files, with a JSON that says which holds what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prunectl.errors import InputError, abbreviated, reading
from prunectl.formats import budgets, registry, state_dict
from prunectl.formats.base import Array, ModelFile, ModelInfo, Tensor
from prunectl.formats.patch import TensorUpdate, patch_files
from prunectl.formats.safe_json import read_object
from prunectl.formats.safetensors import open_undescribed


def open_model(path: Path) -> ModelFile:
    """Open the shards that an index names, as one model."""
    weight_map = read_object(path, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{path} is JSON, but not the index of a sharded checkpoint: it has no weight_map")
    if len(weight_map) > budgets.MAX_INDEX_NAMES:
        raise InputError(f"{path} is refused: it names more than {budgets.MAX_INDEX_NAMES} tensors")
    shards = [_open_shard(path, name) for name in dict.fromkeys(weight_map.values())]
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    held = {tensor.name for tensor in tensors}
    if missing := [name for name in weight_map if name not in held]:
        raise InputError(
            f"{path} is damaged: "
            f"it promises {abbreviated(missing[0])}, which {abbreviated(weight_map[missing[0]])} does not hold"
        )
    described = state_dict.describe(tensors)
    owners = {shard.path.name: shard for shard in shards}

    def decode(tensor: Tensor) -> Array:
        owner, _, key = tensor.storage.key.partition(":")
        return owners[owner].read(replace(tensor, storage=replace(tensor.storage, key=key)))

    return ModelFile(
        path=path,
        format="shards",
        tensors=described,
        about=ModelInfo(
            producer=shards[0].about.producer if shards else "",
            wrappers=state_dict.wrappers(described),
            code=tuple(dict.fromkeys(code for shard in shards for code in shard.about.code)),
            code_bytes=sum(shard.about.code_bytes for shard in shards),
            is_compressed=any(shard.about.is_compressed for shard in shards),
        ),
        files=(path, *(shard.path for shard in shards)),
        decode=decode,
    )


def write(model: ModelFile, targets: dict[Path, Path], rewrites: Sequence[TensorUpdate]) -> None:
    """Write every shard with new numbers in it, and an index that names them as they are called now."""
    names = {source.name: target.name for source, target in targets.items() if source != model.path}
    if all(old == new for old, new in names.items()):
        patch_files(model, targets, rewrites)
        return
    patch_files(model, {source: target for source, target in targets.items() if source != model.path}, rewrites)
    index = read_object(model.path, "the index")
    index["weight_map"] = {tensor: names[shard] for tensor, shard in index["weight_map"].items()}
    targets[model.path].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _open_shard(index: Path, name: str) -> ModelFile:
    if "/" in name or "\\" in name or name in {"", ".", ".."}:
        raise InputError(f"{index} is refused: it names a shard outside its folder: {abbreviated(name)}")
    shard = index.parent / name
    if not shard.is_file():
        raise InputError(f"{index} is incomplete: its shard {abbreviated(name)} is missing")
    prefix = f"{name}:"
    with reading(shard):
        row = registry.recognise(shard)
        if row.name == "shards":
            raise InputError(f"{index} is refused: its shard {abbreviated(name)} is itself an index")
        if row.name == "safetensors":
            # Its names are read beside those of the other shards, and only there.
            return open_undescribed(shard, prefix)
    model = registry.open_model(shard)
    return replace(model, tensors=tuple(_tagged(tensor, prefix) for tensor in model.tensors))


def _tagged(tensor: Tensor, prefix: str) -> Tensor:
    return replace(tensor, storage=replace(tensor.storage, key=f"{prefix}{tensor.storage.key}"))
