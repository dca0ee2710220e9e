"""What is refused before any work begins: what contradicts itself, and places that may not be written to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from prunectl.errors import UsageError
from prunectl.exporting.request import Request
from prunectl.exporting.targets import Target, check_options
from prunectl.formats import outputs as places
from prunectl.formats.base import ModelFile
from prunectl.pruning.output import Output

_FIRST_OPSET = 9
"""Before it, weights had to be inputs as well."""


def check(request: Request, target: Target, output: Output) -> None:
    """Refuse what contradicts itself, before a file is opened."""
    check_options(target, request.typed)
    if request.opset is not None and request.opset < _FIRST_OPSET:
        raise UsageError(f"--opset {request.opset} is older than what prunectl writes", hint="it begins with 9")
    fewer = [f"--{name}" for name in ("half", "bf16", "int8") if name in request.typed]
    if len(fewer) > 1:
        raise UsageError(f"{' and '.join(fewer)} exclude each other")
    for option, value in (("--atol", request.atol), ("--rtol", request.rtol)):
        if value is not None and not value >= 0:
            raise UsageError(f"{option} takes a number that is not negative, and not {value:g}")
    if not request.data and request.samples is not None and request.is_int8:
        raise UsageError("--int8 with --samples needs examples", hint="add --data SPEC")
    if request.has_code and output.is_stream:
        raise UsageError("--code writes a second file, which does not fit through standard output", hint="say -o OUT")


def check_place(model: ModelFile, output: Output, target: Target, beside: Iterable[Path]) -> None:
    """Refuse to write over the input, or over anything else unless the user said so."""
    if output.is_stream:
        if target.name == "saved-model":
            raise UsageError("a SavedModel is a folder, and does not fit through standard output")
        return
    for place in (output.target, *beside):
        if any(os.path.lexists(place) and places.is_same(file, place) for file in model.files):
            raise UsageError(f"{place} belongs to the input", hint="write elsewhere")
    whole = model if model.path.is_dir() else replace(model, format=target.name, files=(model.path,))
    places.check_target(whole, output.target, is_forced=output.is_forced, is_in_place=False)
    for place in beside:
        if os.path.lexists(place) and not output.is_forced:
            raise UsageError(f"{place} exists", hint="write elsewhere, or replace it with --force")
