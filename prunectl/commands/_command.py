"""What every command has: the options about output, and a reporter made of them."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from prunectl.analysis.stats import ModelStats
from prunectl.commands._frameworks import framework_imports
from prunectl.commands.app import COMMON_OPTIONS
from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.formats.detect import URL, url_error, without_secrets
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.workers import workers
from prunectl.reporting.report import DEFAULT_ROWS, Color, Failure, Layout, Settings
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.stdout import reserved
from prunectl.units import Units

STDIN = "-"


def inspect_each(
    models: Sequence[str], look: Callable[[Path], ModelStats], tell: Callable[[str], object], *, jobs: int = 1
) -> tuple[list[ModelStats], list[Failure]]:
    """Statistics of each model that could be read, and a failure for each other one; `jobs` models at a time."""
    inspected, failures = [], []

    def seen(named: tuple[str, Path]) -> ModelStats:
        if named[0] == STDIN:
            return look(named[1])
        with resolve_model(named[0], tell) as path:
            return look(path)

    with ExitStack() as scope:
        # Without threads in this process, starting a sandbox is cheaper.
        each: Callable[..., Iterable[Any]] = scope.enter_context(workers(jobs)).map if jobs > 1 else map
        paths = [scope.enter_context(resolve_stdin(model)) for model in models]
        results = each(partial(attempt, seen), zip(models, paths, strict=True))
        for model, path, stats in zip(models, paths, results, strict=True):
            if isinstance(stats, PrunectlError):
                failures.append(Failure(without_secrets(model), with_given_path(stats, path, model)))
            else:
                inspected.append(replace(stats, path=without_secrets(model)))
    return inspected, failures


def with_given_path(error: PrunectlError, path: Path, argument: str) -> PrunectlError:
    """The error with the name of standard input in place of the scratch file that holds its bytes."""
    if argument == STDIN:
        error.message = error.message.replace(str(path), "standard input")
        error.hint = error.hint.replace(str(path), STDIN)
    return error


@contextmanager
def resolve_model(
    argument: str, tell: Callable[[str], object] = lambda _: None, *, is_read_whole: bool = False
) -> Generator[Path]:
    """Yield a local path to a file, standard input, or a URL, of which no more is read than is needed."""
    if URL.match(argument) is None:
        with resolve_stdin(argument) as path:
            yield path
        return
    remote = importlib.import_module("prunectl.formats.remote")
    with remote.mirrored(argument, tell=tell, is_read_whole=is_read_whole) as path:
        yield path


@contextmanager
def resolve_stdin(argument: str) -> Generator[Path]:
    """Yield a path to a file, or to a scratch file with the bytes of standard input."""
    if argument != STDIN:
        yield Path(argument)
        return
    if sys.stdin.isatty():
        raise UsageError(
            "- reads a model from standard input, which is a terminal",
            hint="redirect a file: prunectl inspect - < MODEL",
        )
    with temporary_folder() as scratch:
        copy = scratch / "standard-input"
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        try:
            yield copy
        except PrunectlError as error:
            raise with_given_path(error, copy, argument) from error


def option_group(title: str) -> Callable[..., Any]:
    """A factory of options that `--help` shows together under a title."""
    return partial(typer.Option, rich_help_panel=title)


def builder_option(group: Callable[..., Any]) -> Any:
    """The option that names the code of a network, in a group of options."""
    line = "Code that builds the network, e.g. net.py:Net, if the file holds only weights."
    return group("--builder", metavar="MOD:FN", help=line)


def custom_objects_option(group: Callable[..., Any]) -> Any:
    """The option that names custom objects of Keras, in a group of options."""
    return group(metavar="MOD:DICT", help="Custom Keras objects by name: layers.py:OBJECTS.")


def import_option(group: Callable[..., Any]) -> Any:
    """The option that names modules to import first, in a group of options."""
    return group("--import", metavar="MOD", help="Import this module first: net, or ./net.py.")


def option_name(ctx: typer.Context, name: str) -> str:
    """The longest spelling of an option, by the name of its parameter: `--input` for `inputs`."""
    spellings = [spelling for param in ctx.command.params if param.name == name for spelling in param.opts]
    # A name from a file may belong to no option.
    return max(spellings, key=len, default=name)


def given_on_command_line(ctx: typer.Context, name: str) -> bool:
    """Whether an option was typed, rather than having its default value."""
    source: Any = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


_OLD_NAMES, _COMMAND_LINE = "old names of options", "the command line"
_SELECTION = {"--only": "--layers", "--model": "--builder"}
RENAMED: Mapping[str, Mapping[str, str]] = {
    "inspect": {"--model": "--builder"},
    "prune": {**_SELECTION, "--params": "--target-params", "--flops": "--target-flops"},
    "finetune": {**_SELECTION, "--distill-model": "--distill-builder", "--step": "--train-step"},
    "sweep": _SELECTION,
    "export": {"--model": "--builder"},
    "size": {"--baseline": "--against"},
}
"""Old names of options with their new ones, by command: accepted for one version with a note, and hidden."""


BARE = {"--repair": ("layers", "outputs")}
"""Options whose value may be left out, with the values that they take, the default first."""


def _with_default_values(args: list[str]) -> Iterator[str]:
    """Yield arguments, with the default value after an option whose value was left out."""
    for argument, following in zip_longest(args, args[1:]):
        is_alone = argument in BARE and following not in BARE[argument]
        yield f"{argument}={BARE[argument][0]}" if is_alone else argument


class BaseCommand(TyperCommand):
    """A command with the common options after its own; it gets them as a reporter in the context."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._take_common = add_options(self, CommonOptions)
        add_help_options(self)

    def make_parser(self, ctx: Any) -> Any:
        """The parser of the options, which accepts old names."""
        parser = super().make_parser(ctx)
        options = {name: param for param in self.params for name in param.opts}
        for old, new in RENAMED.get(str(self.name), {}).items():
            option: Any = options[new]
            parser.add_option(option, [old], option.name, "append" if option.multiple else "store")
        return parser

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options, and remember which old names were typed."""
        typed = {argument.partition("=")[0] for argument in args}
        ctx.meta[_COMMAND_LINE] = shlex.join(["prunectl", str(self.name), *map(without_secrets, args)])
        ctx.meta[_OLD_NAMES] = [pair for pair in RENAMED.get(str(self.name), {}).items() if pair[0] in typed]
        return super().parse_args(ctx, list(_with_default_values(args)))

    def invoke(self, ctx: Any) -> Any:
        """Take the common options out of the parameters, and run with a reporter made of them."""
        # Those that are written to by a command that knows how are left to it, as those of models are.
        is_uploading = self.name == "prune" and URL.match(str(ctx.params.get("output")))
        _check_addresses((param for param in self.params if not (is_uploading and param.name == "output")), ctx.params)
        _check_models(self, ctx.params)
        common: CommonOptions = self._take_common(ctx)
        if common.html is not None:
            _check_page(common.html, ctx.params)
        command_line = ctx.meta[_COMMAND_LINE]
        ctx.obj = Reporter(common.settings, command=str(self.name), html=common.html, command_line=command_line)
        for old, new in ctx.meta[_OLD_NAMES]:
            ctx.obj.note(f"note: {old} is now called {new}; the next version will not know the old name")
        with framework_imports(common.settings), reserved():
            return self.run(ctx)

    def run(self, ctx: Any) -> Any:
        """Do the work of the command, and return its exit code."""
        return super().invoke(ctx)


_WRITTEN = frozenset({"output", "html", "card", "manifest", "depfile", "logdir", "checkpoint_dir", "tried"})
"""Options that name an output."""


def _check_addresses(params: Iterable[Any], values: Mapping[str, Any]) -> None:
    """Refuse URLs in options, as nothing is downloaded. Those of models are left to the code that opens them."""
    for param in params:
        value = values.get(param.name)
        for part in value if isinstance(value, list | tuple) else (value,):
            if param.param_type_name == "option" and isinstance(part, str | Path):
                error = url_error(str(part), is_written=param.name in _WRITTEN)
                if error is not None:
                    raise error


_READS_URLS = frozenset({"inspect", "size", "diff", "prune", "strip"})


def _check_models(command: TyperCommand, values: Mapping[str, Any]) -> None:
    """Refuse a model at a URL where the command needs it as a file."""
    if command.name in _READS_URLS:
        return
    for param in command.params:
        value = values.get(str(param.name)) if param.param_type_name == "argument" else None
        for part in value if isinstance(value, list | tuple) else (value,):
            error = url_error(str(part)) if isinstance(part, str | Path) else None
            if error is not None:
                url = error.message.partition(" is a URL")[0]
                message = f"{url} is a URL, and {command.name} reads only files: download it first"
                raise UsageError(message, hint=error.hint)


def _check_page(html: Path, values: Mapping[str, Any]) -> None:
    """Refuse an HTML page that cannot be written, or for which there would be no report."""
    if values.get("output") == STDIN or any(target.endswith(f":{STDIN}") for target in values.get("report") or ()):
        raise UsageError(
            "--html cannot be used here: the report is not printed, because standard output carries other data"
        )
    importlib.import_module("prunectl.reporting.html").check(html)


def add_options(command: TyperCommand, kind: type[Any]) -> Callable[[Any], Any]:
    """Add the fields of a dataclass to the options of a command; return a function that reads them from a context."""
    lender = make_command(kind, TyperCommand)
    command.params.extend(lender.params)
    make: Any = lender.callback
    return lambda ctx: make(**{str(option.name): ctx.params.pop(option.name) for option in lender.params})


def make_command(callback: Callable[..., Any], kind: type[TyperCommand] = BaseCommand) -> TyperCommand:
    """A command from a function that returns the exit code, or from a dataclass of options for a class that runs it."""
    single = typer.Typer(rich_markup_mode="rich", add_completion=False)
    single.command(cls=kind, add_help_option=False)(callback)
    command = typer.main.get_command(single)
    assert isinstance(command, TyperCommand)
    # Paragraphs are wrapped at the width of the terminal, not where the source has line breaks.
    command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", command.help or "")
    return command


def add_help_options(command: TyperCommand) -> None:
    """Add `-h`, a page that fits on a screen, and `--help`, which shows every option."""
    for name, line in (("-h", "Show the options that are used most."), ("--help", "Show all options.")):
        show = partial(_show_help, is_short=name == "-h")
        option = TyperOption(param_decls=[name], is_flag=True, is_eager=True, expose_value=False, help=line)
        option.callback, option.rich_help_panel = show, COMMON_OPTIONS
        command.params.append(option)


def _show_help(ctx: typer.Context, _option: object, is_given: bool, *, is_short: bool) -> None:
    if is_given and not ctx.resilient_parsing:
        importlib.import_module("prunectl.commands._help_page").show_help(ctx, is_short=is_short)
        raise typer.Exit


_option = option_group(COMMON_OPTIONS)


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """The options about output."""

    json: Annotated[bool, _option("--json", help="Print one JSON object instead of tables.")] = False
    layout: Annotated[
        Layout | None, _option("--format", help="Output format; human on a terminal, plain in a pipe.")
    ] = None
    html: Annotated[Path | None, _option("--html", metavar="FILE", help="Also write the report as an HTML page.")] = (
        None
    )
    quiet: Annotated[bool, _option("-q", "--quiet", help="Print only errors and the bare result.")] = False
    verbose: Annotated[bool, _option("-v", "--verbose", help="Also print run time and peak memory.")] = False
    debug: Annotated[bool, _option("--debug", help="Show tracebacks of errors.")] = False
    """Read from the arguments where errors are caught, which may be before options are parsed."""
    color: Annotated[Color, _option("--color", help="Colour the output; auto: on a terminal.")] = Color.AUTO
    no_progress: Annotated[bool, _option("--no-progress", help="Hide progress bars.")] = False
    rows: Annotated[int, _option("-n", "--rows", help="Rows to show in the main table; 0 shows all.", min=0)] = (
        DEFAULT_ROWS
    )
    units: Annotated[Units, _option("--units", help="Unit of sizes: si (kB), iec (KiB) or bytes.")] = Units.SI

    @property
    def settings(self) -> Settings:
        """The choices about output."""
        return Settings(
            layout=Layout.JSON if self.json else self.layout,
            is_quiet=self.quiet,
            is_verbose=self.verbose,
            color=self.color,
            has_progress=not self.no_progress,
            rows=self.rows,
            units=self.units,
        )
