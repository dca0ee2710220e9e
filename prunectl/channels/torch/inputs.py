"""Examples of what goes into a module, from the shapes that were typed."""

from __future__ import annotations

import torch

from prunectl.errors import UsageError
from prunectl.training.torch.signature import inputs_of

_TYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "u8": torch.uint8,
    "bool": torch.bool,
}
_LENGTH = 224


def examples(words: tuple[str, ...], module: torch.nn.Module, path: str) -> tuple[torch.Tensor, ...]:
    """Return an example for each shape, such as `1,3,224,224` or `1,128:i64`."""
    if not words:
        raise UsageError(
            f"{path} does not say what goes into it, and it has to be run to be followed",
            hint=f"say a shape with a batch of 1: --input {_suggestion(module)}",
        )
    taken = inputs_of(module) if len(words) == 1 else ()
    default = torch.int64 if taken and taken[0].dtype == "int64" else _float(module)
    return tuple(_example(word, default) for word in words)


def random_like(example: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return random numbers in place of an example: normal ones, or whole ones small enough for any table of words."""
    if example.is_floating_point():
        return torch.randn(example.shape, generator=random, dtype=torch.float32).to(example.dtype)
    return torch.randint(0, 2, example.shape, generator=random).to(example.dtype)


def with_batch(example: torch.Tensor, size: int) -> torch.Tensor:
    """Return an example for so many at a time."""
    return torch.zeros((size, *example.shape[1:]), dtype=example.dtype) if example.ndim else example


def _example(word: str, default: torch.dtype) -> torch.Tensor:
    lengths, _, kind = word.partition(":")
    numbers = lengths.replace("x", ",").split(",")
    if kind and kind not in _TYPES:
        raise UsageError(f"{kind!r} is no type of number in --input {word}", hint=f"known: {', '.join(_TYPES)}")
    if not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise UsageError(f"--input {word} is no shape", hint="such as --input 1,3,224,224 or 1,128:i64")
    return torch.zeros([int(number) for number in numbers], dtype=_TYPES[kind] if kind else default)


def _float(module: torch.nn.Module) -> torch.dtype:
    first = next((weight for weight in module.parameters() if weight.is_floating_point()), None)
    return torch.float64 if first is not None and first.dtype is torch.float64 else torch.float32


def _suggestion(module: torch.nn.Module) -> str:
    ports = inputs_of(module)
    shape = ports[0].shape if len(ports) == 1 else None
    if shape is None:
        return "1,128:i64" if ports[0].dtype == "int64" else f"1,3,{_LENGTH},{_LENGTH}"
    return ",".join(map(str, (1, *(length or _LENGTH for length in shape))))
