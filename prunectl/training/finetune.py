"""Finetuning of a saved model into a copy of its file: zeros stay zero, or grow in number along a schedule."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from prunectl.analysis.stats import ModelStats
from prunectl.analysis.tensor_io import iter_blocks
from prunectl.errors import InputError, UntrustedError, UsageError, WorkError
from prunectl.formats.base import Array, Family, ModelFile, Tensor, select_names
from prunectl.formats.extents import ignoring_mtime
from prunectl.formats.patch import TensorUpdate, in_storage_order, is_writable
from prunectl.formats.registry import by_name, load, open_model
from prunectl.formats.scratch import temporary_files, temporary_folder
from prunectl.pruning import destination as outputs
from prunectl.pruning.destination import Destination
from prunectl.pruning.masks import Mask
from prunectl.pruning.strip import stats_for_report
from prunectl.training import user_code
from prunectl.training.backend import LoadOptions, Logs, ModelSignature, TrainableModel
from prunectl.training.checkpoint import CheckpointManager
from prunectl.training.config import TrainConfig, resolve_steps
from prunectl.training.data.adapt import adapt, check_batches, infer_tasks, require_targets
from prunectl.training.data.next_token import open_labelled, shift_if_causal, user_function
from prunectl.training.data.registry import check_exists
from prunectl.training.data.source import Arrays, Batch, EpochOrder, Source, num_examples, peek, train_val_split
from prunectl.training.data.text import batch_size
from prunectl.training.distillation import Teacher, compare_answers, load_teacher, teacher_load_options
from prunectl.training.logger import LogEntry, ProgressCallback, TrainingLogger
from prunectl.training.loop import (
    DataSplits,
    GracefulInterrupt,
    TrainingRun,
    TrainState,
    evaluate,
    train,
)
from prunectl.training.mask_schedule import MaskScheduler, PruningConfig, make_pruning_config, masks_of_zeros
from prunectl.training.monitor import Monitor, check_direction, make_monitor
from prunectl.training.native_pruning import make_mask_scheduler
from prunectl.training.request import (
    DEFAULT_EPOCHS,
    FinetuneRequest,
    KeepWeights,
    MaskMode,
    check,
    learn_from_teacher,
    parse_time_point,
    resolve_teacher,
)
from prunectl.training.runtimes import load_trainable, with_arrays
from prunectl.training.task import COMPARING_LOSSES
from prunectl.training.wrap import (
    WrapperSpec,
    check_wrappable,
    read_saved_pruning,
    spec_of_result,
    strip_wrappers,
    wrap_in_place,
)

_COUNTING_BATCH = 4096
_EXAMPLE_BATCH = 32
"""The number of examples in the batch that a network is prepared with."""
_SAMPLE_SIZE = 256
"""The number of examples that show whether outputs are logits of a classifier."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Training and validation data, converted to fit a model."""

    train: Source
    val: Source | None
    example: Batch
    notes: tuple[str, ...]
    request: FinetuneRequest
    """The request, with the teacher that replaces targets where the data has none."""

    @property
    def has_targets(self) -> bool:
        """Whether the training data has targets."""
        return self.train.has_targets


def open_training_data(network: TrainableModel, request: FinetuneRequest, model: Path | None = None) -> TrainingData:
    """Open training and validation data; without targets, the unpruned model may become its own teacher."""
    seed, val, val_split = request.means.seed, request.val, request.val_split
    train, notes = _open_adapted(request.data, network, request)
    if not train.has_targets:
        request = learn_from_teacher(request, model)
    if request.needs_targets:
        require_targets(train, network.signature)
    validation: Source | None = None
    if val:
        validation, more = _open_adapted(val, network, request)
        notes += more
    elif val_split:
        train, validation = train_val_split(train, val_split, seed)
    if validation is not None and not request.means.custom_step:
        require_targets(validation, network.signature)
    # The kind of the outputs is inferred from targets: from those of the validation data if there are no others.
    examples = train if validation is None or train.has_targets or request.means.custom_step else validation
    example = peek(examples, batch_size(examples, network.signature, _EXAMPLE_BATCH))
    if example is None:
        raise InputError(f"{train.name} has no examples")
    return TrainingData(train, validation, example, tuple(dict.fromkeys(notes)), request)


