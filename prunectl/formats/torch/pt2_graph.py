"""What the graph of an exported program says of its weights: which operation uses which."""

from __future__ import annotations

from typing import Any

from prunectl.formats.torch.values import shown

_KINDS = ("parameter", "buffer", "tensor_constant")


def producer(graph: dict[str, Any]) -> str:
    """Return the version of PyTorch that exported the graph, where it says so."""
    version = graph.get("torch_version")
    return f"pytorch {shown(version)}" if isinstance(version, str) and version else ""


def kinds(graph: dict[str, Any]) -> dict[str, str]:
    """Return the type of the first operation that uses each weight, such as `linear`."""
    module = _dict(graph.get("graph_module"))
    names = _argument_names(_dict(module.get("signature")).get("input_specs"))
    found: dict[str, str] = {}
    for node in _list(_dict(module.get("graph")).get("nodes")):
        target = _dict(node).get("target")
        if not isinstance(target, str):
            continue
        for used in _list(_dict(node).get("inputs")):
            argument = _dict(_dict(_dict(used).get("arg")).get("as_tensor")).get("name")
            if isinstance(argument, str) and argument in names:
                found.setdefault(names[argument], _operation(target))
    return found


def _operation(target: str) -> str:
    """Return `linear` for `torch.ops.aten.linear.default`."""
    parts = target.split(".")
    return shown(parts[3] if len(parts) > 3 and parts[1] == "ops" else parts[-1])


def _argument_names(specs: Any) -> dict[str, str]:
    """Return the weights by the names that the graph gives them."""
    found: dict[str, str] = {}
    for spec in _list(specs):
        for kind in _KINDS:
            facts = _dict(_dict(spec).get(kind))
            name = facts.get(f"{kind}_name")
            argument = _dict(facts.get("arg")).get("name")
            if isinstance(name, str) and isinstance(argument, str):
                found[argument] = name
    return found


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
