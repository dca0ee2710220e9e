"""Why is the file not smaller? Sentences drawn from a survey."""

from __future__ import annotations

from prunectl.measuring.survey import Survey

_MANY_ZEROS = 0.3
_WORTH_A_WORD = 0.01


def advise(found: Survey) -> tuple[str, ...]:
    """Return what makes the file bigger than it must be."""
    shares = {part.name: part.bytes / found.bytes.raw for part in found.parts if found.bytes.raw}
    sentences = list(found.about.notes)
    zeros = found.prunable_sparsity
    if zeros is not None and zeros >= _MANY_ZEROS and not found.about.is_compressed:
        sentences.append(
            f"{zeros:.0%} of the prunable weights are zero, yet the file is as big as before: in this container a zero "
            "takes as many bytes as any number. It pays once the file is compressed, as `prunectl size` shows."
        )
    if shares.get("masks", 0) > _WORTH_A_WORD:
        sentences.append(f"Pruning wrappers are still in the file: their masks take {shares['masks']:.0%} of it.")
    if shares.get("optimizer", 0) > _WORTH_A_WORD:
        sentences.append(
            f"The optimizer's state takes {shares['optimizer']:.0%} of the file; predictions do not need it."
        )
    return tuple(sentences)
