"""The words of the command line, as a request."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prunectl.errors import UsageError
from prunectl.exporting.request import Request
from prunectl.exporting.said import parse
from prunectl.training.network import Origin

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


def request_of(words: Mapping[str, Any]) -> Request:
    """Return the request that words make; those left out have their defaults."""
    for word in words:
        if word not in DEFAULTS:
            raise UsageError(f"export takes no {word}", did_you_mean=tuple(get_close_matches(word, DEFAULTS, n=2)))
    said = {**DEFAULTS, **words}
    return Request(
        to=said["to"],
        opset=said["opset"],
        inputs=tuple(map(parse, said["input"])),
        data=said["data"],
        samples=said["samples"],
        batch_size=said["batch_size"],
        seed=said["seed"],
        atol=said["atol"],
        rtol=said["rtol"],
        origin=Origin(said["model"], said["custom_objects"], said["trust"], said["seed"] or 0),
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
