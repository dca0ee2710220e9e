"""`prune` of a file, in each of its modes: by options or a recipe, by a search, and behind wrappers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import typer

from prunectl.analysis.patterns import CHANNEL, LAYERS
from prunectl.api.in_memory import is_in_memory, named_objects
from prunectl.api.keywords import ChannelOptions, PartOptions, PruneOptions, RunOptions, parse_keywords
from prunectl.api.results import EngineResult, OnProgress, meter_of, size_lines, title_of
from prunectl.channels import prune as cuts
from prunectl.channels.prune import ChannelPruneResult
from prunectl.commands._requests import CHANNEL_LIMITS, check_options
from prunectl.commands.max_drop import prune_search, run_search
from prunectl.commands.prune import Prune, influence_measure, prune_in_parts, selected_modes
from prunectl.commands.wrap_options import wrap
from prunectl.errors import PrunectlError, UsageError
from prunectl.pruning import blocks
from prunectl.pruning.blocks import BlocksPruned
from prunectl.pruning.destination import Destination
from prunectl.pruning.parts import PartPruned
from prunectl.pruning.prune import Pruned
from prunectl.pruning.request import (
    PruneRequest,
    check_manifest,
    names_code,
    parse_request,
    read_manifest,
    write_manifest,
)
from prunectl.reporting.blocks import blocks_report
from prunectl.reporting.channels import channels_report
from prunectl.reporting.max_drop import with_search
from prunectl.reporting.prune import part_report, prune_report, wrap_report
from prunectl.reporting.report import Report
from prunectl.reporting.sweep import trial_line
from prunectl.sweeping.max_drop import SearchResult
from prunectl.sweeping.requests import prune_by_request
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
    """What masks were written, for `wrap` and `schedule`."""
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
        return (*lines, *(_found(self.search) or _next(self.output)))


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
        return (*lines, *(_found(self.search) or _next(self.output)))


@dataclass(frozen=True, slots=True, repr=False)
class BlocksResult(EngineResult, BlocksPruned):
    """The result of removing blocks from a model folder."""

    output: str = ""
    """What was written; empty where nothing was."""
    search: SearchResult | None = None
    """Always none: accuracy decides nothing here."""
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
    """The folder that they were written to."""
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
    """The report with how the sparsity was found."""
    return report if search is None else with_search(report, search, data, looks_at_data=bool(data))


def _found(search: SearchResult | None) -> tuple[str, ...]:
    """What a search came to, in a line."""
    if search is None:
        return ()
    base, result = search.base, search.result
    return (f"{base.metric}  {base.value:.4g} -> {result.value:.4g}, {len(search.tried)} sparsities tried",)


def _next(output: str) -> tuple[str, ...]:
    if not output:
        return ()
    return ("Accuracy was not measured.", f"Next: prunectl.evaluate({output!r}, DATA), or prunectl.finetune")


def prune_own_file(path: Path, output: Path, options: Mapping[str, Any], *, on_progress: OnProgress) -> object:
    """Prune the file of a model in memory, whose code is the caller's own."""
    known = PruneOptions
    return prune_file(path, Destination(output), options, is_trusted=True, known=known, on_progress=on_progress)


_UNCHECKED = frozenset({"builder", "custom_objects"})
"""What a model in memory brings itself, whether it is needed or not."""
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
    manifest, recipe = (Path(parsed.pop(name)) if name in parsed else None for name in ("manifest", "recipe"))
    if manifest is not None and destination is not None:
        check_manifest(manifest, [path, destination.target], is_forced=destination.is_forced)
    if recipe is not None:
        modes: dict[str, Any] = {name: parsed.pop(name) for name in ("part", "join", "on") if name in parsed}
        for name in parsed:
            raise UsageError(f"{name} cannot be used with a recipe, which sets it already", hint=f"leave out {name}")
        request, limits = read_manifest(recipe, is_trusted=is_trusted), {}
        if request.pattern == CHANNEL:
            limits = cuts.limits_in(recipe)
        command, wish = Prune(model=str(path), trust=is_trusted, **modes), (request, limits, manifest)
        return _prune(path, destination, command, wish, on_progress)
    is_cut = parsed.get("pattern") == CHANNEL
    channel_options = (ChannelOptions.__annotations__.keys() if is_cut else {"allow_empty"}) & parsed.keys()
    limits = {CHANNEL_LIMITS.get(name, name): parsed[name] for name in channel_options}
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
        command = Prune(model=str(path), metric=metric, trust=is_trusted, allow_empty=may_be_empty, **typed, **choices)
        request = parse_request(rest, is_by_layer=command.wrap or bool(command.schedule))
        return _prune(path, destination, command, (request, limits, manifest), on_progress)