def validate_training_data(data: TrainingData, signature: ModelSignature, request: FinetuneRequest) -> tuple[str, ...]:
    """Refuse examples that do not fit the model, once its outputs are known; returns notes for the user."""
    notes: list[str] = []
    tasks = infer_tasks(signature, data.example)
    for source in filter(None, (data.train, data.val)):
        notes += check_batches(source, signature, needs_targets=request.needs_targets, tasks=tasks)
    return tuple(dict.fromkeys(notes))


def count_examples(source: Source) -> int:
    """The number of examples; a stream is read once to count them."""
    if source.count is not None:
        return source.count
    return sum(num_examples(batch) for batch in source.batches(EpochOrder(_COUNTING_BATCH)))


def _open_adapted(spec: str, network: TrainableModel, request: FinetuneRequest) -> tuple[Source, tuple[str, ...]]:
    def predict(x: Arrays) -> Arrays:
        network.place(request.means.device)
        return network.predict(x)

    taken_by = user_function(request.means.loss, request.means.custom_step)
    source, notes = adapt(open_labelled(spec, network.signature, request.means.seed, taken_by), network.signature)
    source = shift_if_causal(source, network.signature, predict, taken_by)
    return source, (*notes, *source.notes)


def write_back(model: ModelFile, values: Mapping[str, Array], places: dict[Path, Path]) -> None:
    """Write a copy of a model file with new values in its tensors."""
    arrays = {**values, **{name: values[of] for name, of in model.duplicates.items() if of in values}}
    rewrites: dict[tuple[str, int], TensorUpdate] = {}
    for tensor in model.tensors:
        if tensor.name not in arrays or _is_same(model, tensor, arrays[tensor.name]):
            continue
        _check(model, tensor, arrays[tensor.name])
        # Tied tensors share their bytes, which are written once.
        rewrites[tensor.storage.key, tensor.start] = TensorUpdate(tensor, partial(_blocks, tensor, arrays[tensor.name]))
    load(by_name(model.format).writer)(model, places, tuple(rewrites.values()))


def _is_same(model: ModelFile, tensor: Tensor, value: Array) -> bool:
    return value.shape == tensor.shape and value.astype(tensor.dtype).tobytes() == model.read(tensor).tobytes()


def _check(model: ModelFile, tensor: Tensor, value: Array) -> None:
    if value.shape != tensor.shape:
        raise WorkError(f"{tensor.name} has the shape {value.shape} after training, but {tensor.shape} in {model.path}")
    if not by_name(model.format).can_reencode and not is_writable(tensor):
        raise WorkError(f"{tensor.name} of {model.path} is not stored contiguously and cannot be replaced")


def _blocks(tensor: Tensor, value: Array) -> Iterator[Array]:
    yield from iter_blocks(in_storage_order(tensor, np.asarray(value).astype(tensor.dtype, copy=False)))


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """The result of a finetuning run."""

    request: FinetuneRequest
    course: TrainConfig
    before: ModelStats
    after: ModelStats
    judged_before: Logs
    """Loss and metrics on the validation data, before training."""
    judged_after: Logs
    history: tuple[LogEntry, ...]
    best_epoch: int | None
    masked: int
    """The number of weights that the masks hold at zero."""
    kept: int
    """The number of those weights that are zero in the written file."""
    notes: tuple[str, ...]
    is_chief: bool = True


