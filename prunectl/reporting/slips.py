"""Answers to a slip on the command line: the option or command that was meant, also by its name in other tools."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

from typer import TyperException

from prunectl.errors import UsageError

_OPTIONS = {
    "--amount": "--sparsity",
    "--batch": "--batch-size",
    "--criterion": "--strategy",
    "--dataset": "--data",
    "--epoch": "--epochs",
    "--fp16": "--half",
    "--global": "--scope global",
    "--ignore": "--exclude",
    "--include": "--layers",
    "--filter": "--layers",
    "--input-shape": "--input",
    "--learning-rate": "--lr",
    "--method": "--strategy",
    "--only": "--layers",
    "--out": "--output",
    "--overwrite": "--force",
    "--quantize": "--int8",
    "--ratio": "--sparsity",
    "--shape": "--input",
    "--skip": "--exclude",
    "--structured": "--pattern",
    "--yes": "--force",
    "-f": "--force",
    "-y": "--force",
}
_COMMANDS = {
    "benchmark": "sweep",
    "clean": "strip",
    "compare": "diff",
    "compress": "prune",
    "convert": "export",
    "evaluate": "eval",
    "fine-tune": "finetune",
    "gate": "check",
    "info": "inspect",
    "list": "plugins",
    "ls": "inspect",
    "quantise": "export --int8",
    "quantize": "export --int8",
    "retrain": "finetune",
    "search": "sweep",
    "show": "inspect",
    "sparsify": "prune",
    "stats": "inspect",
    "summary": "inspect",
    "train": "finetune",
}
_UNKNOWN_COMMAND = re.compile(r"No such command '(.*?)'.*")


def usage_error(error: TyperException) -> UsageError:
    """The error for a wrong command line, with suggestions and where to read on."""
    context: Any = getattr(error, "ctx", None)
    hint = f"see: {context.command_path if context is not None else 'prunectl'} -h"
    message = " ".join(error.format_message().split()).rstrip(".")
    if context is None:
        return UsageError(message, hint=hint)
    option = getattr(error, "option_name", "")
    if option and hasattr(error, "possibilities"):
        known = [name for param in context.command.params for name in (*param.opts, *param.secondary_opts)]
        return UsageError(
            f"{context.command.name} has no option {option}", hint=hint, did_you_mean=_meant(option, _OPTIONS, known)
        )
    unknown = _UNKNOWN_COMMAND.fullmatch(message)
    if unknown:
        known = list(getattr(context.command, "commands", ()))
        return UsageError(
            f"prunectl has no command {unknown[1]}", hint=hint, did_you_mean=_meant(unknown[1], _COMMANDS, known)
        )
    return UsageError(message[:1].lower() + message[1:], hint=hint)


def _meant(typed: str, synonyms: dict[str, str], known: list[str]) -> tuple[str, ...]:
    synonym = synonyms.get(typed, "")
    if synonym.split(" ")[0] in known:
        return (synonym,)
    return tuple(get_close_matches(typed, known, n=3, cutoff=0.6))
