"""`prunectl doctor`: what works here?"""

from __future__ import annotations

import platform
import zlib
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import typer

from prunectl import __version__
from prunectl.commands._command import make_command
from prunectl.errors import InputError
from prunectl.formats.base import Capability
from prunectl.formats.packages import Package, install_command, required
from prunectl.formats.registry import FORMATS
from prunectl.reporting.report import Column, Report, Section, Table
from prunectl.reporting.reporter import Reporter

EXTRAS = {
    "": "inspect, size, check, diff, verify, strip and prune for every format",
    "tensorflow": "finetune, export, prune --data and --wrap for Keras and TensorFlow",
    "torch": "finetune, export and prune --data for PyTorch",
    "onnx": "prune --data and --pattern channel for ONNX; export from ONNX",
    "export": "export to ONNX",
    "zstd": "size --codec zstd",
    "images": "--data from folders of images",
    "parquet": "--data from Parquet files",
    "ray": "sweep --on ray, prune --on ray",
    "transformers": "eval and prune --data for folders of Hugging Face models, with text",
    "remote": "hf://, s3://, gs:// and az:// URLs, with huggingface_hub, s3fs, gcsfs or adlfs",
}
"""What each extra is for; none is the core."""


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
        return "" if self.is_ready else install_command(one for one in self.packages if not one.is_ready)


def extras() -> tuple[Extra, ...]:
    """The core, then every extra."""
    try:
        packages = list(required())
    except metadata.PackageNotFoundError as error:
        raise InputError(
            "prunectl is not installed as a package: it runs from its source folder",
            hint="install it from there: pip install -e .",
        ) from error
    return tuple(
        Extra(name, summary, tuple(package for package in packages if package.extra == name))
        for name, summary in EXTRAS.items()
    )


def libraries() -> tuple[tuple[str, str], ...]:
    """Libraries that decide results to the byte."""
    return (("zlib", zlib.ZLIB_RUNTIME_VERSION),)


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
