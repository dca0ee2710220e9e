"""The typed request of `export`, parsed from its options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prunectl.channels.lengths import InputOption, parse_input
from prunectl.errors import UsageError
from prunectl.training.backend import LoadOptions

BATCH_SIZE = 32
SAMPLES = 256
_INPUT = "x:1,3,224,224:f32, where -1 or ? leaves an axis open"


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """The options of an export, named as on the command line; None or empty if not given."""

    to: str = ""
    opset: int | None = None
    input: tuple[InputOption, ...] = ()
    data: str = ""
    samples: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    atol: float | None = None
    rtol: float | None = None
    builder: str = ""
    custom_objects: str = ""
    trust: bool = False
    half: bool = False
    bf16: bool = False
    int8: bool = False
    sparse: bool = False
    pack: bool = False
    code: bool = False
    metadata: tuple[tuple[str, str], ...] = ()
    card: Path | None = None
    shard_size: int | None = None
    """Largest size of a shard in bytes, for a folder as output."""

    @property
    def origin(self) -> LoadOptions:
        """Options to load the model into its framework."""
        return LoadOptions(self.builder, self.custom_objects, self.trust, self.seed or 0)

    @property
    def given_options(self) -> tuple[str, ...]:
        """Names of the given options, without `to` and `card`, which every target takes."""
        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return tuple(name.replace("_", "-") for name in given if name not in {"to", "card"})


OPTIONS = tuple(field.name for field in fields(ExportRequest))


def refuse_unknown(command: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Refuse an option that a command does not have, and suggest similar names."""
    for option in options:
        if option not in known:
            raise UsageError(
                f"{command} has no option {option}", did_you_mean=tuple(get_close_matches(option, known, n=2))
            )


def parse_request(options: Mapping[str, Any]) -> ExportRequest:
    """Parse options named as on the command line; missing options take their defaults."""
    refuse_unknown("export", options, OPTIONS)
    request = ExportRequest(**options)
    return replace(
        request,
        input=tuple(parse_input(text, _INPUT) for text in options.get("input", ())),
        metadata=tuple(map(_parse_metadata, options.get("metadata", ()))),
        card=Path(options["card"]) if options.get("card") else None,
    )


def _parse_metadata(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UsageError(f"--metadata {text!r} is not KEY=VALUE", hint="write --metadata author=me")
    return key, value
