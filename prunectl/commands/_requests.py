"""Parsing of options into requests, and of `--output` into a destination."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import typer

from prunectl.commands._command import STDIN, given_on_command_line, option_name
from prunectl.errors import UsageError
from prunectl.formats.base import StripPart
from prunectl.formats.scratch import temporary_folder
from prunectl.pruning import manifest
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from prunectl.units import parse_ratio, parse_size

_NOT_IN_RECIPE = frozenset(
    {"model", "output", "dry_run", "manifest", "recipe", "force", "in_place", "trust", "allow_empty"}
)
"""What a recipe leaves open."""


def prune_request(ctx: typer.Context, recipe: Path | None) -> PruneRequest:
    """The request of a recipe, or of the options on the command line."""
    params = ctx.params
    if recipe is not None:
        typed = [name for name in params if name not in _NOT_IN_RECIPE and given_on_command_line(ctx, name)]
        if typed:
            raise UsageError(f"--recipe says all that decides the result: leave out {option_name(ctx, typed[0])}")
        return manifest.read(recipe, is_trusted=params["trust"])
    return PruneRequest(
        sparsity=parse_ratio(params["sparsity"]) if params["sparsity"] else None,
        compression=params["compression"],
        target_gzip=parse_size(params["target_gzip"]) if params["target_gzip"] else None,
        target_packed=parse_size(params["target_packed"]) if params["target_packed"] else None,
        strategy=params["strategy"],
        params=tuple(params["param"] or ()),
        scope=str(params["scope"]),
        pattern=params["pattern"],
        policy=params["policy"],
        only=params["only"],
        exclude=tuple(params["exclude"] or ()),
        layers=tuple(map(parse_layer_ratio, params["layer"] or ())),
        seed=params["seed"],
        nan=str(params["nan"]),
        is_packed=params["pack"],
        data=params["data"],
        samples=params["samples"],
        batch_size=params["batch_size"],
        loss=params["loss"],
        model=params["build"],
        custom_objects=params["custom_objects"],
        inputs=tuple(params["inputs"] or ()),
        is_repaired=params["repair"],
        cluster=params["cluster"],
    )


@contextmanager
def open_destination(
    model: Path, output: str, *, force: bool, in_place: bool, dry_run: bool
) -> Generator[Destination | None]:
    """Yield where the result goes: nowhere for a dry run, through a scratch file to standard output."""
    if in_place and output:
        raise UsageError("--in-place replaces the input: leave out --output")
    if dry_run:
        yield None
    elif in_place:
        yield Destination(model, is_in_place=True)
    elif not output:
        raise UsageError("where to? say --output", hint="or --in-place, or --dry-run to see what would come of it")
    elif output != STDIN:
        yield Destination(Path(output), is_forced=force)
    elif sys.stdout.isatty():
        raise UsageError(
            "-o - writes a model to standard output, which is a terminal", hint="send it to a file or a pipe"
        )
    else:
        with temporary_folder() as scratch:
            yield Destination(scratch / f"standard-output{model.suffix}", to_stdout=True)


def parse_parts(text: str) -> frozenset[StripPart]:
    """The parts in a list with commas; all of them if it is empty."""
    known = {str(part): part for part in StripPart}
    for name in filter(None, text.split(",")):
        if name not in known:
            raise UsageError(
                f"{name!r} is no part of a model",
                did_you_mean=tuple(get_close_matches(name, known, n=2)),
                hint=f"parts: {', '.join(known)}",
            )
    return frozenset(known[name] for name in text.split(",")) if text else frozenset(StripPart)


def parse_layer_ratio(text: str) -> tuple[str, float]:
    """A selector and its ratio, written GLOB=R."""
    selector, sign, ratio = text.rpartition("=")
    if not sign or not selector:
        raise UsageError(f"{text!r} is not a selector and a ratio", hint="write --layer 'conv*=0.5'")
    return selector, parse_ratio(ratio)


def module_of(name: str) -> str:
    """The module that `--import` means, also by its file."""
    return Path(name).stem if name.endswith(".py") else name


def import_first(names: Iterable[str]) -> None:
    """Import modules before anything is opened: what a file refers to is then known under their names.

    A module is looked for in the current folder as well, after all others, so that nothing there takes the place of a
    library. `./net.py` is imported as `net`, as a script beside it would import it.
    """
    for name in names:
        path = Path(name)
        is_file = path.suffix == ".py"
        if is_file and not path.is_file():
            raise UsageError(f"--import {name}: there is no such file")
        folder = str(path.resolve().parent if is_file else Path.cwd())
        if folder not in sys.path:
            sys.path.append(folder)
        module = module_of(name)
        try:
            imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0]:
                raise UsageError(f"--import {name}: it needs a module {error.name}, which is not here") from error
            raise UsageError(
                f"--import {name}: there is no such module, neither installed nor in this folder",
                hint="for a file elsewhere, write --import folder/net.py",
            ) from error
        except Exception as error:
            raise UsageError(f"--import {name}: {type(error).__name__}: {error}") from error
        if is_file and getattr(imported, "__file__", None) is not None and not path.samefile(str(imported.__file__)):
            raise UsageError(
                f"--import {name}: {module} is the name of another module, {imported.__file__}", hint="rename the file"
            )
