"""What `doctor` says: what works, what does not, and what to type."""

from __future__ import annotations

import platform
from typing import Any

from prunectl import __version__
from prunectl.formats.base import Can
from prunectl.formats.table import FORMATS
from prunectl.gating.installed import Extra, libraries
from prunectl.reporting.report import Report, Section
from prunectl.reporting.table import Column, Table

_EXTRAS = (Column("extra"), Column("works"), Column("packages"), Column("brings"), Column("to install"))
_FORMATS = (Column("format"), Column("suffixes"), Column("strip"), Column("pack"), Column("FLOPs"))


def doctor_report(extras: tuple[Extra, ...]) -> Report:
    """Return the report on what is installed."""
    table = Table("extras", _EXTRAS, tuple(map(_row, extras)))
    formats = Table("formats", _FORMATS, tuple(_format(row.title, row.suffixes, row.can) for row in FORMATS))
    facts = (
        ("prunectl", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *libraries(),
    )
    missing = (*(f"For {extra.brings}: {extra.remedy}" for extra in extras if extra.remedy), *_weaknesses())
    return Report(
        models=(),
        main=table,
        sections=(Section("What is installed", facts, (table,), missing), Section("Formats", (), (formats,))),
        bare=tuple(extra.remedy for extra in extras if extra.remedy),
        more={"python": platform.python_version(), "extras": [_json(extra) for extra in extras]},
    )


def _weaknesses() -> tuple[str, ...]:
    """Say what protects less than on Linux."""
    system = platform.system()
    if system == "Linux":
        return ()
    said = f"On {system} the child that reads HDF5 has no limit on its memory, only on its time"
    return (f"{said}: read files of strangers on Linux, or in a container.",)


def _row(extra: Extra) -> tuple[str, ...]:
    packages = ", ".join(f"{one.name} {one.version or 'missing'}" for one in extra.packages)
    return (extra.name or "(core)", "yes" if extra.is_ready else "no", packages, extra.brings, extra.remedy)


def _format(title: str, suffixes: tuple[str, ...], can: Can) -> tuple[str, ...]:
    offers = ("yes" if flag & can else "" for flag in (Can.STRIP, Can.PACK, Can.FLOPS))
    return (title, " ".join(filter(None, suffixes)) or "folder", *offers)


def _json(extra: Extra) -> dict[str, Any]:
    packages = [
        {"name": one.name, "wanted": one.wanted, "version": one.version or None, "is_ready": one.is_ready}
        for one in extra.packages
    ]
    return {"name": extra.name or None, "is_ready": extra.is_ready, "remedy": extra.remedy, "packages": packages}
