"""A model that is trained in PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import Array, ModelFile
from prunectl.training.backend import (
    GradientStatistic,
    InputCallback,
    LoadOptions,
    Logs,
    ModelSignature,
    TensorSpec,
    TrainOptions,
)
from prunectl.training.data.source import Arrays, Batch, as_tuple, map_arrays
from prunectl.training.host import before_seeding
from prunectl.training.runtimes import seed_everything
from prunectl.training.task import IGNORED_LABEL, DistilledOutput, FinalActivation, activation_of_values
from prunectl.training.torch import distributed, losses, tensors
from prunectl.training.torch._compat import BatchNorm
from prunectl.training.torch.build import BuiltModule, FixedBatchModule, build_module, declared_inputs, output_specs
from prunectl.training.torch.cached_pass import CachedPass
from prunectl.training.torch.distributed import distribute_like, full_tensor
from prunectl.training.torch.layer_inputs import capture_layer_inputs
from prunectl.training.torch.modules import frozen_batch_norms, lay_channels_last, recalibrate
from prunectl.training.torch.optimizers import GradientSums, WeightMasks, make_optimizer
from prunectl.training.torch.tensors import to_numpy, to_torch, view_as_torch
from prunectl.training.user_code import find_guarded

_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_trainable(model: ModelFile, origin: LoadOptions) -> TorchTrainable:
    """Load a model for training in PyTorch."""
    return TorchTrainable(build_module(model, origin))


class TorchTrainable:
    """A PyTorch module with its loss, optimizer, masks and training state."""

    def __init__(self, built: BuiltModule) -> None:
        self._built = built
        self._module = built.module
        self._run: Any = built.module
        self._notes = list(built.notes)
        inputs = declared_inputs(built)
        self._signature = ModelSignature(
            inputs, (), is_channels_first=True, text=built.text, ignored_label=IGNORED_LABEL
        )
        self._masks, self._statistics = WeightMasks(), GradientSums()
        self._rate = 1.0
        self._layout = torch.contiguous_format
        """The memory format of images: channels last where that is faster and works."""
        self._is_training: bool | None = None
        """Whether the module is in training mode; None before a mode is set."""
        self._compared: tuple[DistilledOutput, ...] = ()
        dtypes = {weight.dtype for weight in built.module.parameters() if weight.is_floating_point()}
        self._dtype = dtypes.pop() if len(dtypes) == 1 else None
        """The data type of the floating-point parameters, if all have the same."""

    @property
    def signature(self) -> ModelSignature:
        return self._signature

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices that were made because neither the user nor the file named them."""
        return tuple(self._notes)

    @property
    def ranks(self) -> tuple[int, int]:
        return self._place.rank, self._place.ranks

    @property
    def is_chief(self) -> bool:
        return self._place.rank == 0

    def is_true_everywhere(self, mine: bool) -> bool:
        return distributed.all_true(self._place, mine)

    def prepare(self, options: TrainOptions) -> None:
        """Choose a device, a loss, metrics and an optimizer."""
        if options.precision not in _PRECISIONS:
            raise UsageError(
                f"--precision {options.precision!r} is not known", hint=f"use one of {', '.join(_PRECISIONS)}"
            )
        self._options, self._place = options, distributed.join(options.device)
        self._half = _PRECISIONS[options.precision]
        self._scaler = torch.amp.GradScaler(self._place.device.type, enabled=self._half is torch.float16)
        self._freeze(options.frozen)
        if options.is_sharded:
            distributed.shard(self._module, self._place)
        else:
            self._module.to(self._place.device)
        example = options.example
        if example is None:
            raise ValueError("a network is prepared with an example")
        self._custom: Any = find_guarded("step", options.custom_step, {}) if options.custom_step else None
        is_plain = self._built.has_modes and not (options.custom_step or options.is_compiled or options.is_sharded)
        if is_plain and self._place.device.type == "cpu":
            self._layout = torch.channels_last
            if not lay_channels_last(self._module, partial(self._try_forward, example)):
                self._layout = torch.contiguous_format
        self._choose_losses(example)
        self._averager = losses.MetricAverager(self._metrics, is_training=True)
        self._optimizer = make_optimizer(options.optimizer, self._trainable(), options.lr, may_fuse=options.is_matching)
        self._base_rates = [group["lr"] for group in self._optimizer.param_groups]
        if options.is_compiled:
            self._run = torch.compile(self._module)
        if self._place.ranks > 1 and not options.is_sharded:
            device_ids = [self._place.device.index] if self._place.device.type == "cuda" else None
            self._run = DistributedDataParallel(self._run, device_ids=device_ids)

    def _try_forward(self, example: Batch, is_training: bool) -> None:
        if not (is_training and self._options.is_evaluated):
            self._set_mode(training=is_training)
            self._forward(self._module, example.x)

    def _freeze(self, names: frozenset[str]) -> None:
        parameters = dict(self._module.named_parameters())
        for name in names & self._built.names.keys():
            if self._built.names[name] in parameters:
                parameters[self._built.names[name]].requires_grad_(False)
        # The running statistics of a frozen batch normalisation are frozen as well.
        self._frozen_norms = frozen_batch_norms(
            self._module, {self._built.names[name] for name in names & self._built.names.keys()}
        )

    def _choose_losses(self, example: Batch) -> None:
        """Choose losses and metrics by the outputs for an example; freeze parameters without a gradient under DDP."""
        self._set_mode(training=False)
        # With gradients enabled, since the autograd graph shows the last activation.
        outs = self._forward(self._module, example.x)
        specs = output_specs(outs)
        outs = tuple(out.detach() for out in outs)
        self._signature = replace(self._signature, outputs=specs)
        targets = [] if example.y is None else [self._on_device(array) for array in as_tuple(example.y)]
        self._metrics: tuple[losses.TorchMetric, ...] = ()
        if self._custom is not None and not self._options.loss and not targets:
            self._losses = []
            return
        if targets and len(targets) > len(outs):
            raise UsageError(f"the data has {len(targets)} targets, but the model has {len(outs)} outputs")
        if not targets and not self._options.loss and self._options.teacher_share == 1:
            self._losses = [losses.without_targets(out, port.activation) for out, port in zip(outs, specs, strict=True)]
        else:
            self._losses = [
                losses.resolve_loss(
                    self._options.loss, out.float(), targets[index] if targets else None, specs[index].activation
                )
                for index, out in enumerate(outs[: len(targets) or 1])
            ]
            target = targets[0] if targets else None
            self._metrics = losses.resolve_metrics(self._options.metrics, self._losses[0], outs[0], target)
        self._signature = replace(self._signature, outputs=self._with_activations(specs, outs))
        if not self._options.loss:
            self._notes.append(f"The loss is {', '.join(array.name for array in self._losses)}, {_loss_reason(specs)}.")
        if len(outs) > 1 and self._metrics:
            self._notes.append(f"The metrics use only the first of the model's {len(outs)} outputs.")
        if not self._options.optimizer and not self._options.is_evaluated:
            self._notes.append("The optimizer is adam: PyTorch files do not name one.")
        if self._place.ranks > 1 and not self._options.is_sharded:
            self._freeze_unreached(example)

    def _with_activations(self, specs: Sequence[TensorSpec], outs: Sequence[torch.Tensor]) -> tuple[TensorSpec, ...]:
        """The outputs with their final activations: those of the loss, else of the graph, else of the values."""
        by_loss = [loss.activation for loss in self._losses] + [FinalActivation.UNKNOWN] * len(outs)
        return tuple(
            replace(port, activation=activation or port.activation or activation_of_values(to_numpy(out.float()), 1))
            for port, out, activation in zip(specs, outs, by_loss, strict=False)
        )

    def _freeze_unreached(self, example: Batch) -> None:
        """Freeze parameters that get no gradient, since DDP would wait forever for it."""
        self._set_mode(training=True)
        outs = self._forward(self._module, example.x)
        loss = torch.stack([out.float().sum() for out in outs]).sum()
        (self._loss(outs, example.y, None) if example.y is not None else loss).backward()  # type: ignore[no-untyped-call]
        for weight in self._trainable():
            weight.requires_grad_(weight.grad is not None)
            weight.grad = None

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [weight for weight in self._module.parameters() if weight.requires_grad]

    def _on_device(self, array: Array) -> torch.Tensor:
        return to_torch(array).to(self._place.device)

    def _to_inputs(self, x: Arrays) -> list[torch.Tensor]:
        """The inputs in the data types that the file declares, or else in that of the parameters.

        An exported program refuses floating-point inputs of any other type than the one it was exported with,
        whatever type its parameters have, even under autocast.
        """
        inputs = [self._on_device(array) for array in as_tuple(x)]
        fallback = self._dtype if self._half is None else None
        dtypes: list[torch.dtype | None] = [
            getattr(torch, port.dtype) if port.dtype else fallback for port in self._built.inputs
        ]
        typed = [
            tensor.to(dtype) if dtype is not None and dtype.is_floating_point and tensor.is_floating_point() else tensor
            for tensor, dtype in zip(inputs, dtypes or [fallback] * len(inputs), strict=True)
        ]
        return [tensor.contiguous(memory_format=self._layout) if tensor.ndim == 4 else tensor for tensor in typed]

    def _forward(self, module: Any, x: Arrays) -> tuple[torch.Tensor, ...]:
        half = self._half
        context = torch.autocast(self._place.device.type, half) if half is not None else nullcontext()
        try:
            with distributed.failures(self._place.device), context:
                outputs = module(*self._to_inputs(x))
        except (AssertionError, RuntimeError, TypeError) as error:
            shapes = ", ".join("x".join(map(str, array.shape)) for array in as_tuple(x))
            raise UsageError(
                f"the model does not accept inputs of {shapes}: {tensors.error_line(error)}",
                hint="reshape the inputs with ?shape=1x28x28 (without the batch)",
            ) from error
        # A user's own loss may call `view`, which needs contiguous tensors.
        return tuple(output.contiguous() for output in tensors.output_tensors(outputs))

    def _loss(self, outs: tuple[torch.Tensor, ...], y: Arrays | None, teacher_outputs: Arrays | None) -> torch.Tensor:
        share = self._options.teacher_share if teacher_outputs is not None else 0.0
        arrays = () if y is None else as_tuple(y)
        targets = [self._on_device(array) for array in arrays]
        counts = [losses.examples_labelled(*pair) for pair in zip(arrays, self._losses, strict=False)]
        self._last = (outs, targets, counts)
        if not targets and share < 1:
            raise UsageError(
                "the data has no targets", hint="name data with some: train.npz with x and y, or --distill-share 1"
            )
        self._parts: list[losses.LossPart] = [
            ((1 - share) * chosen.loss(out.float(), target), count)
            for chosen, out, target, count in zip(self._losses, outs, targets, counts, strict=False)
            if share < 1
        ]
        if teacher_outputs is not None:
            answers = [self._on_device(array) for array in as_tuple(teacher_outputs)]
            compared = self._compared or losses.compared_by_loss(self._losses, outs)
            distilled = losses.distilled(compared, outs, answers, self._options.temperature)
            self._parts.append((share * distilled, len(outs[0])))
        return torch.stack([mean for mean, _ in self._parts]).sum()

    def compare(self, outputs: Sequence[DistilledOutput]) -> None:
        self._compared = tuple(outputs)

    def step(self, batch: Batch, rate: float, teacher_outputs: Arrays | None = None) -> None:
        self._set_mode(training=True)
        if rate != self._rate:
            for group, base in zip(self._optimizer.param_groups, self._base_rates, strict=True):
                group["lr"] = base * rate
            self._rate = rate
        self._optimizer.zero_grad(set_to_none=True)
        if self._custom is not None:
            targets = None if batch.y is None else map_arrays(self._on_device, batch.y)
            loss = self._custom(self._run, map_arrays(self._on_device, batch.x), targets)
        else:
            loss = self._loss(self._forward(self._run, batch.x), batch.y, teacher_outputs)
        with distributed.failures(self._place.device):
            self._update(loss)
        if self._custom is not None:
            self._averager.update([(loss, len(as_tuple(batch.x)[0]))])
        else:
            self._averager.update(self._parts, *self._metric_inputs())

    def _metric_inputs(self) -> tuple[tuple[torch.Tensor, torch.Tensor], float] | tuple[()]:
        """The first output with its targets, and the number of examples that count; empty without targets."""
        outs, targets, counts = self._last
        return ((outs[0], targets[0]), counts[0]) if targets else ()

    def _update(self, loss: torch.Tensor) -> None:
        """Backpropagate a loss and take an optimizer step, under the masks."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.unscale_(self._optimizer)
        self._statistics.add(self._takes_step())
        self._masks.zero_gradients()
        if self._options.clip is not None:
            torch.nn.utils.clip_grad_norm_(self._trainable(), self._options.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._masks.zero_weights()
        if self._options.is_sharded:
            distributed.sync_buffers(self._module)

    def _takes_step(self) -> torch.Tensor | None:
        """Whether GradScaler takes this step; None if it is disabled, or no gradient statistic is accumulated."""
        gradients = [weight.grad for weight in self._trainable() if weight.grad is not None]
        if not self._scaler.is_enabled() or not self._statistics.sums or not gradients:
            return None
        return distributed.are_finite(gradients)

    def _set_mode(self, *, training: bool) -> None:
        if self._built.has_modes and self._is_training is not training:
            self._is_training, is_matching = training, training and self._options.is_matching
            self._module.train(training and not is_matching)
            for layer in self._module.modules() if is_matching else ():
                # cuDNN computes gradients of recurrent layers only in training mode.
                is_cudnn = isinstance(layer, torch.nn.RNNBase) and self._place.device.type == "cuda"
                if is_cudnn or isinstance(layer, BatchNorm):
                    layer.train()
        if training:
            for norm in self._frozen_norms:
                norm.eval()

    def logs(self) -> Logs:
        return self._averager.compute()

    def evaluate(self, batches: Iterable[Batch]) -> Logs:
        """The mean loss and metrics over all batches, which every process evaluates in full."""
        self._set_mode(training=False)
        averager = losses.MetricAverager(self._metrics, is_training=False)
        with torch.no_grad():
            for batch in batches:
                self._loss(self._forward(self._module, batch.x), batch.y, None)
                averager.update(self._parts, *self._metric_inputs())
        return averager.compute()

    def predict(self, x: Arrays) -> Arrays:
        self._prepare_to_predict()
        with torch.no_grad():
            outputs = tuple(to_numpy(out.float()) for out in self._forward(self._module, x))
        return outputs if len(outputs) > 1 else outputs[0]

    def _prepare_to_predict(self) -> None:
        """Choose a device if `prepare` was not called, as for a teacher, and switch to evaluation mode."""
        if not hasattr(self, "_place"):
            self.place("auto")
        self._set_mode(training=False)

    def place(self, device: str) -> None:
        self._place, self._half = distributed.join(device), None
        self._module.to(self._place.device)

    def observe(self, names: Collection[str], x: Arrays, callback: InputCallback) -> None:
        self._observe(names, x, callback, None)

    def _observe(self, names: Collection[str], x: Arrays, callback: InputCallback, cache: CachedPass | None) -> None:
        self._prepare_to_predict()
        pieces = self._module if isinstance(self._module, FixedBatchModule) else None
        with capture_layer_inputs(self._parameters(filter(self._built.contains, names)), callback, pieces, cache):
            self._forward(self._module, x)

    def cached_pass(self) -> CachedPass:
        """A cached pass, for a batch that is run repeatedly."""
        is_script = any(isinstance(module, torch.jit.ScriptModule) for module in self._module.modules())
        return CachedPass(self._observe, self._file_tensors, may_fuse=is_script)

    def gradients(self, names: Collection[str], batch: Batch) -> dict[str, Array]:
        self._set_mode(training=False)
        weights = self._parameters(names)
        loss = self._loss(self._forward(self._module, batch.x), batch.y, None)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
        return {name: to_numpy(gradient) for name, gradient in zip(weights, gradients, strict=True)}

    def recalibrate(self, batches: Iterable[Batch]) -> int:
        self._set_mode(training=False)
        return recalibrate(self._module, (batch.x for batch in batches), self._run_through)

    def _run_through(self, x: Arrays) -> None:
        with torch.no_grad():
            self._forward(self._module, x)

    def weights(self, names: Iterable[str]) -> dict[str, Array]:
        state = self._module.state_dict()
        return {name: to_numpy(full_tensor(state[self._built.inside(name)])) for name in names}

    def tensors(self) -> dict[str, Array]:
        """Copies of all parameters and buffers."""
        return {name: to_numpy(full_tensor(value)) for name, value in self._file_tensors().items()}

    def _file_tensors(self) -> dict[str, torch.Tensor]:
        state = self._module.state_dict()
        return {name: state[inner] for name, inner in self._built.names.items()}

    def _parameters(self, names: Iterable[str]) -> dict[str, torch.nn.Parameter]:
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        inner_names = {name: self._built.inside(name) for name in names}
        return {name: parameters[inner] for name, inner in inner_names.items() if inner in parameters}

    @torch.no_grad()
    def assign(self, values: Mapping[str, Array]) -> None:
        state = self._module.state_dict()
        for name in filter(self._built.contains, values):
            target = state[self._built.names[name]]
            target.copy_(distribute_like(view_as_torch(values[name]), target))

    def mask(self, masks: Mapping[str, Array]) -> None:
        parameters = self._parameters(masks)
        if missing := masks.keys() - parameters.keys():
            raise WorkError(f"{min(missing)} is not a parameter that PyTorch trains, so it cannot be pruned")
        kept = {weight: distribute_like(torch.from_numpy(masks[name]), weight) for name, weight in parameters.items()}
        self._masks.hold(kept, self._optimizer)

    def track_gradients(self, statistic: GradientStatistic, names: Sequence[str]) -> None:
        self._statistics.begin(statistic, self._parameters(names))

    def gradient_statistics(self) -> dict[str, Array]:
        return {name: to_numpy(full_tensor(value)) for name, value in self._statistics.sums.items()}

    def reset_gradient_statistics(self) -> None:
        self._statistics.reset()

    def reseed(self, number: int) -> None:
        """Seed all random generators from a number and the rank of this process."""
        own = number * 4099 + self._place.rank
        before_seeding("torch")
        torch.manual_seed(own % (1 << 63))
        seed_everything(own)

    def save(self, folder: Path | None) -> None:
        """Save the training state; without a folder, only contribute this process's part to the save of another."""
        distributed.save(folder, self._state)
        distributed.barrier(self._place)

    def restore(self, folder: Path) -> None:
        distributed.restore(folder, self._state)
        self._rate = float("nan")

    @property
    def _state(self) -> distributed.TrainerState:
        return distributed.TrainerState(self._module, self._optimizer, self._scaler, self._place, self._statistics.sums)

    def close(self) -> None:
        """Leave the process group."""
        distributed.leave()


def _loss_reason(outputs: Sequence[TensorSpec]) -> str:
    """How the loss was inferred, for a note."""
    if any(port.activation is FinalActivation.UNKNOWN for port in outputs):
        return "inferred from the targets and the outputs for some examples"
    activations = dict.fromkeys(port.activation for port in outputs)
    last = ", ".join("logits" if activation is FinalActivation.RAW else activation for activation in activations)
    return f"inferred from the targets and the last layer ({last})"
