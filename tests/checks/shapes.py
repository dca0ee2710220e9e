"""Holds JSON against the part of JSON Schema that the schemas of these tests need."""

from __future__ import annotations

import re
from typing import Any

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
}  # fmt: skip


def slips(value: Any, schema: dict[str, Any], place: str = "$") -> list[str]:
    """Return where a value is not what its schema says."""
    unknown = set(schema) - {
        "type", "enum", "const", "pattern", "minLength", "minimum", "maximum", "properties", "required", "items",
        "additionalProperties", "minProperties", "minItems", "uniqueItems", "anyOf", "description", "$schema", "title",
    }  # fmt: skip
    assert not unknown, unknown
    if "anyOf" in schema:
        tries = [slips(value, choice, place) for choice in schema["anyOf"]]
        return [] if [] in tries else min(tries, key=len)
    found = [f"{place}: not {schema['const']!r}"] if "const" in schema and value != schema["const"] else []
    found += [f"{place}: not of {schema['enum']}"] if "enum" in schema and value not in schema["enum"] else []
    kind = schema.get("type")
    if kind and (not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return [*found, f"{place}: not a {kind}"]
    if isinstance(value, str):
        found += [] if re.search(schema.get("pattern", ""), value) else [f"{place}: not like {schema['pattern']}"]
        found += [f"{place}: too short"] if len(value) < schema.get("minLength", 0) else []
    if isinstance(value, int | float) and not isinstance(value, bool):
        found += [f"{place}: too small"] if value < schema.get("minimum", value) else []
        found += [f"{place}: too big"] if value > schema.get("maximum", value) else []
    if isinstance(value, dict):
        found += _of_object(value, schema, place)
    if isinstance(value, list):
        found += [f"{place}: too few"] if len(value) < schema.get("minItems", 0) else []
        found += [f"{place}: twice the same"] if schema.get("uniqueItems") and any(
            one == other for at, one in enumerate(value) for other in value[:at]
        ) else []  # fmt: skip
        for at, item in enumerate(value):
            found += slips(item, schema.get("items", {}), f"{place}[{at}]")
    return found


def _of_object(value: dict[str, Any], schema: dict[str, Any], place: str) -> list[str]:
    known = schema.get("properties", {})
    found = [f"{place}: no {name}" for name in schema.get("required", []) if name not in value]
    found += [f"{place}: too few keys"] if len(value) < schema.get("minProperties", 0) else []
    for name, inner in value.items():
        if name in known:
            found += slips(inner, known[name], f"{place}.{name}")
        elif schema.get("additionalProperties") is False:
            found.append(f"{place}: what is {name}?")
        elif isinstance(schema.get("additionalProperties"), dict):
            found += slips(inner, schema["additionalProperties"], f"{place}.{name}")
    return found
