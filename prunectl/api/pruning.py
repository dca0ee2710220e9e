"""`prune` of a file, in each of its modes: by options or a recipe, by a search, and behind wrappers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import typer

from prunectl.analysis.patterns import CHANNEL
from prunectl.api.in_memory import by_own_names, is_in_memory, named_objects
from prunectl.api.keywords import ChannelOptions, PartOptions, PruneOptions, RunOptions, parse_keywords
from prunectl.api.results import EngineResult, OnProgress, meter_of, size_lines, title_of
from prunectl.channels.prune import ChannelPruneResult
from prunectl.commands._requests import CHANNEL_LIMITS, check_options
from prunectl.commands.max_drop import prune_search, prune_within
from prunectl.commands.prune import Prune, build_mode, selected_modes
from prunectl.errors import PrunectlError, UsageError
from prunectl.pruning.blocks import BlocksPruned
from prunectl.pruning.destination import Destination
from prunectl.pruning.manifest import check_manifest, read_manifest, write_manifest
from prunectl.pruning.parts import PartPruned
from prunectl.pruning.prune import Pruned
from prunectl.pruning.request import PruneRequest, names_code, parse_request
from prunectl.reporting.max_drop import with_search
from prunectl.reporting.prune import part_report, prune_report, wrap_report
from prunectl.reporting.report import Report
from prunectl.reporting.structured import blocks_report, channels_report
from prunectl.reporting.sweep import trial_line
from prunectl.sweeping.sweep import SearchResult
from prunectl.sweeping.trial import Trial, TrialResult
from prunectl.training.wrap.prune import WrapResult
from prunectl.units import count


@dataclass(frozen=True, slots=True, repr=False)
class PruneResult(EngineResult, Pruned):
    """The result of pruning single weights."""

    output: str = ""
    """What was written; empty where nothing was."""
    search: SearchResult | None = None
    """How the sparsity was found, for `max_drop`."""
    wrapped: WrapResult | None = None
    """The masks that were written, for `wrap` and `schedule`."""
    command: ClassVar[str] = "prune"

    def report(self) -> Report:
        """The report of `prune`."""
        if self.wrapped is not None:
            return wrap_report(self.wrapped, self.output)
        return _with_search(prune_report(self, self.output), self.search, self.request.data)

    def lines(self) -> tuple[str, ...]:
        """Sizes and sparsity before and after."""
        pruned = f"pruned    {count(self.plan.drop)} of {count(self.plan.size)} weights"
        lines = (title_of(self.before, self.output), *size_lines(self.before, self.after), pruned)
        return (*lines, *_next(self.output, self.search))


@dataclass(frozen=True, slots=True, repr=False)
class ChannelResult(EngineResult, ChannelPruneResult):
    """The result of pruning channels."""

    output: str = ""
    """What was written; empty where nothing was."""
    search: SearchResult | None = None
    """How the share of channels was found, for `max_drop`."""
    command: ClassVar[str] = "prune"

    def report(self) -> Report:
        """The report of `prune --pattern channel`."""
        return _with_search(channels_report(self, self.output), self.search, self.request.data)

    def lines(self) -> tuple[str, ...]:
        """Sizes and channels before and after."""
        removed = f"removed   {count(self.dropped)} of {count(self.channels)} channels"
        lines = (title_of(self.before, self.output), *size_lines(self.before, self.after), removed)
        return (*lines, *_next(self.output, self.search))


@dataclass(frozen=True, slots=True, repr=False)
class BlocksResult(EngineResult, BlocksPruned):
    """The result of removing blocks from a model folder."""

    output: str = ""
    """What was written; empty where nothing was."""
    search: SearchResult | None = None
    """Always None: blocks are not searched by accuracy."""
    command: ClassVar[str] = "prune"

    def report(self) -> Report:
        """The report of `prune --pattern layers`."""
        return blocks_report(self, self.output)

    def lines(self) -> tuple[str, ...]:
        """Sizes and blocks before and after."""
        removed = [f"removed   {len(stack.removed)} of {stack.before} blocks of {stack.name}" for stack in self.stacks]
        return (title_of(self.before, self.output), *size_lines(self.before, self.after), *removed, *_next(self.output))


@dataclass(frozen=True, slots=True, repr=False)
class PartResult(EngineResult, PartPruned):
    """The result of pruning a part of the shards of a folder."""

    output: str = ""
    """The folder that the shards were written to."""
    command: ClassVar[str] = "prune"

    def report(self) -> Report:
        """The report of `prune --part`."""
        return part_report(self, self.output)

    def lines(self) -> tuple[str, ...]:
        """The shards of the part, and what is missing."""
        join = f"Next: join=True{', trust=True' if names_code(self.request) else ''}"
        missing = f"missing   {len(self.missing)} shards" if self.missing else join
        return (f"{self.source} -> {self.output}, part {self.part}", f"shards    {len(self.shards)}", missing)


def _with_search(report: Report, search: SearchResult | None, data: str) -> Report:
    return report if search is None else with_search(report, search, data, looks_at_data=bool(data))


def search_line(search: SearchResult) -> str:
    """The result of a search in one line."""
    base, result = search.base, search.result
    return f"{base.metric}  {base.value:.4g} -> {result.value:.4g}, {len(search.tried)} sparsities tried"


def _next(output: str, search: SearchResult | None = None) -> tuple[str, ...]:
    """The result of a search, or how to measure the accuracy."""
    if search is not None:
        return (search_line(search),)
    if not output:
        return ()
    return ("Accuracy was not measured.", f"Next: prunectl.evaluate({output!r}, DATA), or prunectl.finetune")


def prune_own_file(path: Path, output: Path, options: Mapping[str, Any], *, on_progress: OnProgress) -> object:
    """Prune the file of a model in memory, whose code is the caller's own."""
    known = PruneOptions
    return prune_file(path, Destination(output), options, is_trusted=True, known=known, on_progress=on_progress)


