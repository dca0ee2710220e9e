"""Training a saved model, from a file to a file: zeros stay zero, or become more along a schedule."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import PARAMETRIZATION, Array, ModelFile
from prunectl.formats.names import select
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.table import open_model
from prunectl.measuring.survey import Survey
from prunectl.pruning import output as outputs
from prunectl.pruning.output import Output
from prunectl.pruning.selection import Mask
from prunectl.pruning.strip import surveyed
from prunectl.training import trusted
from prunectl.training.better import Decider, check_direction, decider
from prunectl.training.course import Course, course
from prunectl.training.data.source import Order
from prunectl.training.diary import Diary, Entry, Watcher
from prunectl.training.keeper import Keeper, Rules
from prunectl.training.loop import Data, Lesson, Progress, evaluated, train
from prunectl.training.memory import keep_freed
from prunectl.training.native_rules import keeper_of
from prunectl.training.network import Logs, Network
from prunectl.training.points import parse_point
from prunectl.training.reading import Read, count, look_over, read
from prunectl.training.request import DEFAULT_EPOCHS, Keep, MaskMode, Request, check
from prunectl.training.rules import rules_of, zeros_of
from prunectl.training.runtimes import open_network
from prunectl.training.saver import Saver
from prunectl.training.stopping import Stopping
from prunectl.training.teachers import Teacher, open_teacher, origin_of
from prunectl.training.wrap.kept import kept
from prunectl.training.wrap.result import check_wrappable, wrap_in_place, wrapping_of
from prunectl.training.wrap.wrapping import Wrapping, unwrapped
from prunectl.training.write_back import write_back


@dataclass(frozen=True, slots=True)
class Finetuned:
    """What came of a run."""

    request: Request
    course: Course
    before: Survey
    after: Survey
    judged_before: Logs
    """Loss and metrics on the validation data, before training."""
    judged_after: Logs
    history: tuple[Entry, ...]
    best_epoch: int | None
    masked: int
    """How many weights the masks hold at zero."""
    kept: int
    """How many of them are zero in the file that was written."""
    notes: tuple[str, ...]
    is_chief: bool = True


def finetune(path: Path, request: Request, output: Output, watcher: Watcher | None = None) -> Finetuned:
    """Train a model, and write it into a copy of its file."""
    check(request)
    if _has_best(request):
        check_direction(request.means)
    model = open_model(path)
    outputs.check(model, output)
    if request.distill:
        teaching = open_model(Path(request.distill))
        trusted.check(teaching, origin_of(teaching, request.origin, request.distill_model))
    saver = _saver(request)
    with (
        _unwrapped(model) as plain,
        closing(open_network(plain, request.origin)) as network,
        ExitStack() as at_the_end,
    ):
        found = read(network, request)
        network.prepare(replace(request.means, frozen=_frozen(plain, request), example=found.example))
        notes = (*found.notes, *look_over(found, network.signature, request))
        planned = _course(request, found, network.ranks[1])
        rules = rules_of(plain, request, planned)
        first = zeros_of(rules.choice, network.weights(rules.names))
        if request.mask is MaskMode.REGROW and not first and rules.schedule is None:
            raise UsageError(f"{path} has no zeros that could move", hint="add --sparsity 80%")
        notes += _already(path, rules, first)
        held = kept(model)
        keeper = keeper_of(network, rules, request, planned, first=first, held=held)
        check_wrappable(plain, request, keeper)
        judged_before = evaluated(network, found.val, planned.batch_size)
        decides = _decider(request, judged_before, network)
        teacher = _teacher(request, network, found)
        if teacher is not None:
            # Its runtime may share what joins the processes with the pupil's: it is let go of when all is done.
            at_the_end.callback(teacher.close)
            notes += teacher.notes
        diary = _diary(network, keeper, request, watcher)
        progress = _train(
            Lesson(
                network, Data(found.train, found.val, request.workers), planned, keeper, diary, saver, teacher, decides
            )
        )
        if request.is_recalibrated:
            notes = (*notes, _recalibrated(network, found, planned))
        judged_after = evaluated(network, found.val, planned.batch_size)
        values, before = network.tensors(), surveyed(model)
        if not network.is_chief:
            return Finetuned(
                request, planned, before, before, judged_before, judged_after, (), None, 0, 0, (), is_chief=False
            )
        wrapping = wrapping_of(keeper, request, held, progress.step) if request.keeps_wrappers else None
        after, zeros = _written(plain, values, keeper, output, wrapping)
        notes = (
            *notes,
            *network.notes,
            *(held.notes(progress.step) if held is not None and not request.prunes else ()),
        )
    return Finetuned(
        request,
        planned,
        before,
        after,
        judged_before,
        judged_after,
        tuple(progress.history),
        progress.best_epoch if planned.keeps_best else None,
        keeper.zeros,
        zeros,
        notes,
    )


@contextmanager
def _unwrapped(model: ModelFile) -> Generator[ModelFile]:
    """Yield a model without masks: what they hold at zero is zero in it."""
    if all(wrapper.kind == PARAMETRIZATION for wrapper in model.about.wrappers):
        yield model
        return
    with temporary_folder() as scratch:
        yield unwrapped(model, scratch)


def _already(path: Path, rules: Rules, first: Mapping[str, Mask]) -> tuple[str, ...]:
    """Say it where a file is sparser than it is asked to become."""
    schedule, size = rules.schedule, sum(mask.size for mask in first.values())
    share = sum(mask.size - np.count_nonzero(mask) for mask in first.values()) / max(size, 1)
    if schedule is None or not rules.has_others or share <= schedule.final:
        return ()
    return (f"{path} is sparser already than {schedule.final:.1%}: its zeros ({share:.1%}) are kept.",)


def _saver(request: Request) -> Saver | None:
    if request.checkpoint_dir is None:
        return None
    saver = Saver(request.checkpoint_dir, request.choices, request.is_resumed)
    saver.check()
    return saver


def _frozen(model: ModelFile, request: Request) -> frozenset[str]:
    return frozenset(tensor.name for word in request.frozen for tensor in select(model, word))


def _has_best(request: Request) -> bool:
    """Whether the result depends on which epoch is the best."""
    is_judged = bool(request.val or request.val_split)
    return is_judged and (request.keep is Keep.BEST or request.early_stop is not None)


def _decider(request: Request, logs: Logs, network: Network) -> Decider | None:
    if not _has_best(request):
        return None
    return decider(logs, request.means, (port.name for port in network.signature.outputs))


def _teacher(request: Request, network: Network, found: Read) -> Teacher | None:
    if not request.distill:
        return None
    return open_teacher(
        Path(request.distill),
        request.origin,
        request.means.device,
        network.signature,
        found.example,
        builder=request.distill_model,
    )


def _course(request: Request, found: Read, ranks: int) -> Course:
    steps, per_epoch = course(
        count(found.train),
        request.batch_size,
        epochs=request.epochs,
        steps=request.steps,
        default_epochs=DEFAULT_EPOCHS,
        ranks=ranks,
    )
    return Course(
        steps,
        per_epoch,
        request.batch_size,
        request.means.seed,
        request.rate,
        parse_point(request.warmup).step(steps, per_epoch),
        request.early_stop,
        request.keep is Keep.BEST,
    )


def _train(lesson: Lesson) -> Progress:
    keep_freed()
    with closing(lesson.diary), Stopping() as stopping:
        return train(lesson, stopping)


def _diary(network: Network, keeper: Keeper, request: Request, watcher: Watcher | None) -> Diary:
    folder = (request.logdir or request.checkpoint_dir) if network.is_chief else None
    diary = Diary(folder, layers=lambda: _by_layer(keeper))
    if watcher is not None and network.is_chief:
        diary.watcher = watcher
    return diary


def _by_layer(keeper: Keeper) -> Logs:
    return {f"sparsity/{name}": 1.0 - float(np.mean(mask)) for name, mask in keeper.masks.items()}


def _recalibrated(network: Network, found: Read, planned: Course) -> str:
    layers = network.recalibrate(found.train.batches(Order(planned.batch_size)))
    if not layers:
        return "The model has no batch normalisation: there was nothing to recalibrate."
    return f"The statistics of {layers} layers with batch normalisation were taken anew from {found.train.name}."


def _written(
    model: ModelFile, values: Mapping[str, Array], keeper: Keeper, output: Output, wrapping: Wrapping | None
) -> tuple[Survey, int]:
    """Write the result, and return what is in it and how many of the masks' zeros are."""
    with outputs.workplace(model, output) as (folder, target):
        places = outputs.places(model, folder, target)
        write_back(model, values, places)
        found = open_model(places.get(model.path, folder / target.name))
        kept = _zeros_in(found, keeper.masks)
        if kept != keeper.zeros:
            raise WorkError(f"{keeper.zeros - kept} of {keeper.zeros} zeros were lost in training; nothing was written")
        if wrapping is not None:
            wrap_in_place(found.path, wrapping)
        after = surveyed(open_model(found.path))
    return replace(after, path=str(target)), kept


def _zeros_in(model: ModelFile, masks: Mapping[str, Mask]) -> int:
    tensors = {tensor.name: tensor for tensor in model.tensors}
    return sum(int(np.count_nonzero(model.read(tensors[name])[~mask] == 0)) for name, mask in masks.items())
