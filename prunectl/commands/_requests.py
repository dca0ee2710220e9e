"""From options to requests, and from `--output` to a destination."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Container, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from enum import Flag, auto
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from prunectl.commands._command import STDIN, BaseCommand, add_options, option_group, option_name, resolve_stdin
from prunectl.errors import UsageError
from prunectl.formats.scratch import temporary_folder
from prunectl.pruning.destination import Destination
from prunectl.reporting.report import Report
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.stdout import data_stream
from prunectl.units import parse_ratio, parse_size

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Model file or folder; - reads standard input.")]
OutputOption = Annotated[
    str, typer.Option("-o", "--output", metavar="OUT", help="File or folder to write; - is standard output.")
]


class OutputOptions:
    """The options of a command that writes one output; options that a command does not have keep their defaults."""

    model: str
    output: str
    force: bool
    in_place = False
    dry_run = False
    trust = False
    manifest: Path | None = None
    card: Path | None = None
    recipe: Path | None = None

    def write(
        self,
        reporter: Reporter,
        work: Callable[[Path, Destination | None], Report | None],
        *,
        suffix: str | None = None,
    ) -> int:
        """Call the function that writes the output, and show its report, unless standard output holds the model."""
        with self._source(reporter) as path:
            # An output at a URL is uploaded when this context ends.
            with self._destination(path, suffix) as destination:
                report = work(path, destination)
                if report is not None and self.output == STDIN and destination is not None:
                    _finish(destination)
                    return reporter.copy_to_stdout(destination.target)
            _finish(destination)
            return 0 if report is None else reporter.show(report)

    def _source(self, _: Reporter) -> AbstractContextManager[Path]:
        return resolve_stdin(self.model)

    @contextmanager
    def _destination(self, model: Path, suffix: str | None) -> Generator[Destination | None]:
        """Yield the destination of the result: None for a dry run, a scratch file for standard output."""
        if self.in_place and self.output:
            raise UsageError("--in-place replaces the input and cannot be used with --output")
        if self.dry_run:
            yield None
        elif self.in_place:
            yield Destination(model, is_in_place=True)
        elif not self.output:
            raise UsageError(
                "no output is given", hint="add -o OUT, --in-place, or --dry-run to see the result without writing it"
            )
        elif self.output != STDIN:
            yield Destination(Path(self.output), is_forced=self.force)
        elif data_stream().isatty():
            raise UsageError(
                "-o - writes a model to standard output, which is a terminal", hint="redirect it to a file or a pipe"
            )
        else:
            with temporary_folder() as scratch:
                name = f"standard-output{model.suffix if suffix is None else suffix}"
                yield Destination(scratch / name, to_stdout=True)


def _finish(destination: Destination | None) -> None:
    for step in destination.then if destination is not None else ():
        step()


_building = option_group("Builds (make, CI)")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options about builds."""

    depfile: Annotated[Path | None, _building(metavar="FILE", help="Write a make dependency file of all inputs.")] = (
        None
    )
    if_changed: Annotated[bool, _building("--if-changed", help="Skip the run if the output is up to date.")] = False


