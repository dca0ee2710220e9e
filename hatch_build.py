"""Puts a software bill of materials into the wheel: `.dist-info/sboms/prunectl.cdx.json`, as PEP 770 has it."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NAME = "prunectl.cdx.json"


class BillOfMaterials(BuildHookInterface[Any]):
    """Writes what pyproject.toml asks for as CycloneDX, the same bytes at every build."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Hand the bill to the builder; an editable install has none, since its code may change."""
        if version == "editable":
            return
        self.folder = Path(tempfile.mkdtemp(prefix="sbom-"))
        path = self.folder / NAME
        path.write_text(json.dumps(self._bill(), indent=2) + "\n", encoding="utf-8")
        build_data["sbom_files"].append(str(path))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove the scratch file."""
        if version != "editable":
            shutil.rmtree(self.folder)

    def _bill(self) -> dict[str, Any]:
        core = self.metadata.core
        this = f"pkg:pypi/{core.name}@{self.metadata.version}"
        components = [_component(Requirement(line)) for line in core.dependencies]
        needed = [component["bom-ref"] for component in components]
        return {
            "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, this)}",
            "version": 1,
            "metadata": {
                "lifecycles": [{"phase": "build"}],
                "component": {
                    "type": "application",
                    "bom-ref": this,
                    "name": core.name,
                    "version": self.metadata.version,
                    "description": core.description,
                    "licenses": [{"expression": core.license_expression or core.license}],
                    "purl": this,
                },
            },
            "components": components,
            "dependencies": [{"ref": this, "dependsOn": needed}, *({"ref": one} for one in needed)],
        }


def _component(asked: Requirement) -> dict[str, Any]:
    """A run-time dependency. Which version of it is installed is up to the user, so that it names the range alone."""
    purl = f"pkg:pypi/{canonicalize_name(asked.name)}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": asked.name,
        "scope": "required",
        "purl": purl,
        "properties": [{"name": "prunectl:requirement", "value": str(asked)}],
    }
