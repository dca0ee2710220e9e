"""Sizes in an exported program: whole numbers, and expressions in which the batch counts as 1."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from typing import Any

from prunectl.formats.lengths import MAX_LENGTH, Length, Shape

MAX_AXES = 64
_MAX_CHARACTERS = 256


def shape(sizes: Any, ones: frozenset[str]) -> Shape | None:
    """Return the sizes of a tensor; the symbols in ``ones`` count as 1."""
    if not isinstance(sizes, list) or len(sizes) > MAX_AXES:
        return None
    return tuple(_length(size, ones) for size in sizes)


def first_symbol(sizes: Any) -> str:
    """Return the symbol that stands for the first size of a tensor, if one does."""
    if not isinstance(sizes, list) or len(sizes) < 2:
        return ""
    tree = _parsed(_expression(sizes[0]))
    return _symbol(tree) if tree is not None else ""


def _length(size: Any, ones: frozenset[str]) -> Length:
    found = size.get("as_int") if isinstance(size, dict) else None
    if type(found) is not int:
        tree = _parsed(_expression(size))
        found = _value(tree, ones) if tree is not None else None
    return found if found is not None and 0 <= found <= MAX_LENGTH else None


def _expression(size: Any) -> str:
    said = size.get("as_expr") if isinstance(size, dict) else None
    text = said.get("expr_str") if isinstance(said, dict) else said
    return text if isinstance(text, str) and len(text) <= _MAX_CHARACTERS else ""


def _parsed(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _symbol(tree: ast.expr) -> str:
    """Return the name of what is nothing but a symbol."""
    if isinstance(tree, ast.Name):
        return tree.id
    if _function(tree) == "Symbol" and isinstance(tree, ast.Call) and tree.args:
        name = tree.args[0]
        return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""
    return ""


def _function(tree: ast.expr) -> str:
    return tree.func.id if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) else ""


def _value(tree: ast.expr, ones: frozenset[str]) -> int | None:
    """Return the value of an expression of whole numbers; None for what is not known or not understood."""
    if isinstance(tree, ast.Constant):
        return tree.value if type(tree.value) is int and abs(tree.value) <= MAX_LENGTH else None
    symbol = _symbol(tree)
    if symbol:
        return 1 if symbol in ones else None
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return _combined([ast.Constant(-1), tree.operand], ones, math.prod)
    if isinstance(tree, ast.BinOp):
        return _combined([tree.left, tree.right], ones, _OPERATORS.get(type(tree.op)))
    if isinstance(tree, ast.Call):
        return _combined(tree.args, ones, _FUNCTIONS.get(_function(tree)))
    return None


def _combined(
    parts: Sequence[ast.expr], ones: frozenset[str], combine: Callable[[list[int]], int | None] | None
) -> int | None:
    values = [_value(part, ones) for part in parts]
    known = [value for value in values if value is not None]
    if combine is None or not known or len(known) != len(values):
        return None
    found = combine(known)
    return found if found is not None and abs(found) <= MAX_LENGTH else None


def _divided(values: list[int]) -> int | None:
    return values[0] // values[1] if len(values) == 2 and values[1] else None


_FUNCTIONS: dict[str, Callable[[list[int]], int | None]] = {
    "Integer": sum,
    "Add": sum,
    "Mul": math.prod,
    "FloorDiv": _divided,
    "Max": max,
    "Min": min,
}
_OPERATORS: dict[type[ast.operator], Callable[[list[int]], int | None]] = {
    ast.Add: sum,
    ast.Sub: lambda values: values[0] - values[1],
    ast.Mult: math.prod,
    ast.FloorDiv: _divided,
}
