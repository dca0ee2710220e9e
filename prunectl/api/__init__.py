"""The commands as functions: the options of the command line as keywords, the report's values as the result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Any, Unpack, overload

from prunectl.analysis import inspect as inspection
from prunectl.analysis import patterns, sizes
from prunectl.analysis.estimate import estimate_size
from prunectl.analysis.inspect import InspectOptions
from prunectl.analysis.sizes import CodecName
from prunectl.api.in_memory import named_objects
from prunectl.api.keywords import (
    AnyPath,
    ExportOptions,
    FilePruneOptions,
    LookOptions,
    Names,
    PartOptions,
    PruneOptions,
    Ratio,
    SelectionOptions,
    as_keywords,
    check_type,
    names,
    parse_keywords,
    parse_text,
    ratio,
)
from prunectl.api.models import (
    PATH_HINT,
    LiveModel,
    destination_of,
    is_url,
    kind_of,
    local_path,
    model_path,
    prune_in_memory,
    shown_path,
)
from prunectl.api.pruning import (
    BlocksResult,
    ChannelResult,
    PartResult,
    PruneResult,
    prune_file,
    prune_own_file,
)
from prunectl.api.results import (
    CheckResult,
    ConversionResult,
    DiffResult,
    DoctorResult,
    InitResult,
    InspectResult,
    OnProgress,
    SizeResult,
    StripResult,
    VerifyResult,
    meter_of,
)
from prunectl.api.training import bench, evaluate, finetune, sweep
from prunectl.calibration.sensitivity import sensitivity as sensitivity_of
from prunectl.channels.groups import channel_groups
from prunectl.checks import check as checking
from prunectl.checks import diff as differences
from prunectl.checks import verify as verification
from prunectl.commands.check import ci_path, load_baseline, load_budgets
from prunectl.commands.doctor import extras
from prunectl.commands.init import write_budgets
from prunectl.commands.strip import parse_parts
from prunectl.errors import UsageError
from prunectl.exporting import export as exporting
from prunectl.exporting import request as export_request
from prunectl.formats.base import StripOptions
from prunectl.formats.registry import open_model
from prunectl.pruning import request as prune_request
from prunectl.pruning import strip as stripping
from prunectl.pruning.averages import parse_keep
from prunectl.pruning.destination import Destination
from prunectl.pruning.manifest import read_record
from prunectl.training.backend import LoadOptions
from prunectl.training.host import host_settings


@as_keywords()
def inspect(
    model: AnyPath,
    *,
    layers: str = "",
    pattern: str = "",
    flops: bool = False,
    zeros: bool = True,
    on_progress: OnProgress = None,
    **options: Unpack[LookOptions],
) -> InspectResult:
    """Measure what is in a model file.

    ``groups=True`` also finds the channels that are cut together; ``sensitivity=True`` prunes each tensor alone and
    measures the damage, with ``data=(x, y)`` also to the outputs. ``on_progress`` is called while the file is read.
    """
    parsed = patterns.parse(pattern) if pattern else None
    wanted = InspectOptions(layers=layers, pattern=pattern, has_flops=flops, has_zeros=zeros)
    meter = meter_of(on_progress)
    given = parse_keywords("inspect", LookOptions, options)
    has_groups, is_measured = given.pop("groups", False), given.pop("sensitivity", False)
    for needed, names_of in (("groups=True", ("input",)), ("sensitivity=True", ("data", "samples", "loss"))):
        for name in names_of:
            if name in given and not (has_groups if needed.startswith("groups") else is_measured):
                raise UsageError(f"{name} needs {needed}", hint=f"add {needed}, or leave out {name}")
    is_trusted = given.pop("trust", False)
    is_fetched = has_groups or is_measured
    with (
        host_settings() if is_fetched else nullcontext(),
        named_objects(given) as named,
        model_path("model", model, is_read_whole=is_fetched) as path,
    ):
        file, request = open_model(path), prune_request.parse_request(named)
        stats = inspection.inspect_model(file, wanted, parsed, meter)
        origin = LoadOptions(request.model, request.custom_objects, is_trusted=is_trusted, inputs=request.inputs)
        groups = channel_groups(file, origin) if has_groups else None
        settings: Any = {"layers": layers, "is_trusted": is_trusted, "meter": meter}
        damage = sensitivity_of(file, request, **settings) if is_measured else None
    return InspectResult.of(shown_path(model, stats), groups=groups, sensitivity=damage)


@as_keywords()
def size(
    model: AnyPath,
    *,
    codec: str = "gzip",
    level: int | None = None,
    estimate: bool = False,
    on_progress: OnProgress = None,
) -> SizeResult:
    """Measure how big a model is: as it is, packed, and compressed.

    ``estimate=True`` estimates the gzip size of a big model to about 1 % from a sample of it.
    """
    if codec not in {choice.value for choice in CodecName}:
        raise UsageError(f"codec must be {', '.join(choice.value for choice in CodecName)}, not {codec!r}")
    compressor = sizes.get_codec(CodecName(codec), level)
    if estimate and codec != CodecName.GZIP:
        raise UsageError(f"estimate works with gzip only, not with {codec}", hint="leave out estimate or codec")
    look = estimate_size if estimate else sizes.measure
    with model_path("model", model, is_read_whole=estimate) as path:
        stats = look(open_model(path), compressor, meter_of(on_progress))
    return SizeResult.of(shown_path(model, stats), codec=codec, level=level)


_BYTES_ALONE = SelectionOptions.__annotations__.keys() - {"strategy", "pattern"} | {
    "sparsity",
    "compression",
    "target_gzip",
    "target_packed",
    "nan",
    "pack",
    "seed",
    "manifest",
}
"""Options of `prune` that never run a framework or code of the user."""


@overload
def prune(
    model: AnyPath,
    output: AnyPath | None,
    /,
    *,
    force: bool = False,
    in_place: bool = False,
    trust: bool = False,
    on_progress: OnProgress = None,
    **options: Unpack[FilePruneOptions],
) -> PruneResult | ChannelResult | BlocksResult: ...


@overload
def prune(
    model: AnyPath,
    output: AnyPath,
    /,
    *,
    part: str,
    on_progress: OnProgress = None,
    **options: Unpack[FilePruneOptions],
) -> PartResult: ...


@overload
def prune(
    model: LiveModel,
    /,
    *,
    in_place: bool = False,
    on_progress: OnProgress = None,
    **options: Unpack[PruneOptions],
) -> LiveModel: ...


@as_keywords()
def prune(
    model: Any,
    output: AnyPath | EllipsisType | None = ...,
    /,
    *,
    force: bool = False,
    in_place: bool = False,
    trust: bool = False,
    on_progress: OnProgress = None,
    **options: Unpack[PartOptions],
) -> Any:
    """Zero the least important weights of a model; without an output nothing is written.

    The options are those of the command line: ``sparsity="80%"``, ``scope="global"``, ``exclude=["fc*"]`` …; with
    ``pattern="channel"`` channels are cut out, by ``sparsity`` or until ``target_flops="-50%"`` is reached.
    ``max_drop="1pp"`` searches for the highest sparsity that costs no more than that on `data`;
    ``manifest="run.json"`` records the run, and ``recipe="run.json"`` repeats it; ``wrap=True`` writes masks for later
    training; ``part="3/8"`` prunes a part of the shards of a folder, and ``join=True`` joins all parts into a model.

    A model in memory (a Keras model, a ``torch.nn.Module``, an ONNX ``ModelProto``, a dict of arrays) comes back as a
    pruned copy of the same kind, Keras models without their compilation; ``in_place=True`` changes the model itself.
    """
    with nullcontext() if kind_of(model) is None and options.keys() <= _BYTES_ALONE else host_settings():
        return _pruned(model, output, options, force=force, in_place=in_place, trust=trust, on_progress=on_progress)


def _pruned(
    model: Any,
    output: AnyPath | EllipsisType | None,
    options: Mapping[str, Any],
    *,
    force: bool,
    in_place: bool,
    trust: bool,
    on_progress: OnProgress,
) -> Any:
    kind = kind_of(model)
    if kind is not None:
        if output is not ...:
            raise UsageError(
                f"{kind.title} in memory is returned and not written: there is no output", hint="save what is returned"
            )
        # The model was built in this process: its file holds no code of a stranger.
        own = partial(prune_own_file, on_progress=on_progress)
        return prune_in_memory(kind, model, own, options, in_place=in_place)
    if not isinstance(model, (str, os.PathLike)):
        kinds = "a path, a torch.nn.Module, a Keras model, an ONNX ModelProto, or a dict of arrays or tensors"
        raise TypeError(f"model must be {kinds}, not {type(model).__name__}: {model!r:.80}")
    if "output" in options:
        raise UsageError("output has no name: it comes after the model", hint=PATH_HINT)
    if output is ...:
        raise UsageError("no output is given", hint=PATH_HINT)
    destination = _destination(model, output, force=force, in_place=in_place)
    with model_path("model", model, is_read_whole=True) as path:
        result = prune_file(path, destination, options, is_trusted=trust, on_progress=on_progress)
    return result if isinstance(result, PartResult) else replace(result, before=shown_path(model, result.before))


@as_keywords()
def strip(
    model: AnyPath,
    output: AnyPath | None,
    *,
    only: Names = (),
    keep: str = "",
    half: bool = False,
    pack: bool = False,
    force: bool = False,
    in_place: bool = False,
    on_progress: OnProgress = None,
) -> StripResult:
    """Remove everything that a model does not need for predictions; without an output nothing is written.

    Where a checkpoint holds both the weights and their moving average, ``keep="ema"`` or ``keep="raw"`` chooses one.
    ``on_progress`` is called while both models are measured.
    """
    check_type("only", only, Names)
    check_type("keep", keep, str)
    destination = _destination(model, output, force=force, in_place=in_place)
    options = StripOptions(parse_parts(",".join(names(only))), to_half=half)
    with model_path("model", model, is_read_whole=True) as path:
        result = stripping.strip(
            path,
            options,
            destination,
            is_packed=pack,
            keep=parse_keep(keep),
            is_asked=True,
            meter=meter_of(on_progress),
        )
    result = replace(result, before=shown_path(model, result.before))
    written = "" if destination is None else str(destination.target)
    return StripResult.of(result, output=written, is_rewritten=half or pack)


@as_keywords()
@host_settings()
def export(
    model: AnyPath,
    output: AnyPath,
    /,
    *,
    force: bool = False,
    on_progress: OnProgress = None,
    **options: Unpack[ExportOptions],
) -> ConversionResult:
    """Write a model in another format, and compare its outputs with those of its source before it is kept.

    The options are those of the command line: ``to="onnx"``, ``opset=18``, ``input=["x:?,3,8,8"]``, ``half=True`` …
    ``on_progress`` is called when the model is loaded, written and compared.
    """
    destination = Destination(_path(output, "output"), is_forced=force)
    with named_objects(parse_keywords("export", ExportOptions, options)) as named:
        result = exporting.export(_path(model), export_request.parse_request(named), destination, meter_of(on_progress))
    return ConversionResult.of(result, output=str(destination.target))


@as_keywords()
def diff(new: AnyPath, old: AnyPath, *, fail_on: Names = "", on_progress: OnProgress = None) -> DiffResult:
    """Compare two models tensor by tensor: what was added, removed or changed, zeros, sizes.

    ``fail_on=["growth:2%", "nonzero"]`` names differences that are not allowed: `is_ok` is false if there is one.
    """
    check_type("fail_on", fail_on, Names)
    rules = parse_text("fail_on", differences.parse, ",".join(names(fail_on)))
    with model_path("new", new) as new_path, model_path("old", old) as old_path:
        result = differences.diff_models(open_model(new_path), open_model(old_path), meter_of(on_progress))
    result = replace(result, new=shown_path(new, result.new), old=shown_path(old, result.old))
    return DiffResult.of(result, findings=differences.judge(result, rules))


@as_keywords()
def verify(
    model: AnyPath,
    *,
    manifest: AnyPath | None = None,
    against: AnyPath | None = None,
    on_progress: OnProgress = None,
) -> VerifyResult:
    """Verify a pruned model against the manifest of its run, against its source, or both: `is_ok` is the verdict."""
    if manifest is None and against is None:
        raise UsageError("there is nothing to compare the file with", hint="give manifest=, against=, or both")
    record = read_record(_path(manifest, "manifest")) if manifest is not None else None
    source = open_model(_path(against, "against")) if against is not None else None
    path = _path(model)
    return VerifyResult(str(path), verification.verify(open_model(path), record, source, meter_of(on_progress)))


@as_keywords()
@host_settings()
def check(
    *names: str,
    config: AnyPath | None = None,
    baseline: str = "",
    update_baseline: bool = False,
    reason: str = "",
    max_latency: str = "",
    min_speedup: float | None = None,
    trust: bool = False,
    on_progress: OnProgress = None,
) -> CheckResult:
    """Check all models, or those that are named, against their budgets: `is_ok` is the verdict.

    Budgets are read from the nearest prunectl.toml, or tool.prunectl table of a pyproject.toml, from this folder up.
    """
    for name in names:
        check_type("names", name, str)
    file = _path(config, "config") if config is not None else None
    budgets = load_budgets(file, names, max_latency, min_speedup)
    earlier = load_baseline(budgets, os.fspath(baseline), is_new=update_baseline, reason=reason)
    settings: Any = {"file": ci_path(budgets.path), "reason": reason, "is_trusted": trust}
    findings = checking.check(budgets, list(names), earlier, **settings, meter=meter_of(on_progress))
    return CheckResult.of(findings)


@as_keywords()
def init(folder: AnyPath = ".", *, margin: Ratio = "10%", on_progress: OnProgress = None) -> InitResult:
    """Measure all models in a folder, and write a prunectl.toml with limits for them and a baseline of their sizes.

    ``on_progress`` is called after each model.
    """
    check_type("margin", margin, Ratio)
    return InitResult(*write_budgets(_path(folder, "folder"), ratio("margin", margin), meter_of(on_progress)))


@as_keywords()
def doctor() -> DoctorResult:
    """Find out which versions are installed, which extras work, and what to install for the others.

    It takes less than a second, so that it has no ``on_progress``.
    """
    return DoctorResult(extras())


def _path(path: AnyPath, name: str = "model") -> Path:
    return local_path(name, path)


def _destination(model: AnyPath, path: AnyPath | None, *, force: bool, in_place: bool) -> Destination | None:
    if in_place and is_url(model):
        raise UsageError("a model at a URL cannot be replaced in place", hint="name an output")
    return None if path is None else destination_of(model, path, force=force, in_place=in_place)


eval = evaluate  # noqa: A001 - the name of the command; not in __all__, where it would hide Python's own eval
__all__ = [
    "bench",
    "check",
    "diff",
    "doctor",
    "evaluate",
    "export",
    "finetune",
    "init",
    "inspect",
    "prune",
    "size",
    "strip",
    "sweep",
    "verify",
]
