"""The table of keys as JSON Schema, for editors that complete and check while one types."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from prunectl.gating.keys import BUDGET, DROP, LAYER, LEVELS, TOP, Key, Kind

FILE = "budgets.schema.json"
_SIZE = r"^\d+(\.\d+)?\s*([kKmMgGtT]?i?[bB]?)$"
_RATIO = r"^(\d+(\.\d+)?|\.\d+)\s*%?$"
_TYPES: dict[Kind, Any] = {
    Kind.TEXT: {"type": "string", "minLength": 1},
    Kind.PATHS: {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        ]
    },
    Kind.SIZE: {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": _SIZE}]},
    Kind.COUNT: {
        "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?\s*[kKmMgGtT]?$"}]
    },
    Kind.RATIO: {
        "anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "string", "pattern": _RATIO}],
    },
    Kind.GROWTH: {
        "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": f"{_SIZE}|{_RATIO}"}],
    },
    Kind.DROP: {
        "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^(\d+(\.\d+)?|\.\d+)\s*(pp)?$"}],
    },
    Kind.PATTERN: {"type": "string", "pattern": r"^[1-9]\d*:[1-9]\d*$"},
}


def schema() -> dict[str, Any]:
    """Return the schema of `prunectl.toml`, and of `[tool.prunectl]`."""
    whole = _table(TOP, {"budget": _table(BUDGET, {"layer": _table(LAYER, {}), "max-drop": _table(DROP, {})})})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Budgets of prunectl", **whole}


def shipped() -> dict[str, Any]:
    """Return the schema that is installed with the package."""
    found: dict[str, Any] = json.loads((resources.files("prunectl.gating") / FILE).read_text(encoding="utf-8"))
    return found


def as_text() -> str:
    """Return what the file that ships holds."""
    return json.dumps(schema(), indent=2) + "\n"


def _table(keys: tuple[Key, ...], inner: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [key.name for key in keys if key.is_required],
        "properties": {key.name: {"description": key.line, **_type(key, inner)} for key in keys},
    }


def _type(key: Key, inner: dict[str, Any]) -> dict[str, Any]:
    if key.kind is Kind.TABLES:
        return {"type": "array", "items": inner[key.name]}
    if key.kind is Kind.TABLE:
        table: dict[str, Any] = inner[key.name]
        return table
    if key.kind is Kind.CHOICE:
        return {"enum": list(key.choices)}
    plain: dict[str, Any] = _TYPES[key.kind]
    if not key.is_limit:
        return plain
    levels = {
        "type": "object",
        "additionalProperties": False,
        "minProperties": 1,
        "properties": dict.fromkeys(LEVELS, plain),
    }
    return {"anyOf": [*plain["anyOf"], levels]}
