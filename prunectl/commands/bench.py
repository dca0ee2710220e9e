"""`prunectl bench`: how fast is each model, and is the difference more than noise?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunectl.commands._command import builder_option, custom_objects_option, import_option, make_command, option_group
from prunectl.commands._requests import import_first
from prunectl.errors import UsageError
from prunectl.exporting.bench import BenchRequest, bench, parse_request
from prunectl.reporting.bench import bench_report
from prunectl.reporting.reporter import Reporter
from prunectl.units import parse_duration

_DEFAULT = BenchRequest()
_measure = option_group("Measurement")
_limit = option_group("Limits (exit code 1 beyond one, 5 if noise hides it)")
_file = option_group("Model code")


def bench_models(
    ctx: typer.Context,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Model files, compared with the first one.")],
    *,
    batch_size: Annotated[
        str, _measure(metavar="N[,N...]", help="Batch sizes.  [default: 1, or the one that a model is saved for]")
    ] = "",
    threads: Annotated[int, _measure(help="Threads of every runtime.", min=1)] = _DEFAULT.threads,
    seconds: Annotated[float, _measure(help="Longest time for each batch size.", min=0.1)] = _DEFAULT.seconds,
    input_: Annotated[
        list[str] | None,
        _measure("--input", metavar="NAME:SHAPE", help="Shape of an input that a model leaves open; repeatable."),
    ] = None,
    data: Annotated[str, _measure(metavar="SPEC", help="Take inputs from this data instead of random ones.")] = "",
    seed: Annotated[int, _measure(help="Seed of random inputs and of the order.", min=0)] = _DEFAULT.seed,
    max_latency: Annotated[str, _limit(metavar="TIME", help="Longest median time of a run, e.g. 5ms.")] = "",
    min_speedup: Annotated[
        float | None, _limit(metavar="FACTOR", help="Lowest speed-up over the first model, e.g. 1.2.", min=0.0)
    ] = None,
    builder: Annotated[str, builder_option(_file)] = "",
    custom_objects: Annotated[str, custom_objects_option(_file)] = "",
    imports: Annotated[list[str] | None, import_option(_file)] = None,
    trust: Annotated[bool, _file("--trust", help="Allow code stored in the models to run.")] = False,
) -> int:
    """Measure how fast models are, each in the runtime that opens it, and whether they differ by more than noise.

    The models run in turns on the same inputs, until the 95 % intervals are narrow. Zeros alone make few runtimes
    faster; removed channels (--pattern channel) make all of them faster.

    [dim]$[/] prunectl bench model.onnx small.onnx

    [dim]$[/] prunectl bench model.onnx small.onnx --batch-size 1,16

    [dim]$[/] prunectl bench small.onnx --max-latency 20ms
    """
    reporter: Reporter = ctx.obj
    if min_speedup is not None and len(paths) == 1:
        raise UsageError("--min-speedup needs a second model", hint="write prunectl bench dense.onnx small.onnx")
    limit = parse_duration(max_latency) if max_latency else None
    options: dict[str, Any] = {
        "threads": threads,
        "seconds": seconds,
        "input": tuple(input_ or ()),
        "data": data,
        "seed": seed,
        "builder": builder,
        "custom_objects": custom_objects,
        "trust": trust,
    }
    request = parse_request({**options, **({"batch_size": batch_size} if batch_size else {})})
    import_first(imports or ())
    return reporter.show(bench_report(bench(paths, request, reporter.progress), limit, min_speedup))


command = make_command(bench_models)
command.name = "bench"
