"""Every format that can be written, and which options each of them has."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from prunectl.errors import UsageError

_RUN = frozenset({"input", "data", "samples", "batch-size", "seed", "atol", "rtol", "model", "custom-objects", "trust"})
"""Options of what is run beside its source."""


@dataclass(frozen=True, slots=True)
class Target:
    """A format to write."""

    name: str
    title: str
    suffix: str
    options: frozenset[str]
    is_weights: bool = False
    """Whether it holds numbers alone, which are compared bit by bit."""


TARGETS = (
    Target("onnx", "ONNX", ".onnx", _RUN | {"opset", "half", "bf16", "int8", "sparse", "pack", "metadata"}),
    Target("tflite", "TensorFlow Lite", ".tflite", _RUN | {"half", "int8", "sparse"}),
    Target("saved-model", "TensorFlow SavedModel", "", _RUN),
    Target("keras", "Keras archive", ".keras", _RUN | {"pack"}),
    Target("h5", "Keras HDF5", ".h5", _RUN | {"pack"}),
    Target("torch", "PyTorch state dict", ".pt", frozenset({"half", "bf16", "pack", "code"}), is_weights=True),
    Target("torchscript", "TorchScript", ".torchscript", _RUN | {"int8", "pack"}),
    Target("torch-export", "PyTorch exported program", ".pt2", _RUN | {"pack"}),
    Target(
        "safetensors", "safetensors", ".safetensors", frozenset({"half", "bf16", "metadata", "code"}), is_weights=True
    ),
    Target("npz", "NumPy archive", ".npz", frozenset({"half", "pack"}), is_weights=True),
)
_ALSO = {".pth": "torch", ".hdf5": "h5", ".keras": "keras"}


def target_of(to: str, output: Path) -> Target:
    """Return the format that was asked for by its name, or by the suffix of the output."""
    known = {target.name: target for target in TARGETS}
    if to:
        if to not in known:
            raise UsageError(
                f"--to {to} is no format that prunectl writes",
                did_you_mean=tuple(get_close_matches(to, known, n=2)),
                hint=f"known: {', '.join(known)}",
            )
        return known[to]
    suffix = output.suffix.lower()
    for target in TARGETS:
        if target.suffix == suffix:
            return target
    if suffix in _ALSO:
        return known[_ALSO[suffix]]
    raise UsageError(
        f"{output} has no suffix that names a format",
        hint=f"say it: --to {', '.join(known)}",
    )


def check_options(target: Target, typed: tuple[str, ...]) -> None:
    """Refuse an option that the target does not have."""
    # Code is run beside its source, and so it has the options of all that runs.
    allowed = target.options | (_RUN if "code" in typed else frozenset())
    for name in typed:
        if name not in allowed:
            others = [other.name for other in TARGETS if name in other.options]
            why = "has no such thing"
            if target.is_weights and name in _RUN:
                why = "holds weights alone, and nothing is run" + (" without --code" * ("code" in target.options))
            raise UsageError(
                f"--{name} does not go with {target.title}, which {why}", hint=f"it goes with {', '.join(others)}"
            )


def suffix_of(to: str) -> str:
    """Return the suffix of a format, empty if there is no such format."""
    return next((target.suffix for target in TARGETS if target.name == to), "")