_UNCHECKED = frozenset({"builder", "custom_objects"})
"""Options that come with a model in memory, whether they are needed or not."""
_AS_TEXT = frozenset({"initial_sparsity", "begin", "end"})


def prune_file(
    path: Path,
    destination: Destination | None,
    options: Mapping[str, Any],
    *,
    is_trusted: bool,
    known: type = PartOptions,
    on_progress: OnProgress = None,
) -> PruneResult | ChannelResult | BlocksResult | PartResult:
    """Prune a file as the command does with the same options."""
    parsed = parse_keywords("prune", known, options)
    files: dict[str, Any] = {name: Path(parsed.pop(name)) for name in ("manifest", "recipe", "tried") if name in parsed}
    manifest, recipe = files.get("manifest"), files.get("recipe")
    if manifest is not None and destination is not None:
        check_manifest(manifest, [path, destination.target], is_forced=destination.is_forced)
    if recipe is not None:
        modes: dict[str, Any] = {name: parsed.pop(name) for name in ("part", "join", "on") if name in parsed}
        for name in [*parsed, *(files.keys() & {"tried"})]:
            raise UsageError(f"{name} cannot be used with a recipe, which sets it already", hint=f"leave out {name}")
        command = Prune(model=str(path), trust=is_trusted, **files, **modes)
        return _prune(path, destination, command, (read_manifest(recipe, is_trusted=is_trusted), {}), on_progress)
    is_cut = parsed.get("pattern") == CHANNEL
    channel_options = (ChannelOptions.__annotations__.keys() if is_cut else {"allow_empty"}) & parsed.keys()
    limits = {CHANNEL_LIMITS[name]: parsed[name] for name in channel_options - {"allow_empty"}}
    with named_objects({name: value for name, value in parsed.items() if name not in channel_options}) as named:
        if manifest is not None and is_in_memory(named.values()):
            raise UsageError("a manifest cannot name data or functions in memory", hint="save them in files")
        (metric,) = named.pop("metric", ("",))
        typed: dict[str, Any] = {
            name: str(named[name]) if name in _AS_TEXT else named[name]
            for name in (*RunOptions.__annotations__, "part")
            if name in named
        }
        rest = {name: value for name, value in named.items() if name not in typed}
        choices: dict[str, Any] = {
            field.name: parsed[field.name] for field in fields(Prune) if field.name in rest.keys() - _UNCHECKED
        }
        may_be_empty = bool(parsed.get("allow_empty"))
        command = Prune(
            model=str(path), metric=metric, trust=is_trusted, allow_empty=may_be_empty, **files, **typed, **choices
        )
        request = parse_request(rest, is_by_layer=command.wrap or bool(command.schedule))
        return _prune(path, destination, command, (request, limits), on_progress)


def _prune(
    path: Path,
    destination: Destination | None,
    options: Prune,
    request_and_limits: tuple[PruneRequest, Mapping[str, Any]],
    on_progress: OnProgress,
) -> PruneResult | ChannelResult | BlocksResult | PartResult:
    """Prune in the mode that the options select, with the command's checks for options that conflict."""
    (request, limits), meter = request_and_limits, meter_of(on_progress)
    typed = replace(options, trust=False)
    if destination is not None:
        typed = replace(typed, force=destination.is_forced, in_place=destination.is_in_place)
    context = typer.Context(importlib.import_module("prunectl.commands.prune").command)
    check_options(context, typed, selected_modes(options, request))
    if options.has_parts and destination is None:
        raise UsageError("no output is given", hint="name the folder that all parts write to")
    output = "" if destination is None else str(destination.target)
    more: dict[str, Any] = {}
    if options.max_drop:
        spec = prune_search(options, request, limits)
        run = prune_within(spec, options, limits, trial_reporter(on_progress), meter)
        result, search = run(path, destination)
        more["search"] = by_own_names(search)
    else:
        result = build_mode(options, request, limits, meter)(path, destination)
    if isinstance(result, WrapResult):
        return PruneResult.of(result.pruned, output=output, wrapped=result)
    if isinstance(result, PartPruned):
        return PartResult.of(result, output=output)
    if options.manifest is not None and destination is not None:
        write_manifest(options.manifest, result)
    if isinstance(result, ChannelPruneResult):
        return ChannelResult.of(result, output=output, **more)
    if isinstance(result, BlocksPruned):
        return BlocksResult.of(result, output=output)
    return PruneResult.of(result, output=output, **more)


def trial_reporter(on_progress: OnProgress) -> Callable[[Trial, TrialResult | PrunectlError], None]:
    """A callback that reports each trial of a search as progress."""
    meter = meter_of(on_progress)

    def report(trial: Trial, result: TrialResult | PrunectlError) -> None:
        with meter(trial_line(trial, result), 0) as bar:
            bar.advance(1)

    return report
