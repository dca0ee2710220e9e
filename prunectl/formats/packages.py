"""Packages that an extra brings: which of them are here, and what brings the others into the same environment."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([^;]*)(?:;.*extra\s*==\s*['\"]([^'\"]+)['\"])?")
_BOUND = re.compile(r"(>=|<)\s*([0-9.]+)")
_EVERYTHING = "all"
_IMPORTED_AS = {"pil": "pillow"}
"""Distributions whose modules have another name."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package that something needs."""

    name: str
    extra: str
    """The extra that brings it; empty for the core."""
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

    @property
    def to_install(self) -> str:
        """What pip is asked for: a bare name, or with its bound where another version is installed."""
        return f"{self.name}{self.requirement}" if self.version else self.name


def required() -> Iterator[Package]:
    """What the installed prunectl asks for, in its core and in every extra; raises where it is not installed."""
    for line in metadata.requires("prunectl") or []:
        match = _REQUIREMENT.match(line)
        if match and match[3] != _EVERYTHING:
            yield Package(match[1], match[3] or "", match[2].strip(), _version(match[1]))


def command_for(module: str, extra: str) -> str:
    """What to type for a module that cannot be imported, and for all else that its extra lacks."""
    try:
        missing = [package for package in required() if package.extra == extra and not package.is_ready]
    except metadata.PackageNotFoundError:  # from a source folder nobody knows what an extra has
        missing = []
    name = module.partition(".")[0].lower().replace("_", "-")
    return install_command(missing) if missing else _command([_IMPORTED_AS.get(name, name)])


def install_command(missing: Iterable[Package]) -> str:
    """What brings packages into the environment that this runs in."""
    return _command([package.to_install for package in missing])


def _command(requirements: list[str]) -> str:
    return shlex.join([*_installer(), *requirements])


def _installer() -> list[str]:
    """What installs where this Python looks: pipx and uv keep tools where a plain `pip` does not reach."""
    python, prefix = Path(sys.executable), Path(sys.prefix)
    if prefix.parent.name == "venvs" and "pipx" in prefix.parts:
        return ["pipx", "inject", prefix.name]
    shown = os.path.relpath(python) if python.is_relative_to(Path.cwd()) else str(python)
    # Not by looking for the module, which lets setuptools warn of what it replaces.
    if not _version("pip"):
        return ["uv", "pip", "install", "--python", shown]
    pip = shutil.which("pip")
    if pip and Path(pip).parent == python.parent:
        return ["pip", "install"]
    return [shown, "-m", "pip", "install"]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
