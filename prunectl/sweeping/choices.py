"""What decides the numbers of a sweep: noted with its points, and the same in every run that goes on with them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Choices:
    """What is tried, on which data, and how it is trained in between."""

    data: str
    val: str = ""
    val_split: float = 0.0
    strategies: tuple[str, ...] = ("magnitude",)
    scopes: tuple[str, ...] = ("layer",)
    patterns: tuple[str, ...] = ("unstructured",)
    params: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Parameters of strategies that have them, each with the values to try."""
    sparsities: tuple[float, ...] = ()
    schedules: tuple[str, ...] = ("constant",)
    epochs: int = 0
    batch_size: int = 32
    samples: int = 128
    """Examples for strategies that look at data."""
    lr: float | None = None
    optimizer: str = ""
    loss: str = ""
    metric: str = ""
    policy: str = "default"
    only: str = ""
    exclude: tuple[str, ...] = ()
    seed: int = 0
    model: str = ""
    """What builds the model, for weights alone."""
    custom_objects: str = ""
    is_trusted: bool = False

    @property
    def as_json(self) -> dict[str, Any]:
        """The choices as they are noted."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def of_json(cls, said: dict[str, Any]) -> Choices:
        """Return the choices that were noted."""
        found: dict[str, Any] = {name: _frozen(value) for name, value in said.items()}
        return cls(**found)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