def finetune(
    path: Path, request: FinetuneRequest, output: Destination, watcher: ProgressCallback | None = None
) -> FinetuneResult:
    """Train a model, and write a copy of its file with the trained weights."""
    check(request)
    request = resolve_teacher(request, path)
    if _has_best(request):
        check_direction(request.means)
    model = open_model(path)
    outputs.check(model, output)
    if request.distill:
        teacher_file = open_model(Path(request.distill))
        user_code.check(teacher_file, teacher_load_options(teacher_file, request.origin, request.distill_model))
    check_exists(request.data, request.val)
    checkpoints = _checkpoints(request)
    with (
        temporary_files(),
        _unwrapped(model, request.origin) as plain,
        closing(load_trainable(plain, with_arrays(request.origin, plain, request.data))) as network,
        ExitStack() as at_the_end,
    ):
        data = open_training_data(network, request, path)
        request = data.request
        network.prepare(replace(request.means, frozen=_frozen(plain, request), example=data.example))
        notes = (*data.notes, *validate_training_data(data, network.signature, request))
        config = _train_config(request, data, network.ranks[1])
        pruning = make_pruning_config(plain, request, config)
        initial = masks_of_zeros(pruning.choice, network.weights(pruning.names))
        if request.mask is MaskMode.REGROW and not initial and pruning.schedule is None:
            raise UsageError(f"{path} has no zeros that could be regrown", hint="add --sparsity 80%")
        notes += _sparser_note(path, pruning, initial)
        saved_pruning = read_saved_pruning(model)
        scheduler = make_mask_scheduler(network, pruning, request, config, initial=initial, saved=saved_pruning)
        check_wrappable(plain, request, scheduler)
        judged_before = evaluate(network, data.val, config.batch_size)
        monitor = _monitor(request, judged_before, network)
        teacher = _teacher(request, network, data)
        if teacher is not None:
            # Its runtime may share the process group with the student's, so it is closed only at the end.
            at_the_end.callback(teacher.close)
            notes += teacher.notes
            if not data.has_targets and not request.means.custom_step:
                notes += _distill_without_targets(network, data, teacher)
        logger = _logger(network, scheduler, request, watcher)
        progress = _train(
            TrainingRun(
                network,
                DataSplits(data.train, data.val, request.workers),
                config,
                scheduler,
                logger,
                checkpoints,
                teacher,
                monitor,
            )
        )
        if request.is_recalibrated:
            notes = (*notes, _recalibrate(network, data, config))
        judged_after = evaluate(network, data.val, config.batch_size)
        values, before = network.tensors(), stats_for_report(model)
        if not network.is_chief:
            return FinetuneResult(
                request, config, before, before, judged_before, judged_after, (), None, 0, 0, (), is_chief=False
            )
        wrapping = spec_of_result(scheduler, request, saved_pruning, progress.step) if request.keeps_wrappers else None
        after, zeros = _write_result(plain, values, scheduler, output, wrapping)
        notes = (
            *notes,
            *network.notes,
            *outputs.notes_on_folder(model, output),
            *(saved_pruning.notes(progress.step) if saved_pruning is not None and not request.prunes else ()),
        )
    return FinetuneResult(
        request,
        config,
        before,
        after,
        judged_before,
        judged_after,
        tuple(progress.history),
        progress.best_epoch if config.keeps_best else None,
        scheduler.zeros,
        zeros,
        notes,
    )


@contextmanager
def _unwrapped(model: ModelFile, origin: LoadOptions) -> Generator[ModelFile]:
    """Yield a model without pruning wrappers; the weights that their masks prune are zero in it."""
    if not model.about.pruning_wrappers:
        yield model
        return
    with temporary_folder() as scratch:
        try:
            plain = strip_wrappers(model, scratch)
        except InputError as error:
            # The hint of `strip` (--only) does not apply here.
            hint = "save the model as .keras, whose wrappers can be stripped, and train that"
            raise type(error)(error.message, hint=hint if "--only" in error.hint else error.hint) from error
        if model.family is Family.KERAS:
            try:
                user_code.check(plain, origin)
            except UntrustedError as error:
                # The message must name the user's file instead of the temporary one.
                message = error.message.replace(str(plain.path), str(model.path))
                raise UntrustedError(message, hint=error.hint) from error
        yield plain


def _sparser_note(path: Path, rules: PruningConfig, masks: Mapping[str, Mask]) -> tuple[str, ...]:
    """A note if the file is already sparser than the target."""
    schedule, size = rules.schedule, sum(mask.size for mask in masks.values())
    share = sum(mask.size - np.count_nonzero(mask) for mask in masks.values()) / max(size, 1)
    if schedule is None or not rules.has_others or share <= schedule.final:
        return ()
    return (f"{path} is already sparser than {schedule.final:.1%}: its zeros ({share:.1%}) are kept.",)


def _checkpoints(request: FinetuneRequest) -> CheckpointManager | None:
    if request.checkpoint_dir is None:
        return None
    saver = CheckpointManager(request.checkpoint_dir, request.choices, request.is_resumed)
    saver.check()
    return saver


def _frozen(model: ModelFile, request: FinetuneRequest) -> frozenset[str]:
    return frozenset(tensor.name for selector in request.frozen for tensor in select_names(model, selector))


def _has_best(request: FinetuneRequest) -> bool:
    """Whether the result depends on which epoch is the best."""
    is_judged = bool(request.val or request.val_split)
    return is_judged and (request.keep is KeepWeights.BEST or request.early_stop is not None)


