"""Packages of an extra: which are installed, and the command that installs the others in the same environment."""

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
_ALL_EXTRAS = "all"
_IMPORTED_AS = {"pil": "pillow"}
"""Distributions whose modules have another name."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package that prunectl or one of its extras requires."""

    name: str
    extra: str
    """The extra that requires it; empty for the core."""
    requirement: str
    """The version bounds: `>=1.17`."""
    version: str
    """The installed version; empty if the package is not installed."""

    @property
    def is_ready(self) -> bool:
        """Whether it is installed, in a version within the bounds."""
        if not self.version:
            return False
        version = _numbers(self.version)
        return all(
            version >= _numbers(bound) if operator == ">=" else version < _numbers(bound)
            for operator, bound in _BOUND.findall(self.requirement)
        )

    @property
    def to_install(self) -> str:
        """The requirement for pip: a bare name, or with its bounds where another version is installed."""
        return f"{self.name}{self.requirement}" if self.version else self.name


def required() -> Iterator[Package]:
    """The requirements of the installed prunectl and its extras; PackageNotFoundError if it is not installed."""
    for line in metadata.requires("prunectl") or []:
        match = _REQUIREMENT.match(line)
        if match and match[3] != _ALL_EXTRAS:
            yield Package(match[1], match[3] or "", match[2].strip(), _version(match[1]))


def command_for(module: str, extra: str) -> str:
    """The command that installs a missing module, and all other packages of its extra that are missing."""
    try:
        missing = [package for package in required() if package.extra == extra and not package.is_ready]
    except metadata.PackageNotFoundError:  # without an installation, the extras are unknown
        missing = []
    name = module.partition(".")[0].lower().replace("_", "-")
    return install_command(missing) if missing else _command([_IMPORTED_AS.get(name, name)])


def install_command(missing: Iterable[Package]) -> str:
    """The command that installs packages into the current environment."""
    return _command([package.to_install for package in missing])


def _command(requirements: list[str]) -> str:
    return shlex.join([*_installer(), *requirements])


def _installer() -> list[str]:
    """The installer for the environment of this Python; a plain `pip` may not reach those of pipx and uv."""
    python, prefix = Path(sys.executable), Path(sys.prefix)
    if prefix.parent.name == "venvs" and "pipx" in prefix.parts:
        return ["pipx", "inject", prefix.name]
    shown = os.path.relpath(python) if python.is_relative_to(Path.cwd()) else str(python)
    # By its metadata: looking for the module would make setuptools warn that it replaces distutils.
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
