"""`prunectl export`: what ships?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from prunectl.commands._command import builder_option, custom_objects_option, import_option, make_command, option_group
from prunectl.commands._requests import (
    BuildCommand,
    ModelArgument,
    OutputOption,
    OutputOptions,
    import_first,
    request_options,
)
from prunectl.exporting.compare import Comparison, ExportResult
from prunectl.exporting.export import export
from prunectl.exporting.request import BATCH_SIZE, OPTIONS, SAMPLES, parse_request
from prunectl.exporting.routes import suffix_of
from prunectl.pruning.destination import Destination
from prunectl.reporting.prune import before_after, output_report
from prunectl.reporting.report import Artifact, Column, Report, Table, Unit

_OUTPUTS = (
    Column("output"),
    Column("max difference", Unit.NUMBER),
    Column("mean difference", Unit.NUMBER),
    Column("relative RMS", Unit.NUMBER),
)


def export_report(result: ExportResult, output: str) -> Report:
    """The report on a run."""
    sizes = before_after(result.before, result.after)
    tables = (sizes,) if result.comparison is None else (_differences(result.comparison), sizes)
    facts = (("from", result.source), ("to", result.target), ("compared", _comparison_text(result.comparison)))
    notes = (*result.notes, *tuple(note for note in result.before.about.notes if note not in result.notes))
    extra: dict[str, Any] = {"parity": _parity_json(result.comparison)}
    report = output_report(result, output, tables, rows=sizes, facts=facts, notes=notes, extra_json=extra)
    return replace(report, artifacts=(*report.artifacts, *(Artifact(*file) for file in result.companion_files)))


def _differences(parity: Comparison) -> Table:
    rows = tuple((output.name, output.largest, output.mean, output.relative_rms) for output in parity.outputs)
    return Table("parity", _OUTPUTS, rows)


def _comparison_text(parity: Comparison | None) -> str:
    if parity is None:
        return "all weights, equal bit for bit"
    inputs = "examples" if parity.is_data else "random inputs"
    same = "" if parity.top1_agreement is None else f"; the top-1 answer is the same for {parity.top1_agreement:.2%}"
    noise = "" if parity.tolerance.relative_rms is None else f", {parity.relative_rms:.2%} of their RMS"
    distance = f"outputs differ by at most {parity.largest:.3g}, {parity.mean:.3g} on average"
    return f"on {parity.examples:,} {inputs}: {distance}{noise}{same}"


def _parity_json(parity: Comparison | None) -> dict[str, Any]:
    if parity is None:
        return {"kind": "bits", "equal": True}
    return {
        "kind": "outputs",
        "examples": parity.examples,
        "inputs": "data" if parity.is_data else "random",
        "max_difference": parity.largest,
        "mean_difference": parity.mean,
        "same_top1": parity.top1_agreement,
        "tolerance": {
            "atol": parity.tolerance.atol,
            "rtol": parity.tolerance.rtol,
            "share_of_largest": parity.tolerance.share,
            "relative_rms": parity.tolerance.relative_rms,
            "top1": parity.tolerance.top1_agreement,
        },
        "outputs": [
            {
                "name": output.name,
                "max_difference": output.largest,
                "mean_difference": output.mean,
                "relative_rms": output.relative_rms,
            }
            for output in parity.outputs
        ],
    }


_run = option_group("Inputs and comparison")
_small = option_group("Smaller output")
_file = option_group("Model code")


@dataclass(frozen=True, kw_only=True)
class Export(OutputOptions):
    """Convert MODEL to another format, and verify that it still computes the same.

    Both models run on the same inputs, and the result is kept only if the outputs agree; files of weights are
    compared bit by bit. Pruning masks are applied. The suffix of OUT gives the format, or --to: onnx, tflite,
    saved-model, keras, h5, torch, torchscript, torch-export, safetensors, npz.

    [dim]$[/] prunectl export model.h5 -o small.onnx

    [dim]$[/] prunectl export model.h5 -o small.tflite --int8 --data train.npz

    [dim]$[/] prunectl export net.pt -o net.onnx --builder net.py:Net --input '?,1,8,8'
    """

    model: ModelArgument
    output: OutputOption = ""
    to: Annotated[str, typer.Option(metavar="FORMAT", help="Output format, e.g. onnx; else by OUT's suffix.")] = ""
    opset: Annotated[int | None, typer.Option(help="ONNX opset version.  [default: 18]")] = None
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="Metadata to store: author=me (ONNX, safetensors).")
    ] = None
    card: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a model card in Markdown.")] = None
    input_: Annotated[
        list[str] | None,
        _run("--input", metavar="NAME:SHAPE:TYPE", help="Shape of an input: x:1,3,224,224:f32; ? is a dynamic axis."),
    ] = None
    data: Annotated[str, _run(metavar="SPEC", help="Data to compare on, and to calibrate --int8.")] = ""
    samples: Annotated[int | None, _run(help=f"Examples to compare on.  [default: {SAMPLES} of --data]", min=1)] = None
    batch_size: Annotated[int | None, _run(help=f"Examples per batch.  [default: {BATCH_SIZE}]", min=1)] = None
    seed: Annotated[int | None, _run(help="Seed of the random inputs.  [default: 0]")] = None
    atol: Annotated[float | None, _run(help="Absolute tolerance of the outputs.  [default: 1e-4]")] = None
    rtol: Annotated[float | None, _run(help="Relative tolerance.  [default: 1e-4; 16 bits: 1e-2]")] = None
    half: Annotated[bool, _small("--half", help="Store weights as 16-bit floats (float16).")] = False
    bf16: Annotated[bool, _small("--bf16", help="Store weights as bfloat16 (ONNX, PyTorch weights, safetensors).")] = (
        False
    )
    int8: Annotated[bool, _small("--int8", help="Quantise weights to 8 bits; with --data, activations too.")] = False
    sparse: Annotated[bool, _small("--sparse", help="Store no zeros (ONNX, TFLite); PyTorch: run without them.")] = (
        False
    )
    code: Annotated[
        bool, typer.Option("--code", help="Also write OUT.py, the class that loads the weights (PyTorch).")
    ] = False
    pack: Annotated[bool, _small("--pack", help="Compress inside the file; it loads as before.")] = False
    shard_size: Annotated[
        str, _small(metavar="SIZE", help="Split the weights of a folder into shards of at most this size, e.g. 2GB.")
    ] = ""
    builder: Annotated[str, builder_option(_file)] = ""
    custom_objects: Annotated[str, custom_objects_option(_file)] = ""
    imports: Annotated[list[str] | None, import_option(_file)] = None
    trust: Annotated[bool, _file("--trust", help="Allow code stored in MODEL to run.")] = False
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")] = False

    def run(self, ctx: typer.Context) -> int:
        """Export the model, and show how far its outputs are from those of the source."""
        import_first(self.imports or ())
        request = parse_request(request_options(ctx, self, OPTIONS))

        def work(path: Path, destination: Destination | None) -> Report:
            assert destination is not None
            return export_report(export(path, request, destination), str(destination.target))

        return self.write(ctx.obj, work, suffix=suffix_of(request.to))


command = make_command(Export, BuildCommand)
