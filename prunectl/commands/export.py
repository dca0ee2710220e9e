"""`prunectl export`: what ships?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunectl.commands.export_requests import export_of
from prunectl.commands.if_changed import Maker
from prunectl.commands.inputs import STDIN, local
from prunectl.commands.options import panel
from prunectl.commands.requests import destination
from prunectl.commands.verb import verb
from prunectl.exporting.export import export as run
from prunectl.exporting.targets import suffix_of
from prunectl.reporting.export_report import export_report
from prunectl.reporting.reporter import Reporter

_run = panel("What goes in, and how the result is judged")
_small = panel("Smaller")
_file = panel("What the file does not say")


def export(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="File or folder; - is standard input.")],
    *,
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="Where to; - is standard output.")] = "",
    to: Annotated[str, typer.Option(metavar="FORMAT", help="Of what is written; else as the suffix says.")] = "",
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators.  [default: 18]")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="K=V", help="Kept in ONNX and safetensors.")] = None,
    card: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a model card, in Markdown.")] = None,
    input_: Annotated[
        list[str] | None, _run("--input", metavar="NAME:SHAPE:TYPE", help="Such as x:1,3,224,224:f32; ? is open.")
    ] = None,
    data: Annotated[str, _run(metavar="SPEC", help="What to run both on; else random inputs.")] = "",
    samples: Annotated[int | None, _run(help="Examples to run both on.  [default: 256 of --data]", min=1)] = None,
    batch_size: Annotated[int | None, _run(help="Examples at a time.  [default: 32]", min=1)] = None,
    seed: Annotated[int | None, _run(help="Decides random inputs.  [default: 0]")] = None,
    atol: Annotated[float | None, _run(help="How far two outputs may be apart.  [default: 1e-4]")] = None,
    rtol: Annotated[float | None, _run(help="The same, as a share of the output.  [default: 1e-4]")] = None,
    half: Annotated[bool, _small("--half", help="Weights as 16-bit floats.")] = False,
    bf16: Annotated[bool, _small("--bf16", help="Weights as bfloat16 (ONNX, safetensors, state dict).")] = False,
    int8: Annotated[bool, _small("--int8", help="Weights as 8-bit integers; with --data, activations too.")] = False,
    sparse: Annotated[bool, _small("--sparse", help="Leave zeros out (ONNX, TensorFlow Lite).")] = False,
    code: Annotated[
        bool, typer.Option("--code", help="Beside weights of PyTorch, OUT.py with the class that takes them.")
    ] = False,
    pack: Annotated[bool, _small("--pack", help="Compress the output inside its container.")] = False,
    build: Annotated[str, _file("--model", metavar="MOD:FN", help="Builds the model, for weights alone.")] = "",
    custom_objects: Annotated[str, _file(metavar="MOD:DICT", help="Explains custom Keras layers.")] = "",
    imports: Annotated[list[str] | None, _file("--import", metavar="MOD", help="Imported first; or ./net.py.")] = None,
    trust: Annotated[bool, _file("--trust", help="Let code that comes with the file run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
) -> int:
    """Write MODEL in another format, run both on the same inputs, and keep the result only if they agree.

    Masks and wrappers of pruning are taken off on the way. The suffix of OUT says the format, or --to: onnx, tflite,
    saved-model, keras, h5, torch, torchscript, torch-export, safetensors, npz.

    [dim]$[/] prunectl export model.h5 -o small.onnx

    [dim]$[/] prunectl export model.h5 -o small.tflite --int8 --data train.npz

    [dim]$[/] prunectl export net.pt -o net.onnx --model net.py:Net --input x:?,1,8,8

    [dim]$[/] prunectl export net.pt -o weights.pt --code --model net.py:Net --input x:?,1,8,8
    """
    reporter: Reporter = ctx.obj
    asked = export_of(ctx)
    named = Path(f"model{suffix_of(asked.to)}")
    with local(model) as path, destination(named, output, force=force, in_place=False, dry_run=False) as place:
        assert place is not None
        found = run(path, asked, place)
        if output == STDIN:
            return reporter.pour(place.target)
        return reporter.show(export_report(found, str(place.target)))


command = verb(export, Maker)
