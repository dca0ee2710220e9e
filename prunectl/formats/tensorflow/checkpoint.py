"""TensorFlow checkpoints: an index, and its data shards beside it."""

from __future__ import annotations

from pathlib import Path

from prunectl.formats.base import About, ModelFile, Role, Wrapper
from prunectl.formats.tensorflow import bundle_tensors, object_graph
from prunectl.formats.tensorflow.bundle import read_bundle


def open_model(path: Path) -> ModelFile:
    """Open a checkpoint by its index."""
    bundle = read_bundle(path)
    objects = object_graph.read(bundle)
    names = objects.full_names
    tensors = bundle_tensors.tensors_of(bundle, objects, {})
    pruned = dict.fromkeys(tensor.layer for tensor in tensors if tensor.role in {Role.MASK, Role.SCHEDULE})
    return ModelFile(
        path=path,
        format="tf-checkpoint",
        tensors=tensors,
        about=About(
            producer="tensorflow 2" if names else "tensorflow",
            wrappers=tuple(Wrapper("tfmot", layer) for layer in pruned),
            optimizer=bundle_tensors.optimizer(tensors, names),
        ),
        files=(path, *bundle.shards.values()),
        decode=bundle_tensors.decoder(bundle),
    )
