"""`prunectl finetune`: what does a little training win back?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from prunectl.commands._command import make_command, option_group
from prunectl.commands._requests import BuildCommand, Mode, OutputOptions, check_options, import_first, request_options
from prunectl.commands.max_drop import finetune_search
from prunectl.pruning.destination import Destination
from prunectl.pruning.plan import Scope
from prunectl.reporting.finetune import TrainingProgress, finetune_report
from prunectl.reporting.report import Report
from prunectl.reporting.reporter import Reporter
from prunectl.training.finetune import finetune
from prunectl.training.request import DEFAULT_EPOCHS, OPTIONS, FinetuneRequest, KeepWeights, MaskMode, parse_request

_DEFAULT = FinetuneRequest("")
_SCOPE = Scope(_DEFAULT.pruning.scope)
_data = option_group("Data")
_train = option_group("Training")
_when = option_group("Pruning on the way")
_long = option_group("Long runs")
_file = option_group("What the file does not say")


@dataclass(frozen=True, kw_only=True)
class Finetune(OutputOptions):
    """Train MODEL with its zeros kept, or prune it while it trains.

    [dim]$[/] prunectl finetune sparse.h5 -o tuned.h5 --data train.npz --val test.npz --epochs 3

    [dim]$[/] prunectl finetune net.pt -o sparse.pt --model net.py:Net --data train.npz --val-split 10% -s 90%

    [dim]$[/] prunectl finetune model.keras -o sparse.keras --data train.npz -s 80% --schedule cosine --end 60%

    [dim]$[/] prunectl finetune net.pt -o within.pt --model net.py:Net --data train.npz --epochs 1 --max-drop 1pp

    Losses mean the same in every framework: cross-entropy, bce, mse, mae, huber,
    kl (of probabilities, whether the model ends in logits or in softmax),
    hinge (targets 0 and 1, or -1 and 1).
    """

    model: Annotated[str, typer.Argument(metavar="MODEL", help="File or folder; - is standard input.")]
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="Where to; - is standard output.")] = ""
    data: Annotated[str, _data(metavar="SPEC", help="What to learn from: train.npz, images/, t.csv?target=y …")]
    val: Annotated[str, _data(metavar="SPEC", help="What to judge by.")] = ""
    val_split: Annotated[str, _data(metavar="RATIO", help="Judge by this share of the data instead.")] = ""
    epochs: Annotated[int | None, _train(help=f"Times through the data.  [default: {DEFAULT_EPOCHS}]", min=0)] = None
    steps: Annotated[int | None, _train(help="Batches, instead of epochs.", min=0)] = None
    batch_size: Annotated[int, _train(help="Examples in a batch, of all processes together.", min=1)] = (
        _DEFAULT.batch_size
    )
    lr: Annotated[float | None, _train(help="Learning rate; else as the file says, or the framework.")] = None
    lr_schedule: Annotated[str, _train(help="constant, linear, cosine or step.")] = _DEFAULT.rate
    warmup: Annotated[str, _train(metavar="POINT", help="Until when the learning rate rises.")] = _DEFAULT.warmup
    optimizer: Annotated[str, _train(metavar="NAME", help="Such as adam or sgd:momentum=0.9,weight_decay=1e-4.")] = ""
    loss: Annotated[str, _train(metavar="NAME", help="Such as cross-entropy, mse, or mod:fn (see below).")] = ""
    metric: Annotated[
        list[str] | None, _train(metavar="NAME", help="accuracy, loss, mod:fn:max …: the first decides.")
    ] = None
    clip: Annotated[float | None, _train(metavar="NORM", help="Largest norm of all gradients together.")] = None
    freeze: Annotated[list[str] | None, _train(metavar="GLOB", help="Tensors that stay as they are.")] = None
    distill: Annotated[str, _train(metavar="TEACHER", help="A model to learn from as well.")] = ""
    distill_model: Annotated[str, _train(metavar="MOD:FN", help="Builds the teacher, where not as --model.")] = ""
    distill_share: Annotated[float, _train(help="How much of the loss is the teacher's.", min=0, max=1)] = (
        _DEFAULT.means.teacher_share
    )
    temperature: Annotated[float, _train(help="How soft the teacher's classes are taken.", min=0.01)] = (
        _DEFAULT.means.temperature
    )
    early_stop: Annotated[int | None, _train(metavar="EPOCHS", help="Stop when nothing improves for so long.")] = None
    keep: Annotated[KeepWeights, _train(help="Write the best epoch, by --val, or the last.")] = _DEFAULT.keep
    recalibrate: Annotated[bool, _train("--recalibrate", help="Take batch normalisation's statistics anew.")] = False
    step: Annotated[str, _train(metavar="MOD:FN", help="A training step of your own.")] = ""
    workers: Annotated[int, _data(help="Threads that read and decode ahead.", min=0)] = _DEFAULT.workers
    precision: Annotated[str, _train(help="fp32, bf16 or fp16 (PyTorch).")] = _DEFAULT.means.precision
    device: Annotated[str, _train(help="cpu, cuda, cuda:1 …")] = _DEFAULT.means.device
    compile_: Annotated[bool, _train("--compile", help="Let the framework compile the model.")] = False
    shard: Annotated[bool, _train("--shard", help="Spread the model over processes (PyTorch).")] = False
    seed: Annotated[int, _train(help="Decides what is random.")] = _DEFAULT.means.seed
    sparsity: Annotated[str, _when("-s", "--sparsity", metavar="RATIO", help="Prune to this share of zeros.")] = ""
    max_drop: Annotated[str, _when(metavar="DROP", help="Prune as much as costs 0.5pp; each try is a run.")] = ""
    tried: Annotated[Path | None, _when(metavar="DIR", help="Keep what --max-drop tries, and go on from it.")] = None
    schedule: Annotated[str, _when(metavar="NAME", help="How it gets there.  [default: polynomial]")] = ""
    schedule_param: Annotated[list[str] | None, _when(metavar="K=V", help="A parameter of the schedule.")] = None
    initial_sparsity: Annotated[str, _when(metavar="RATIO", help="Where it begins.")] = ""
    begin: Annotated[str, _when(metavar="POINT", help="When: 2000 (steps), 20% or 3ep.")] = _DEFAULT.ramping.begin
    end: Annotated[str, _when(metavar="POINT", help="Until when.  [default: 75%]")] = ""
    frequency: Annotated[int | None, _when(metavar="STEPS", help="From one turn to the next.", min=1)] = None
    power: Annotated[float | None, _when(help="Of the polynomial.  [default: 3]")] = None
    strategy: Annotated[str, _when(metavar="NAME", help="What goes first; also movement, magnitude-gradient.")] = (
        _DEFAULT.pruning.strategy
    )
    param: Annotated[list[str] | None, _when(metavar="K=V", help="A parameter of the strategy.")] = None
    scope: Annotated[Scope, _when(help="Ranked in each layer, or over all.")] = _SCOPE
    pattern: Annotated[str, _when(metavar="PATTERN", help="2:4, block:1x4 or block:4x4:max.")] = ""
    policy: Annotated[str, _when(metavar="NAME", help="Which tensors.")] = _DEFAULT.pruning.policy
    only: Annotated[str, _when(metavar="GLOB", help="Only these tensors, whatever the policy.")] = ""
    exclude: Annotated[list[str] | None, _when(metavar="GLOB", help="Not these; may be repeated.")] = None
    layer: Annotated[list[str] | None, _when(metavar="GLOB=R", help="A ratio of their own; the last wins.")] = None
    mask: Annotated[MaskMode, _when(help="Whether zeros stay where they are, or move (RigL).")] = _DEFAULT.mask
    keep_wrappers: Annotated[bool, _when("--keep-wrappers", help="Write the framework's pruning wrappers.")] = False
    checkpoint_dir: Annotated[Path | None, _long(metavar="DIR", help="Keep a checkpoint of every epoch.")] = None
    resume: Annotated[bool, _long("--resume", help="Go on from the checkpoint.")] = False
    logdir: Annotated[Path | None, _long(metavar="DIR", help="metrics.jsonl, and events for TensorBoard.")] = None
    build: Annotated[str, _file("--model", metavar="MOD:FN", help="Builds the model, for weights alone.")] = ""
    custom_objects: Annotated[str, _file(metavar="MOD:DICT", help="Explains custom Keras layers.")] = ""
    imports: Annotated[list[str] | None, _file("--import", metavar="MOD", help="Imported first; or ./net.py.")] = None
    trust: Annotated[bool, _file("--trust", help="Let code that comes with the file run.")] = False
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False
    in_place: Annotated[bool, typer.Option("--in-place", help="Replace the input.")] = False

    def run(self, ctx: typer.Context) -> int:
        """Train the model, or search for what it takes within a drop, and show what came of it."""
        reporter: Reporter = ctx.obj
        import_first(self.imports or ())
        request = parse_request(request_options(ctx, self, OPTIONS))
        check_options(ctx, self, Mode.SEARCH if self.max_drop else Mode.NONE)

        def work(path: Path, destination: Destination | None) -> Report | None:
            assert destination is not None
            if self.max_drop:
                return finetune_search(reporter, self, request)(path, destination)
            with TrainingProgress(reporter.settings, request.checkpoint_dir) as progress:
                result = finetune(path, request, destination, progress.watch)
            return finetune_report(result, self.model, str(destination.target)) if result.is_chief else None

        return self.write(reporter, work)


command = make_command(Finetune, BuildCommand)