class BuildCommand(BaseCommand):
    """A command that makes one output from files: it can write a depfile, and skip an output that is up to date."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._take_build = add_options(self, BuildOptions)

    def run(self, ctx: Any) -> Any:
        """Run the command, unless its output is up to date; write the depfile and the stamp when it has succeeded."""
        build: BuildOptions = self._take_build(ctx)
        options: Any = super().run(ctx)
        if options.manifest is not None and not options.dry_run:
            models = [Path(name) for name in (options.model, options.output) if name]
            check_manifest = importlib.import_module("prunectl.pruning.manifest").check_manifest
            check_manifest(options.manifest, models, is_forced=options.force)
        if build.depfile is None and not build.if_changed:
            return options.run(ctx)
        return importlib.import_module("prunectl.commands._build").run_step(ctx, options, build)


class Mode(Flag):
    """The modes of `prune` and `finetune`, which decide which options go together."""

    NONE = 0
    SEARCH = auto()
    CHANNELS = auto()
    WRAPPERS = auto()
    SCHEDULE = auto()
    """A pruning schedule in wrappers."""
    DATA = auto()
    RECIPE = auto()
    BLOCKS = auto()
    PART = auto()
    PARTS = auto()
    """A part, a join of all parts, or a run of all parts on a cluster."""
    JOIN = auto()
    REMOTE_MODEL = auto()
    """A model at a URL."""
    REMOTE_PARTS = auto()
    """Parts that are written to a URL."""


@dataclass(frozen=True, slots=True)
class OptionRule:
    """Options that need some modes, or cannot be used with others; `{}` in a message is the option."""

    options: tuple[str, ...]
    message: str
    hint: str = ""
    only: Mode = Mode.NONE
    never: Mode = Mode.NONE


CHANNEL_LIMITS = {
    **{name: name for name in ("min_channels", "round_to", "max_ratio", "dead", "latency")},
    "target_params": "params",
    "target_flops": "flops",
}
"""Options of channel pruning, each with its name in a manifest."""
_AMOUNTS = ("sparsity", "compression", "target_gzip", "target_packed", "target_params", "target_flops", "dead")
_SCHEDULE = ("schedule_param", "initial_sparsity", "begin", "end", "frequency", "power")
_SECOND_AMOUNT = "{} and --max-drop both set the sparsity", "leave out {}"
_SEARCH = "{} cannot be used with --max-drop: "
_NOT_LOADED = "{} has no effect here: the model is not loaded by its framework"
_LOADED = Mode.WRAPPERS | Mode.DATA | Mode.CHANNELS | Mode.SEARCH
OPTION_RULES = {
    "prune": (
        OptionRule(_AMOUNTS, *_SECOND_AMOUNT, never=Mode.SEARCH),
        OptionRule(("wrap", "schedule"), f"{_SEARCH}wrappers prune later, during training", never=Mode.SEARCH),
        OptionRule(("latency",), f"{_SEARCH}only one network can be timed, with prune --sparsity", never=Mode.SEARCH),
        OptionRule(("metric", "tried"), "{} needs --max-drop, such as --max-drop 0.5pp", only=Mode.SEARCH),
        OptionRule(("wrap", "schedule"), "{} cannot be used with --pattern channel", never=Mode.CHANNELS),
        OptionRule(
            ("wrap", "schedule"),
            "{} cannot be used with --data: only strategies that need no data write wrappers",
            "leave out --data",
            never=Mode.DATA,
        ),
        OptionRule(
            ("manifest",),
            "{} cannot be used with wrappers: frameworks do not write them to the same bytes every time",
            never=Mode.WRAPPERS,
        ),
        OptionRule(_SCHEDULE, "{} needs a schedule", "add --schedule NAME", only=Mode.SCHEDULE),
        OptionRule(
            ("trust",),
            _NOT_LOADED,
            "add --wrap or --data SPEC, or leave out {}",
            # A recipe, or the notes of parts, may name code that needs --trust.
            only=_LOADED | Mode.RECIPE | Mode.JOIN,
        ),
        OptionRule(
            ("custom_objects", "builder"),
            _NOT_LOADED,
            "add --wrap or --data SPEC, or leave out {}",
            only=_LOADED | Mode.RECIPE,
        ),
        OptionRule(("blocks",), "{} needs --pattern layers", only=Mode.BLOCKS | Mode.RECIPE),
        OptionRule(
            (
                *("compression", "target_gzip", "target_packed", "max_drop", "exclude", "layer", "cluster"),
                *("repair", "wrap", "schedule", "builder", "custom_objects", "allow_empty"),
            ),
            "{} cannot be used with --pattern layers, which removes whole blocks",
            never=Mode.BLOCKS,
        ),
        OptionRule(
            (*CHANNEL_LIMITS, "inputs"),
            "{} needs --pattern channel",
            only=Mode.CHANNELS,
        ),
        OptionRule(
            ("target_gzip", "target_packed", "max_drop", "data", "repair", "wrap", "schedule", "pack", "latency"),
            "{} cannot be used with --part, --join or --on: it needs the whole model at once",
            never=Mode.PARTS,
        ),
        OptionRule(
            ("part", "join", "on"),
            "{} cannot be used with --pattern channel or layers",
            never=Mode.CHANNELS | Mode.BLOCKS,
        ),
        OptionRule(
            ("force", "in_place", "dry_run"),
            "{} cannot be used with --part, --join or --on: they write a new folder",
            never=Mode.PARTS,
        ),
        OptionRule(("manifest",), "{} is written by --join, from all parts", "add {} to --join", never=Mode.PART),
        OptionRule(
            ("cluster",), "{} cannot be used with wrappers: training would undo the clusters", never=Mode.WRAPPERS
        ),
        OptionRule(
            ("in_place",),
            "{} cannot replace a model at a URL",
            "name another place with --output",
            never=Mode.REMOTE_MODEL,
        ),
        OptionRule(
            ("manifest",),
            "{} cannot be used with parts that are joined at a URL: each would be read once more",
            "leave out {}, or join them in a folder",
            never=Mode.REMOTE_PARTS,
        ),
    ),
    "finetune": (
        OptionRule(("tried",), "{} needs --max-drop, such as --max-drop 0.5pp", only=Mode.SEARCH),
        OptionRule(("sparsity",), *_SECOND_AMOUNT, never=Mode.SEARCH),
        OptionRule(
            ("checkpoint_dir",),
            f"{_SEARCH}each trial is a separate run; --tried DIR resumes a search that was stopped",
            never=Mode.SEARCH,
        ),
        OptionRule(("resume",), f"{_SEARCH}--tried DIR resumes a search that was stopped", never=Mode.SEARCH),
        OptionRule(("logdir",), f"{_SEARCH}each trial is a separate run", never=Mode.SEARCH),
        OptionRule(("keep_wrappers",), f"{_SEARCH}models with wrappers cannot be evaluated", never=Mode.SEARCH),
    ),
}
"""Which option goes with which mode, by command; the first rule that is broken is reported."""


def check_options(ctx: typer.Context, options: object, mode: Mode) -> None:
    """Refuse options that cannot be used in the mode of a run."""
    for rule in OPTION_RULES[str(ctx.command.name)]:
        if mode & rule.never or (rule.only and not mode & rule.only):
            for name in filter(partial(getattr, options), rule.options):
                option = option_name(ctx, name)
                raise UsageError(rule.message.format(option), hint=rule.hint.format(option))


def request_options(ctx: typer.Context, options: Any, names: Container[str]) -> dict[str, Any]:
    """The options that differ from their defaults, by the names that are typed, with values as requests take them."""
    given = {}
    for field in fields(options):
        option, value = option_name(ctx, field.name), getattr(options, field.name)
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name in names and value != field.default:
            given[name] = _parsed(option, _PARSERS[name], value) if name in _PARSERS else value
    return given


def _parsed(option: str, parse: Callable[[Any], Any], value: Any) -> Any:
    """The value of an option; an error of its parser names the option."""
    try:
        return parse(value)
    except UsageError as error:
        error.message = f"{option}: {error.message}"
        raise


def parse_layer_ratio(text: str) -> tuple[str, float]:
    """A selector and its ratio, written GLOB=R."""
    selector, sign, ratio = text.rpartition("=")
    if not sign or not selector:
        raise UsageError(f"{text!r} is not a selector and a ratio", hint="write --layer 'conv*=0.5'")
    return selector, parse_ratio(ratio)


_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("sparsity", "initial_sparsity", "max_ratio", "val_split"), parse_ratio),
    **dict.fromkeys(("target_gzip", "target_packed", "shard_size"), parse_size),
    **dict.fromkeys(("scope", "nan", "repair"), str),
    "layer": lambda texts: tuple(map(parse_layer_ratio, texts)),
}
"""Parsers from typer's value of an option to its value in a request, by name."""


