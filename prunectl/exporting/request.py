"""What the user asks of `export`, in the words of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prunectl.errors import UsageError
from prunectl.exporting.inputs import InputOption, parse
from prunectl.training.backend import ModelOrigin

BATCH_SIZE = 32
SAMPLES = 256


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Every choice of a run; what is None or empty was not said."""

    to: str = ""
    opset: int | None = None
    inputs: tuple[InputOption, ...] = ()
    data: str = ""
    samples: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    atol: float | None = None
    rtol: float | None = None
    origin: ModelOrigin = field(default_factory=ModelOrigin)
    is_half: bool = False
    is_bf16: bool = False
    is_int8: bool = False
    is_sparse: bool = False
    is_packed: bool = False
    has_code: bool = False
    metadata: tuple[tuple[str, str], ...] = ()
    card: Path | None = None

    @property
    def typed(self) -> tuple[str, ...]:
        """The options that were said, of those which do not fit everywhere."""
        origin = self.origin
        said = {
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
        return tuple(name for name, is_said in said.items() if is_said)


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


def request_of(words: Mapping[str, Any]) -> ExportRequest:
    """Return the request that words make; those left out have their defaults."""
    for word in words:
        if word not in DEFAULTS:
            raise UsageError(f"export takes no {word}", did_you_mean=tuple(get_close_matches(word, DEFAULTS, n=2)))
    said = {**DEFAULTS, **words}
    return ExportRequest(
        to=said["to"],
        opset=said["opset"],
        inputs=tuple(map(parse, said["input"])),
        data=said["data"],
        samples=said["samples"],
        batch_size=said["batch_size"],
        seed=said["seed"],
        atol=said["atol"],
        rtol=said["rtol"],
        origin=ModelOrigin(said["model"], said["custom_objects"], said["trust"], said["seed"] or 0),
        is_half=said["half"],
        is_bf16=said["bf16"],
        is_int8=said["int8"],
        is_sparse=said["sparse"],
        is_packed=said["pack"],
        has_code=said["code"],
        metadata=tuple(map(_pair, said["metadata"])),
        card=Path(said["card"]) if said["card"] else None,
    )


def _pair(word: str) -> tuple[str, str]:
    key, sign, value = word.partition("=")
    if not sign or not key:
        raise UsageError(f"{word!r} is no key with a value", hint="write --metadata author=me")
    return key, value