def _monitor(request: FinetuneRequest, logs: Logs, network: TrainableModel) -> Monitor | None:
    if not _has_best(request):
        return None
    return make_monitor(logs, request.means, (port.name for port in network.signature.outputs))


def _teacher(request: FinetuneRequest, network: TrainableModel, data: TrainingData) -> Teacher | None:
    if not request.distill:
        return None
    return load_teacher(
        Path(request.distill),
        request.origin,
        request.means.device,
        network.signature,
        data.example,
        builder=request.distill_model,
    )


def _distill_without_targets(network: TrainableModel, data: TrainingData, teacher: Teacher) -> tuple[str, ...]:
    """Choose how outputs are compared with the teacher's, from a sample of the training data; returns notes."""
    request, train = data.request, data.train
    order = EpochOrder(_SAMPLE_SIZE, request.means.seed, is_shuffled=train.count is not None)
    x = next(train.batches(order)).x
    loss = request.means.loss if request.means.loss in COMPARING_LOSSES else ""
    compared, note = compare_answers(teacher(x), network.predict(x), network.signature, loss)
    network.compare(compared)
    return (f"{train.name} has no targets: all that is learned from is what {request.distill} answers.", note)


def _train_config(request: FinetuneRequest, data: TrainingData, ranks: int) -> TrainConfig:
    steps, per_epoch = resolve_steps(
        count_examples(data.train),
        request.batch_size,
        epochs=request.epochs,
        steps=request.steps,
        default_epochs=DEFAULT_EPOCHS,
        ranks=ranks,
    )
    return TrainConfig(
        steps,
        per_epoch,
        request.batch_size,
        request.means.seed,
        request.rate,
        parse_time_point(request.warmup).step(steps, per_epoch),
        request.early_stop,
        request.keep is KeepWeights.BEST,
    )


def _train(run: TrainingRun) -> TrainState:
    with closing(run.logger), GracefulInterrupt() as stopping:
        return train(run, stopping)


def _logger(
    network: TrainableModel, scheduler: MaskScheduler, request: FinetuneRequest, watcher: ProgressCallback | None
) -> TrainingLogger:
    folder = (request.logdir or request.checkpoint_dir) if network.is_chief else None
    logger = TrainingLogger(folder, layers=lambda: _layer_sparsity(scheduler))
    if watcher is not None and network.is_chief:
        logger.watcher = watcher
    return logger


def _layer_sparsity(scheduler: MaskScheduler) -> Logs:
    return {f"sparsity/{name}": 1.0 - float(np.mean(mask)) for name, mask in scheduler.masks.items()}


def _recalibrate(network: TrainableModel, data: TrainingData, config: TrainConfig) -> str:
    layers = network.recalibrate(data.train.batches(EpochOrder(config.batch_size)))
    if not layers:
        return "There was nothing to recalibrate: the model has no batch normalisation."
    return f"The statistics of {layers} batch normalisation layers were recomputed from {data.train.name}."


def _write_result(
    model: ModelFile,
    values: Mapping[str, Array],
    scheduler: MaskScheduler,
    output: Destination,
    wrapping: WrapperSpec | None,
) -> tuple[ModelStats, int]:
    """Write the result; returns its stats and the number of the masks' zeros that are zero in it."""
    # A changed modification time of the source must not discard hours of training.
    model = replace(model, states=ignoring_mtime(model.states))
    with outputs.staging_dir(model, output) as (folder, target):
        places = outputs.staged_paths(model, folder, target)
        write_back(model, values, places)
        result = open_model(places.get(model.path, folder / target.name))
        zeros_in_file = _count_zeros(result, scheduler.masks)
        if zeros_in_file != scheduler.zeros:
            lost = scheduler.zeros - zeros_in_file
            raise WorkError(f"{lost} of {scheduler.zeros} zeros became nonzero in training; nothing was written")
        if wrapping is not None:
            wrap_in_place(result.path, wrapping)
        after = stats_for_report(open_model(result.path))
    return replace(after, path=str(target)), zeros_in_file


def _count_zeros(model: ModelFile, masks: Mapping[str, Mask]) -> int:
    tensors = {tensor.name: tensor for tensor in model.tensors}
    return sum(int(np.count_nonzero(model.read(tensors[name])[~mask] == 0)) for name, mask in masks.items())
