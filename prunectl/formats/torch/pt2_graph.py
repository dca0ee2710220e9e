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
    module = as_dict(graph.get("graph_module"))
    names = argument_names(as_dict(module.get("signature")).get("input_specs"))
    found: dict[str, str] = {}
    for node in as_list(as_dict(module.get("graph")).get("nodes")):
        target = as_dict(node).get("target")
        if not isinstance(target, str):
            continue
        for used in as_list(as_dict(node).get("inputs")):
            argument = as_dict(as_dict(as_dict(used).get("arg")).get("as_tensor")).get("name")
            if isinstance(argument, str) and argument in names:
                found.setdefault(names[argument], operation(target))
    return found


def operation(target: str) -> str:
    """Return `linear` for `torch.ops.aten.linear.default`."""
    parts = target.split(".")
    return shown(parts[3] if len(parts) > 3 and parts[1] == "ops" else parts[-1])


def argument_names(specs: Any) -> dict[str, str]:
    """Return the weights by the names that the graph gives them."""
    found: dict[str, str] = {}
    for spec in as_list(specs):
        for kind in _KINDS:
            facts = as_dict(as_dict(spec).get(kind))
            name = facts.get(f"{kind}_name")
            argument = as_dict(facts.get("arg")).get("name")
            if isinstance(name, str) and isinstance(argument, str):
                found[argument] = name
    return found


def parameters(graph: dict[str, Any]) -> frozenset[str]:
    """Return the weights that are trained; buffers and constants are not."""
    specs = as_list(as_dict(as_dict(graph.get("graph_module")).get("signature")).get("input_specs"))
    names = (as_dict(as_dict(spec).get("parameter")).get("parameter_name") for spec in specs)
    return frozenset(name for name in names if isinstance(name, str))


def as_dict(value: Any) -> dict[str, Any]:
    """Return what should be an object, empty if it is none."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return what should be a list, empty if it is none."""
    return value if isinstance(value, list) else []
