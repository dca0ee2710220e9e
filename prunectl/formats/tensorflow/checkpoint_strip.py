"""A TensorFlow checkpoint without the state of its optimizers."""

from __future__ import annotations

from pathlib import Path

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import ModelFile
from prunectl.formats.stripping import Part, Removed, Wish
from prunectl.formats.tensorflow import object_graph, object_graph_write, removals
from prunectl.formats.tensorflow.bundle import read_bundle
from prunectl.formats.tensorflow.bundle_rewrite import Changes, rewrite
from prunectl.formats.tensorflow.optimizers import ownership
from prunectl.formats.tensorflow.training_state import pieces, training_state
from prunectl.formats.writing import write_flat

_WRAPPING = frozenset({Part.MASKS, Part.WRAPPERS})


def strip(model: ModelFile, wish: Wish, targets: dict[Path, Path]) -> tuple[Removed, ...]:
    """Write the checkpoint without what the wish names, and return what went."""
    if wish.is_half:
        raise UsageError(
            f"{model.path} cannot hold 16-bit floats: the program that restores it expects its variables as they are",
            hint="leave out --half",
        )
    if wish.parts & _WRAPPING and model.about.wrappers:
        raise InputError(
            f"{model.path} has pruning wrappers, around {model.about.wrappers[0].layer} to begin with, "
            "and a checkpoint does not hold the model that they would be taken out of",
            hint="strip the model that was saved as a whole, or only the rest: --only optimizer,training",
        )
    bundle = read_bundle(model.path)
    graph = object_graph.read(bundle)
    dead = {key: part for key, part in training_state(bundle, graph).items() if part is Part.OPTIMIZER}
    if not dead or Part.OPTIMIZER not in wish.parts:
        write_flat(model, targets, ())
        return ()
    texts = {}
    if graph.nodes:
        texts[object_graph.KEY] = object_graph_write.without(graph, ownership(graph).dead)
    rewrite(bundle, Changes(drops=pieces(bundle, dead) | dead.keys(), texts=texts), targets)
    return removals.removed(bundle, dead)
