"""How much does each layer suffer from pruning? Every tensor alone, at a few sparsities."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np

from prunectl.calibrating.opening import Opened, opened
from prunectl.calibrating.said import said
from prunectl.calibrating.sensitivity.found import SPARSITIES, LayerSensitivity, Point, Score, Sensitivity
from prunectl.calibrating.sensitivity.outputs import Errors, output_errors
from prunectl.calibrating.sensitivity.scores import base_score, prepare, scores_of
from prunectl.calibrating.sensitivity.weights import dead_from, levels, weight_errors
from prunectl.errors import UsageError
from prunectl.formats.base import PARAMETRIZATION, Array, ModelFile, Tensor
from prunectl.formats.names import select
from prunectl.measuring.meter import Meter, unwatched
from prunectl.measuring.ties import ties
from prunectl.pruning.request import Request

_Looked = tuple[list[LayerSensitivity], tuple[str, ...]]


def sensitivity(
    model: ModelFile, request: Request, *, layers: str = "", is_trusted: bool = False, meter: Meter = unwatched
) -> Sensitivity:
    """Return how much the prunable tensors of a model suffer; with data, also what they make of it."""
    tensors = _prunable(model, layers)
    if not tensors:
        return Sensitivity((), notes=("Sensitivity is that of kernels, and there is none among these tensors.",))
    if not request.data:
        looked, notes = _look(model, tensors, None, None, meter)
        return Sensitivity(tuple(looked), notes=(*_wrapped(model), *notes))
    found = opened(model, request, is_trusted=is_trusted, needs_targets=False, has_reference=False)
    with closing(found):
        base, said = _base(model, found, request)
        looked, notes = _look(model, tensors, found, base, meter)
        own = found.trained.notes if found.trained is not None and base is not None else ()
        notes = tuple(dict.fromkeys((*found.notes, *own, *said, *notes)))
        return Sensitivity(tuple(looked), request.data, found.calibration.examples, base, notes)


def _prunable(model: ModelFile, layers: str) -> tuple[Tensor, ...]:
    """Return what the default policy prunes, each storage once."""
    chosen = select(model, layers) if layers else model.tensors
    willing = [one for one in chosen if one.is_prunable and one.size and one.name not in model.copies]
    tied = ties(willing)
    return tuple(tensor for tensor in willing if tensor.name not in tied)


def _wrapped(model: ModelFile) -> tuple[str, ...]:
    if all(wrapper.kind == PARAMETRIZATION for wrapper in model.about.wrappers):
        return ()
    return ("It was not looked at what the masks of its pruning wrappers hide: `prunectl strip` applies them.",)


def _base(model: ModelFile, found: Opened, request: Request) -> tuple[Score | None, tuple[str, ...]]:
    """Return how well the model answers as it is, and why not if that cannot be told."""
    batches = found.calibration.batches
    has_targets = batches[0].y is not None
    if found.trained is not None and has_targets:
        prepare(found.trained, batches, request.loss, request.seed, request.data)
        return base_score(found.trained, batches), ()
    why = (
        f"{request.data} has no targets"
        if not has_targets
        else f"{model.path} runs in onnxruntime, where no loss is taken and the targets of {request.data} are not used"
    )
    if request.loss:
        raise UsageError(f"--loss is for examples with targets in a model that can be trained: {why}")
    return None, (f"Only the outputs of each layer were compared: {why}.",)


def _look(
    model: ModelFile, tensors: Sequence[Tensor], found: Opened | None, base: Score | None, meter: Meter
) -> _Looked:
    """Return what becomes of each tensor, one after the other so that only one is held at a time."""
    looked: list[LayerSensitivity] = []
    broken, unseen = [], []
    held = frozenset(found.trained.tensors()) if found is not None and found.trained is not None else None
    with meter(f"pruning {model.path.name} tensor by tensor", sum(tensor.nbytes for tensor in tensors)) as bar:
        for tensor in tensors:
            weights = np.array(model.read(tensor))
            if not np.isfinite(weights).all():
                broken.append(tensor.name)
                bar.advance(tensor.nbytes)
                continue
            is_known = found is not None and (held is None or tensor.name in held)
            layer = _layer(tensor, weights, found if is_known else None, base)
            if found is not None and layer.points[0].output_error is None:
                unseen.append(tensor.name)
            looked.append(layer)
            bar.advance(tensor.nbytes)
    notes = (
        *said("left out, as not all of their numbers are finite", broken),
        *said("what they meet cannot be seen, so that their output error is not known", unseen),
    )
    return looked, notes


def _layer(tensor: Tensor, weights: Array, found: Opened | None, base: Score | None) -> LayerSensitivity:
    gone = levels(weights)
    errors: Errors | None = None
    scores: tuple[Score | None, ...] = (None,) * len(SPARSITIES)
    if found is not None:
        errors = output_errors(found.calibration, tensor, weights, gone)
        if base is not None and found.trained is not None:
            scores = scores_of(found.trained, found.calibration.batches, tensor.name, weights, gone)
    lines = zip(SPARSITIES, weight_errors(weights, gone), errors or (None,) * len(SPARSITIES), scores, strict=True)
    points = tuple(Point(*line) for line in lines)
    return LayerSensitivity(tensor.name, tensor.size, points, dead_from(weights, gone, tensor.out_axis))
