"""What the files hold that the words of a search name: when one of them changes, its numbers change."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prunectl.formats.table import open_model
from prunectl.measuring import archive
from prunectl.sweeping.choices import Choices
from prunectl.sweeping.point import BASE
from prunectl.sweeping.requests import training_of
from prunectl.training.data import files


def digests(*, specs: Iterable[str], functions: Iterable[Any], models: Iterable[str] = ()) -> dict[str, str]:
    """Return the hash of every file that data, functions and other models lie in, by its path."""
    words = tuple(functions)
    found = [
        *(file for spec in specs if spec for file in files.of_spec(spec)),
        *files.of_functions(words),
        *_modules((*(spec.partition("?")[0] for spec in specs), *words)),
        *(file for model in models if model for file in open_model(Path(model)).files),
    ]
    return {str(path): archive.sha256_of(path) for path in dict.fromkeys(found) if path.is_file()}


def files_of(choices: Choices) -> dict[str, str]:
    """Return the hashes of what a sweep reads beside its model."""
    means = training_of(choices, BASE).means
    words = (*choices.strategies, choices.policy, choices.loss, choices.model, choices.custom_objects, *means.metrics)
    return digests(specs=(choices.data, choices.val), functions=words)


def _modules(words: Iterable[Any]) -> Iterator[Path]:
    """Yield the files of modules that words name as `package.module:name`, which are not imported for it."""
    for word in words:
        where, colon, name = word.rpartition(":") if isinstance(word, str) else ("", "", "")
        parts = where.split(".")
        if colon and name.isidentifier() and all(part.isidentifier() for part in parts):
            places = (Path(folder or ".").joinpath(*parts) for folder in sys.path)
            tried = (path for place in places for path in (place.with_suffix(".py"), place / "__init__.py"))
            yield from (path for path in [next(filter(Path.is_file, tried), None)] if path is not None)
