"""The typed request of `export`, parsed from its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prunectl.errors import UsageError
from prunectl.exporting.inputs import InputOption, parse
from prunectl.training.backend import LoadOptions

BATCH_SIZE = 32
SAMPLES = 256


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """The options of an export; None or empty where not given."""

    to: str = ""
    opset: int | None = None
    inputs: tuple[InputOption, ...] = ()
    data: str = ""
    samples: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    atol: float | None = None
    rtol: float | None = None
    origin: LoadOptions = field(default_factory=LoadOptions)
    is_half: bool = False
    is_bf16: bool = False
    is_int8: bool = False
    is_sparse: bool = False
    is_packed: bool = False
    has_code: bool = False
    metadata: tuple[tuple[str, str], ...] = ()
    card: Path | None = None

    @property
    def given_options(self) -> tuple[str, ...]:
        """The names of the options given, of those that not every target takes."""
        origin = self.origin
        is_set = {
            "opset": self.opset is not None,
            "input": bool(self.inputs),
            "data": bool(self.data),
            "samples": self.samples is not None,
            "batch-size": self.batch_size is not None,
            "seed": self.seed is not None,
            "atol": self.atol is not None,
            "rtol": self.rtol is not None,
            "model": bool(origin.model),
            "custom-objects": bool(origin.custom_objects),
            "trust": origin.is_trusted,
            "half": self.is_half,
            "bf16": self.is_bf16,
            "int8": self.is_int8,
            "sparse": self.is_sparse,
            "pack": self.is_packed,
            "code": self.has_code,
            "metadata": bool(self.metadata),
        }
        return tuple(name for name, flag in is_set.items() if flag)


DEFAULTS: Mapping[str, Any] = {
    "to": "",
    "opset": None,
    "input": (),
    "data": "",
    "samples": None,
    "batch_size": None,
    "seed": None,
    "atol": None,
    "rtol": None,
    "model": "",
    "custom_objects": "",
    "trust": False,
    "half": False,
    "bf16": False,
    "int8": False,
    "sparse": False,
    "pack": False,
    "code": False,
    "metadata": (),
    "card": None,
}


def parse_request(options: Mapping[str, Any]) -> ExportRequest:
    """Parse options, by the names of the command line, over their defaults."""
    for option in options:
        if option not in DEFAULTS:
            raise UsageError(f"export takes no {option}", did_you_mean=tuple(get_close_matches(option, DEFAULTS, n=2)))
    settings = {**DEFAULTS, **options}
    return ExportRequest(
        to=settings["to"],
        opset=settings["opset"],
        inputs=tuple(map(parse, settings["input"])),
        data=settings["data"],
        samples=settings["samples"],
        batch_size=settings["batch_size"],
        seed=settings["seed"],
        atol=settings["atol"],
        rtol=settings["rtol"],
        origin=LoadOptions(settings["model"], settings["custom_objects"], settings["trust"], settings["seed"] or 0),
        is_half=settings["half"],
        is_bf16=settings["bf16"],
        is_int8=settings["int8"],
        is_sparse=settings["sparse"],
        is_packed=settings["pack"],
        has_code=settings["code"],
        metadata=tuple(map(_parse_metadata, settings["metadata"])),
        card=Path(settings["card"]) if settings["card"] else None,
    )


def _parse_metadata(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UsageError(f"{text!r} is no key with a value", hint="write --metadata author=me")
    return key, value
