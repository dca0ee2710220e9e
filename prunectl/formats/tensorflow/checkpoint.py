"""TensorFlow checkpoints (an index with its data shards): open, and strip of optimizer state."""

from __future__ import annotations

from pathlib import Path

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import (
    WRAPPING,
    ModelFile,
    ModelInfo,
    PruningWrapper,
    RemovedItem,
    Role,
    StripOptions,
    StripPart,
)
from prunectl.formats.patch import patch_files
from prunectl.formats.tensorflow import object_graph, unwrap
from prunectl.formats.tensorflow import tensors as tensorflow_tensors
from prunectl.formats.tensorflow.bundle import read_bundle
from prunectl.formats.tensorflow.bundle_write import BundleEdits, rewrite_bundle
from prunectl.formats.tensorflow.object_graph import find_ownership
from prunectl.formats.tensorflow.unwrap import storage_keys, training_state


def open_model(path: Path) -> ModelFile:
    """Open a checkpoint by its index."""
    bundle = read_bundle(path)
    objects = object_graph.read(bundle)
    names = objects.full_names
    tensors = tensorflow_tensors.tensors_of(bundle, objects, {})
    pruned = dict.fromkeys(tensor.layer for tensor in tensors if tensor.role in {Role.MASK, Role.SCHEDULE})
    return ModelFile(
        path=path,
        format="tf-checkpoint",
        tensors=tensors,
        about=ModelInfo(
            producer="tensorflow 2" if names else "tensorflow",
            wrappers=tuple(PruningWrapper("tfmot", layer) for layer in pruned),
            optimizer=tensorflow_tensors.optimizer(tensors, names),
        ),
        files=(path, *bundle.shards.values()),
        decode=tensorflow_tensors.decoder(bundle),
    )


def strip(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write the checkpoint without the parts in the options; returns the removed items."""
    if options.to_half:
        raise UsageError(
            f"{model.path} cannot hold 16-bit floats: the program that restores it expects its variables as they are",
            hint="leave out --half",
        )
    if options.parts & WRAPPING and model.about.wrappers:
        raise InputError(
            f"{model.path} has pruning wrappers, around {model.about.wrappers[0].layer} to begin with, "
            "and a checkpoint does not hold the model that they would be taken out of",
            hint="strip the model that was saved as a whole, or only the rest: --only optimizer,training",
        )
    bundle = read_bundle(model.path)
    graph = object_graph.read(bundle)
    optimizer_state = {key: part for key, part in training_state(bundle, graph).items() if part is StripPart.OPTIMIZER}
    if not optimizer_state or StripPart.OPTIMIZER not in options.parts:
        patch_files(model, targets, ())
        return ()
    texts = {}
    if graph.nodes:
        texts[object_graph.KEY] = object_graph.remove_nodes(graph, find_ownership(graph).training_only)
    rewrite_bundle(
        bundle, BundleEdits(drops=storage_keys(bundle, optimizer_state) | optimizer_state.keys(), texts=texts), targets
    )
    return unwrap.removed_items(bundle, optimizer_state)