def module_of(name: str) -> str:
    """The name of the module that `--import` names, by its name or its file."""
    return Path(name).stem if name.endswith(".py") else name


def import_first(names: Iterable[str]) -> None:
    """Import modules before anything is opened, so that classes that a file refers to are registered.

    The current folder is searched last, so that no file in it hides a library. `./net.py` is imported as `net`, as a
    script beside it would import it.
    """
    for name in names:
        path = Path(name)
        is_file = path.suffix == ".py"
        if is_file and not path.is_file():
            raise UsageError(f"--import {name}: the file does not exist")
        folder = str(path.resolve().parent if is_file else Path.cwd())
        if folder not in sys.path:
            sys.path.append(folder)
        module = module_of(name)
        try:
            imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0]:
                raise UsageError(f"--import {name}: it imports {error.name}, which cannot be found") from error
            raise UsageError(
                f"--import {name}: no such module is installed or in this folder",
                hint="for a file elsewhere, write --import folder/net.py",
            ) from error
        except Exception as error:
            raise UsageError(f"--import {name} raised {type(error).__name__}: {error}") from error
        if is_file and getattr(imported, "__file__", None) is not None and not path.samefile(str(imported.__file__)):
            raise UsageError(
                f"--import {name}: another module is already called {module}: {imported.__file__}",
                hint="rename the file",
            )
