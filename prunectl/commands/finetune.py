"""`prunectl finetune`: what does a little training win back?"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from prunectl.commands._command import builder_option, custom_objects_option, import_option, make_command, option_group
from prunectl.commands._requests import (
    BuildCommand,
    Mode,
    ModelArgument,
    OutputOption,
    OutputOptions,
    check_options,
    import_first,
    request_options,
)
from prunectl.pruning.destination import Destination
from prunectl.pruning.plan import Scope
from prunectl.reporting.finetune import TrainingProgress, finetune_report
from prunectl.reporting.report import Report
from prunectl.reporting.reporter import Reporter
from prunectl.training.finetune import finetune
from prunectl.training.loop import retain_freed_memory
from prunectl.training.monitor import monitored_metric
from prunectl.training.request import DEFAULT_EPOCHS, OPTIONS, FinetuneRequest, KeepWeights, MaskMode, parse_request

_DEFAULT = FinetuneRequest("")
_data = option_group("Data")
_train = option_group("Training")
_when = option_group("Pruning during training")
_long = option_group("Checkpoints and logs")
_file = option_group("Model code")


@dataclass(frozen=True, kw_only=True)
class Finetune(OutputOptions):
    """Train MODEL with its zeros kept, or prune it during training.

    With --val, the best epoch at the final sparsity is written; without it, the last.

    [dim]$[/] prunectl finetune sparse.h5 -o tuned.h5 --data train.npz --val test.npz

    [dim]$[/] prunectl finetune model.h5 -o small.h5 --data train.npz -s 90%

    [dim]$[/] prunectl finetune net.pt -o out.pt --builder net.py:Net --data train.npz

    Losses mean the same in every framework: cross-entropy, bce and kl (for logits and probabilities alike), mse, mae,
    huber, and hinge (targets 0 and 1, or -1 and 1).
    """

    model: ModelArgument
    output: OutputOption = ""
    data: Annotated[str, _data(metavar="SPEC", help="Training data: train.npz, images/, t.csv?target=y …")]
    val: Annotated[str, _data(metavar="SPEC", help="Validation data, e.g. test.npz.")] = ""
    val_split: Annotated[str, _data(metavar="RATIO", help="Share of --data held out for validation: 10%.")] = ""
    epochs: Annotated[int | None, _train(help=f"Passes over the data.  [default: {DEFAULT_EPOCHS}]", min=0)] = None
    steps: Annotated[int | None, _train(help="Batches to train on, instead of --epochs.", min=0)] = None
    batch_size: Annotated[int, _train(help="Examples per batch, over all processes.", min=1)] = _DEFAULT.batch_size
    lr: Annotated[float | None, _train(help="Learning rate, e.g. 1e-3; else the file's, or the optimizer's own.")] = (
        None
    )
    lr_schedule: Annotated[str, _train(help="Learning-rate decay: constant, linear, cosine, step.")] = _DEFAULT.rate
    warmup: Annotated[str, _train(metavar="POINT", help="Raise the learning rate until 500 (steps), 5% or 1ep.")] = (
        _DEFAULT.warmup
    )
    optimizer: Annotated[
        str, _train(metavar="NAME", help="Optimizer, e.g. sgd:momentum=0.9; else the file's, or adam.")
    ] = ""
    loss: Annotated[str, _train(metavar="NAME", help="Loss, e.g. cross-entropy, mse or f.py:fn (see above).")] = ""
    metric: Annotated[
        list[str] | None,
        _train(
            metavar="NAME", help="Metric, e.g. accuracy or f.py:fn:max; repeatable, the first picks the best epoch."
        ),
    ] = None
    clip: Annotated[float | None, _train(metavar="NORM", help="Clip the global norm of the gradients, e.g. 1.")] = None
    freeze: Annotated[list[str] | None, _train(metavar="GLOB", help="Do not train these tensors, e.g. 'embed*'.")] = (
        None
    )
    distill: Annotated[
        str, _train(metavar="TEACHER", help="Teacher model for distillation; input means MODEL before pruning.")
    ] = ""
    distill_builder: Annotated[
        str, _train(metavar="MOD:FN", help="Code that builds the teacher; else that of --builder.")
    ] = ""
    distill_share: Annotated[float, _train(help="Share of the loss that the teacher makes up.", min=0, max=1)] = (
        _DEFAULT.means.teacher_share
    )
    temperature: Annotated[float, _train(help="Softmax temperature of the distillation.", min=0.01)] = (
        _DEFAULT.means.temperature
    )
    early_stop: Annotated[
        int | None, _train(metavar="EPOCHS", help="Stop after this many epochs without improvement.")
    ] = None
    keep: Annotated[KeepWeights, _train(help="Write the best epoch (by --val), or the last.")] = _DEFAULT.keep
    recalibrate: Annotated[bool, _train("--recalibrate", help="Recompute batch-norm statistics after training.")] = (
        False
    )
    train_step: Annotated[str, _train(metavar="MOD:FN", help="Your own training step, e.g. f.py:fn.")] = ""
    workers: Annotated[int, _data(help="Threads that load data ahead.", min=0)] = _DEFAULT.workers
    precision: Annotated[str, _train(help="Training precision: fp32, bf16, fp16 (PyTorch).")] = _DEFAULT.means.precision
    device: Annotated[str, _train(help="Device: cpu, cuda, cuda:1, mps; gpu:1 for Keras.")] = _DEFAULT.means.device
    compile_: Annotated[bool, _train("--compile", help="Compile the model (torch.compile; XLA for Keras).")] = False
    shard: Annotated[bool, _train("--shard", help="Shard parameters over processes (PyTorch FSDP).")] = False
    seed: Annotated[int, _train(help="Seed of shuffling and all other random choices.")] = _DEFAULT.means.seed
    sparsity: Annotated[str, _when("-s", "--sparsity", metavar="RATIO", help="Prune to this sparsity, e.g. 90%.")] = ""
    max_drop: Annotated[
        str,
        _when(
            metavar="DROP",
            help="Find the highest sparsity that costs at most this, e.g. 1pp; every trial is a training run.",
        ),
    ] = ""
    tried: Annotated[Path | None, _when(metavar="DIR", help="Folder for the trials of --max-drop, to resume.")] = None
    schedule: Annotated[
        str, _when(metavar="NAME", help="How sparsity rises.  [default: polynomial; constant for 2:4]")
    ] = ""
    schedule_param: Annotated[
        list[str] | None, _when(metavar="K=V", help="Parameter of the schedule, e.g. power=2.")
    ] = None
    initial_sparsity: Annotated[str, _when(metavar="RATIO", help="Sparsity at --begin, e.g. 50%.")] = ""
    begin: Annotated[str, _when(metavar="POINT", help="First pruning step: 2000 (steps), 20% or 3ep.")] = (
        _DEFAULT.ramping.begin
    )
    end: Annotated[str, _when(metavar="POINT", help="When the final sparsity is reached.  [default: 75%]")] = ""
    frequency: Annotated[
        int | None, _when(metavar="STEPS", help="Steps between two pruning steps, e.g. 100.", min=1)
    ] = None
    power: Annotated[float | None, _when(help="Exponent of the polynomial.  [default: 3]")] = None
    strategy: Annotated[
        str, _when(metavar="NAME", help="How weights are ranked: magnitude, lamp, movement, magnitude-gradient …")
    ] = _DEFAULT.pruning.strategy
    param: Annotated[list[str] | None, _when(metavar="K=V", help="Parameter of the strategy, e.g. bias=late.")] = None
    scope: Annotated[
        Scope,
        _when(help="Rank weights in each layer (as tfmot), over all layers, or by ERK; auto: as in prune."),
    ] = Scope.AUTO
    pattern: Annotated[str, _when(metavar="PATTERN", help="Shape of the zeros: 2:4, block:1x4 …")] = ""
    policy: Annotated[str, _when(metavar="NAME", help="Which tensors to prune, e.g. skip-first-last.")] = (
        _DEFAULT.pruning.policy
    )
    layers: Annotated[str, _when(metavar="GLOB", help="Prune only the kernels of these, e.g. 'conv*'.")] = ""
    exclude: Annotated[
        list[str] | None, _when(metavar="GLOB", help="Never prune these tensors, e.g. fc2; repeatable.")
    ] = None
    layer: Annotated[
        list[str] | None, _when(metavar="GLOB=R", help="Sparsity for some layers: 'fc*=90%'; repeatable.")
    ] = None
    mask: Annotated[MaskMode, _when(help="Keep zeros in place, or regrow weights (RigL).")] = _DEFAULT.mask
    keep_wrappers: Annotated[
        bool, _when("--keep-wrappers", help="Also write masks, as tfmot or torch.nn.utils.prune do.")
    ] = False
    checkpoint_dir: Annotated[Path | None, _long(metavar="DIR", help="Save a checkpoint here after every epoch.")] = (
        None
    )
    resume: Annotated[bool, _long("--resume", help="Continue from the checkpoint in --checkpoint-dir.")] = False
    logdir: Annotated[Path | None, _long(metavar="DIR", help="Write metrics.jsonl and TensorBoard events here.")] = None
    builder: Annotated[str, builder_option(_file)] = ""
    custom_objects: Annotated[str, custom_objects_option(_file)] = ""
    imports: Annotated[list[str] | None, import_option(_file)] = None
    trust: Annotated[bool, _file("--trust", help="Allow code stored in MODEL to run.")] = False
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")] = False
    in_place: Annotated[bool, typer.Option("--in-place", help="Overwrite MODEL itself, instead of --output.")] = False

    def run(self, ctx: typer.Context) -> int:
        """Train the model, or search for the highest sparsity within a drop, and show the report."""
        reporter: Reporter = ctx.obj
        import_first(self.imports or ())
        retain_freed_memory()
        request = parse_request(request_options(ctx, self, OPTIONS), is_searched=bool(self.max_drop))
        check_options(ctx, self, Mode.SEARCH if self.max_drop else Mode.NONE)

        def work(path: Path, destination: Destination | None) -> Report | None:
            assert destination is not None
            if self.max_drop:
                search = importlib.import_module("prunectl.commands.max_drop").finetune_search
                report: Report = search(reporter, self, request)(path, destination)
                return report
            with TrainingProgress(
                reporter.settings, request.checkpoint_dir, monitored_metric(request.means)
            ) as progress:
                result = finetune(path, request, destination, progress.watch)
            return finetune_report(result, self.model, str(destination.target)) if result.is_chief else None

        return self.write(reporter, work)


command = make_command(Finetune, BuildCommand)
