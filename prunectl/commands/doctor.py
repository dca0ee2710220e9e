"""`prunectl doctor`: what works here?"""

from __future__ import annotations

import platform
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import typer

from prunectl import __version__
from prunectl.commands._command import make_command
from prunectl.errors import InputError
from prunectl.formats.base import Capability
from prunectl.formats.registry import FORMATS
from prunectl.reporting.report import Column, Report, Section, Table
from prunectl.reporting.reporter import Reporter

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([^;]*)(?:;.*extra\s*==\s*['\"]([^'\"]+)['\"])?")
_BOUND = re.compile(r"(>=|<)\s*([0-9.]+)")
_EVERYTHING = "all"

EXTRAS = {
    "": "inspect, size, check, diff, verify, strip and prune for every format",
    "tensorflow": "finetune, export, prune --data and --wrap for Keras and TensorFlow",
    "torch": "finetune, export and prune --data for PyTorch",
    "onnx": "prune --data and --pattern channel for ONNX; export from ONNX",
    "export": "export to ONNX",
    "zstd": "size --codec zstd; models compressed with zstd",
    "images": "--data from folders of images",
    "parquet": "--data from Parquet files",
    "ray": "sweep --on ray",
}
"""What each extra is for; none is the core."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package that something needs."""

    name: str
    extra: str
    requirement: str
    """As the requirement says it: `>=1.17`."""
    version: str
    """What is installed; empty if it is not."""

    @property
    def is_ready(self) -> bool:
        """Whether it is there, and new enough."""
        if not self.version:
            return False
        version = _numbers(self.version)
        return all(
            version >= _numbers(bound) if operator == ">=" else version < _numbers(bound)
            for operator, bound in _BOUND.findall(self.requirement)
        )


@dataclass(frozen=True, slots=True)
class Extra:
    """What comes with an extra, and whether it works."""

    name: str
    summary: str
    packages: tuple[Package, ...]

    @property
    def is_ready(self) -> bool:
        """Whether all of its packages are."""
        return all(package.is_ready for package in self.packages)

    @property
    def install_command(self) -> str:
        """What to type, where it is not."""
        if self.is_ready:
            return ""
        return f"pip install 'prunectl[{self.name}]'" if self.name else "pip install --force-reinstall prunectl"


def extras() -> tuple[Extra, ...]:
    """The core, then every extra."""
    packages = list(_packages())
    return tuple(
        Extra(name, summary, tuple(package for package in packages if package.extra == name))
        for name, summary in EXTRAS.items()
    )


def libraries() -> tuple[tuple[str, str], ...]:
    """Libraries that decide results to the byte."""
    return (("zlib", zlib.ZLIB_RUNTIME_VERSION),)


def _packages() -> Iterator[Package]:
    try:
        lines = metadata.requires("prunectl") or []
    except metadata.PackageNotFoundError as error:
        raise InputError(
            "prunectl is not installed as a package: it runs from its source folder",
            hint="install it from there: pip install -e .",
        ) from error
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


_EXTRAS = (
    Column("extra"),
    Column("works", title="available"),
    Column("packages"),
    Column("brings", title="for"),
    Column("to install", title="install with"),
)
_FORMATS = (Column("format"), Column("suffixes"), Column("strip"), Column("pack"), Column("FLOPs"))


def doctor_report(extras: tuple[Extra, ...]) -> Report:
    """The report on what is installed."""
    table = Table("extras", _EXTRAS, tuple(map(_row, extras)))
    formats = Table("formats", _FORMATS, tuple(_format(row.title, row.suffixes, row.can) for row in FORMATS))
    facts = (
        ("prunectl", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *libraries(),
    )
    missing = (
        *(f"For {extra.summary}: {extra.install_command}" for extra in extras if extra.install_command),
        *_weaknesses(),
    )
    return Report(
        models=(),
        table=table,
        sections=(Section("What is installed", facts, (table,), missing), Section("Formats", (), (formats,))),
        quiet_lines=tuple(extra.install_command for extra in extras if extra.install_command),
        extra_json={"python": platform.python_version(), "extras": [_json(extra) for extra in extras]},
    )


def _weaknesses() -> tuple[str, ...]:
    """Say what protects less than on Linux."""
    system = platform.system()
    if system == "Linux":
        return ()
    sentence = f"On {system} the process that reads HDF5 is limited in time, but not in memory"
    return (f"{sentence}: read untrusted files on Linux, or in a container.",)


def _row(extra: Extra) -> tuple[str, ...]:
    packages = ", ".join(f"{package.name} {package.version or 'missing'}" for package in extra.packages)
    return (extra.name or "(core)", "yes" if extra.is_ready else "no", packages, extra.summary, extra.install_command)


def _format(title: str, suffixes: tuple[str, ...], can: Capability) -> tuple[str, ...]:
    offers = ("yes" if flag & can else "" for flag in (Capability.STRIP, Capability.PACK, Capability.FLOPS))
    return (title, " ".join(filter(None, suffixes)) or "folder", *offers)


def _json(extra: Extra) -> dict[str, Any]:
    packages = [
        {
            "name": package.name,
            "wanted": package.requirement,
            "version": package.version or None,
            "is_ready": package.is_ready,
        }
        for package in extra.packages
    ]
    return {
        "name": extra.name or None,
        "is_ready": extra.is_ready,
        "remedy": extra.install_command,
        "packages": packages,
    }


def doctor(ctx: typer.Context) -> int:
    """Show installed versions, which commands and formats work, and what to install for the rest.

    Reads package versions only; imports none of them.

    [dim]$[/] prunectl doctor

    [dim]$[/] prunectl doctor --json
    """
    reporter: Reporter = ctx.obj
    return reporter.show(doctor_report(extras()))


command = make_command(doctor)
