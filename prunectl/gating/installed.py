"""What is installed of what prunectl can use, without importing any of it."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from prunectl.errors import InputError

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([^;]*)(?:;.*extra\s*==\s*['\"]([^'\"]+)['\"])?")
_BOUND = re.compile(r"(>=|<)\s*([0-9.]+)")
_EVERYTHING = "all"

BRINGS = {
    "": "inspect, size, check, diff, verify, strip and prune of every format",
    "tensorflow": "finetune, export and prune --data of Keras and TensorFlow; prune --wrap",
    "torch": "finetune, export and prune --data of PyTorch",
    "onnx": "prune --data and --pattern channel of ONNX; export from ONNX",
    "export": "export to ONNX",
    "zstd": "size --codec zstd; zstd inside of models",
    "images": "--data of folders with images",
    "parquet": "--data of Parquet files",
    "ray": "sweep --on ray",
}
"""What each extra is for; none is the core."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package that something needs."""

    name: str
    extra: str
    wanted: str
    """As the requirement says it: `>=1.17`."""
    version: str
    """What is installed; empty if it is not."""

    @property
    def is_ready(self) -> bool:
        """Whether it is there, and new enough."""
        if not self.version:
            return False
        found = _numbers(self.version)
        return all(
            found >= _numbers(bound) if sign == ">=" else found < _numbers(bound)
            for sign, bound in _BOUND.findall(self.wanted)
        )


@dataclass(frozen=True, slots=True)
class Extra:
    """What comes with an extra, and whether it works."""

    name: str
    brings: str
    packages: tuple[Package, ...]

    @property
    def is_ready(self) -> bool:
        """Whether all of its packages are."""
        return all(package.is_ready for package in self.packages)

    @property
    def remedy(self) -> str:
        """What to type, where it is not."""
        if self.is_ready:
            return ""
        return f"pip install 'prunectl[{self.name}]'" if self.name else "pip install --force-reinstall prunectl"


def extras() -> tuple[Extra, ...]:
    """Return the core, then every extra."""
    packages = list(_packages())
    return tuple(
        Extra(name, brings, tuple(one for one in packages if one.extra == name)) for name, brings in BRINGS.items()
    )


def libraries() -> tuple[tuple[str, str], ...]:
    """Return what else decides results to the byte."""
    return (("zlib", zlib.ZLIB_RUNTIME_VERSION),)


def _packages() -> Iterator[Package]:
    try:
        lines = metadata.requires("prunectl") or []
    except metadata.PackageNotFoundError as error:
        raise InputError("prunectl is not installed: it runs from its sources", hint="pip install -e .") from error
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match and match[3] != _EVERYTHING:
            yield Package(match[1], match[3] or "", match[2].strip(), _version(match[1]))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
