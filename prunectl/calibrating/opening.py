"""From a file to a model that can be looked at, with data that fits it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from prunectl.calibrating.calibration import Calibration, taken
from prunectl.errors import UsageError
from prunectl.formats.base import PARAMETRIZATION, ModelFile
from prunectl.pruning.request import Request
from prunectl.training import randomness
from prunectl.training.data.adapt import adapt
from prunectl.training.data.check import check
from prunectl.training.data.source import Order
from prunectl.training.data.spec import open_source
from prunectl.training.network import Means, Network, Origin
from prunectl.training.runtimes import open_network
from prunectl.training.sights import Observed


@dataclass(frozen=True, slots=True)
class Opened:
    """A model with its data."""

    calibration: Calibration
    trained: Network | None
    """The same model, where it is one that can be trained as well."""
    notes: tuple[str, ...]

    def close(self) -> None:
        """Let go of the model."""
        if self.trained is not None:
            self.trained.close()


def opened(model: ModelFile, request: Request, *, is_trusted: bool, needs_targets: bool, has_reference: bool) -> Opened:
    """Open a model in its runtime, and the first examples in an order that the seed decides."""
    if any(wrapper.kind != PARAMETRIZATION for wrapper in model.about.wrappers):
        raise UsageError(
            f"{model.path} has pruning wrappers, and no model runs with them and without them alike",
            hint=f"prunectl strip {model.path} -o plain{model.path.suffix} first",
        )
    randomness.seed(request.seed)
    origin = Origin(request.model, request.custom_objects, is_trusted, request.seed)
    network, trained = _network(model, origin)
    source, notes = adapt(open_source(request.data, signature=network.signature, seed=request.seed), network.signature)
    if needs_targets and not source.has_targets:
        raise UsageError(
            f"{source.name} has no targets, and the strategy {request.strategy} needs the loss of each example",
            hint="--strategy activation-magnitude or obs looks at inputs alone",
        )
    # A stream is not read to its end for the sake of a few examples.
    order = Order(request.batch_size, request.seed, is_shuffled=source.count is not None)
    batches = taken(source.batches(order), request.samples)
    notes += check(source.first(request.samples), network.signature, needs_targets=needs_targets, classes=None)
    if trained is not None and needs_targets:
        trained.prepare(Means(loss=request.loss, optimizer="sgd", lr=0.0, seed=request.seed, example=batches[0]))
    reference = _network(model, origin)[0] if has_reference else None
    return Opened(Calibration(network, batches, reference), trained, tuple(dict.fromkeys(notes)))


def _network(model: ModelFile, origin: Origin) -> tuple[Observed, Network | None]:
    if model.format == "onnx":
        make: Callable[[ModelFile, Origin], Observed] = importlib.import_module(
            "prunectl.training.onnx.open"
        ).open_observed
        return make(model, origin), None
    network = open_network(model, origin)
    if not isinstance(network, Observed):
        raise UsageError(f"{model.path} cannot be looked at while it runs")
    return network, network
