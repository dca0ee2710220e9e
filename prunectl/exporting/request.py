"""What the user asks of `export`, in the words of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from prunectl.exporting.said import Said
from prunectl.training.network import Origin

BATCH_SIZE = 32
SAMPLES = 256


@dataclass(frozen=True, slots=True)
class Request:
    """Every choice of a run; what is None or empty was not said."""

    to: str = ""
    opset: int | None = None
    inputs: tuple[Said, ...] = ()
    data: str = ""
    samples: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    atol: float | None = None
    rtol: float | None = None
    origin: Origin = field(default_factory=Origin)
    is_half: bool = False
    is_bf16: bool = False
    is_int8: bool = False
    is_sparse: bool = False
    is_packed: bool = False
    has_code: bool = False
    metadata: tuple[tuple[str, str], ...] = ()
    card: Path | None = None

    @property
    def typed(self) -> tuple[str, ...]:
        """The options that were said, of those which do not fit everywhere."""
        origin = self.origin
        said = {
            "opset": self.opset is not None,
            "input": bool(self.inputs),
            "data": bool(self.data),
            "samples": self.samples is not None,
            "batch-size": self.batch_size is not None,
            "seed": self.seed is not None,
            "atol": self.atol is not None,
            "rtol": self.rtol is not None,
            "model": bool(origin.model),
            "custom-objects": bool(origin.custom_objects),
            "trust": origin.is_trusted,
            "half": self.is_half,
            "bf16": self.is_bf16,
            "int8": self.is_int8,
            "sparse": self.is_sparse,
            "pack": self.is_packed,
            "code": self.has_code,
            "metadata": bool(self.metadata),
        }
        return tuple(name for name, is_said in said.items() if is_said)