def _prune(
    path: Path,
    destination: Destination | None,
    options: Prune,
    wish: tuple[PruneRequest, Mapping[str, Any], Path | None],
    on_progress: OnProgress,
) -> PruneResult | ChannelResult | BlocksResult | PartResult:
    """Prune in the mode that the options select; conflicts are those of the command."""
    request, limits, manifest = wish
    _check(options, wish, destination)
    output = "" if destination is None else str(destination.target)
    if options.wrap or options.schedule:
        wrapped = wrap(options, request)(path, destination)
        return PruneResult.of(wrapped.pruned, output=output, wrapped=wrapped)

    if request.pattern == LAYERS:
        measure = influence_measure(request, is_trusted=options.trust)
        removed = blocks.prune_blocks(path, request, destination, has_digests=manifest is not None, measure=measure)
        if manifest is not None and destination is not None:
            blocks.write_manifest(manifest, removed)
        return BlocksResult.of(removed, output=output)

    if options.has_parts:
        return _in_parts(path, destination, options, wish, on_progress)

    def run(request: PruneRequest) -> Any:
        has_digests = manifest is not None
        # What a search has found by measuring it is good, whatever is left.
        own = {**limits, "allow_empty": True} if options.max_drop else limits
        settings: Any = {"is_trusted": options.trust, "limits": own, "has_digests": has_digests}
        return prune_by_request(path, request, destination, **settings, meter=meter_of(on_progress))

    if options.max_drop:
        spec = prune_search(options, request, limits)
        tried = Path(options.tried) if options.tried is not None else None
        with run_search(path, spec.start(path, destination), tried, trial_teller(on_progress)) as found:
            result, more = run(replace(spec.pruning, sparsity=found.best.sparsity)), {"search": found}
    else:
        result, more = run(request), {}
    if isinstance(result, ChannelPruneResult):
        if manifest is not None and destination is not None:
            cuts.write_manifest(manifest, result, limits)
        return ChannelResult.of(result, output=output, **more)
    if manifest is not None and destination is not None:
        write_manifest(manifest, result)
    return PruneResult.of(result, output=output, **more)


def _check(
    options: Prune, wish: tuple[PruneRequest, Mapping[str, Any], Path | None], destination: Destination | None
) -> None:
    """Refuse options that do not go together, as the command does."""
    request, _, manifest = wish
    typed = replace(options, trust=False, manifest=manifest)
    if destination is not None:
        typed = replace(typed, force=destination.is_forced, in_place=destination.is_in_place)
    check_options(_context(), typed, selected_modes(options, request))


def _in_parts(
    path: Path,
    destination: Destination | None,
    options: Prune,
    wish: tuple[PruneRequest, Mapping[str, Any], Path | None],
    on_progress: OnProgress,
) -> PruneResult | PartResult:
    """Prune a part of the shards of a folder, or join all parts."""
    request, _, manifest = wish
    if destination is None:
        raise UsageError("no output is given", hint="name the folder that all parts write to")
    bar = meter_of(on_progress)
    done = prune_in_parts(path, request, options, destination, bar, has_digests=manifest is not None)
    if isinstance(done, PartPruned):
        return PartResult.of(done, output=str(destination.target))
    if manifest is not None:
        write_manifest(manifest, done)
    return PruneResult.of(done, output=str(destination.target))


def trial_teller(on_progress: OnProgress) -> Callable[[Trial, TrialResult | PrunectlError], None]:
    """What tells of each trial of a search."""
    bar = meter_of(on_progress)

    def tell(trial: Trial, result: TrialResult | PrunectlError) -> None:
        with bar(trial_line(trial, result), 0) as one:
            one.advance(1)

    return tell


def _context() -> typer.Context:
    """The context of the command, by which its options are named."""
    return typer.Context(importlib.import_module("prunectl.commands.prune").command)
