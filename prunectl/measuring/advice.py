"""Why is the file not smaller? Sentences drawn from a survey."""

from __future__ import annotations

from prunectl.errors import abbreviated
from prunectl.formats.base import PRUNABLE, QUANTISED, Can
from prunectl.formats.state_dict import averaged_copies
from prunectl.formats.table import by_name
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
            f"{_percent(zeros)} of the prunable weights are zero, yet the file is as big as before: in this container "
            f"a zero takes as many bytes as any number. {_remedy(found)}"
        )
    if shares.get("masks", 0) > _WORTH_A_WORD:
        sentences.append(
            f"Pruning wrappers are still in the file: their masks take {_percent(shares['masks'])} of it. "
            "`prunectl strip` takes them out."
        )
    if shares.get("optimizer", 0) > _WORTH_A_WORD:
        sentences.append(
            f"The optimizer's state takes {_percent(shares['optimizer'])} of the file; predictions do not need it. "
            "`prunectl strip` takes it out."
        )
    if shares.get("example inputs", 0) > _WORTH_A_WORD:
        sentences.append(
            f"The inputs that it was exported with take {_percent(shares['example inputs'])} of the file; predictions "
            "do not need them. `prunectl strip` takes them out."
        )
    return (*sentences, *quantised(found), *about_copies(found))


def about_copies(found: Survey) -> tuple[str, ...]:
    """Say it where a file holds its weights twice: as they were trained, and averaged (EMA, SWA)."""
    copies = averaged_copies(found.layers)
    if copies is None:
        return ()
    trained, average, count = copies
    places = f"{abbreviated(trained) or 'at the top'} and {abbreviated(average)}"
    said = f"The weights are in the file twice: {places}, an average of them ({count} tensors). "
    return (said + "Both are pruned, each by its own numbers; the code that loads the file chooses one.",)


def quantised(found: Survey) -> list[str]:
    """Say what `prune` will not do, although the zeros of these kernels are counted."""
    dtypes = sorted({row.dtype for row in found.layers if row.role in PRUNABLE and row.dtype in QUANTISED})
    if not dtypes:
        return []
    return [f"Its kernels are quantised to {' and '.join(dtypes)}, which `prunectl prune` refuses: prune before that."]


def _percent(share: float) -> str:
    """Return a share in whole percents, which are a hundred only when it is everything."""
    return f"{share:.0%}" if share == 1 else f"{min(round(share * 100), 99)}%"


def _remedy(found: Survey) -> str:
    """Return the command that turns zeros into a smaller file."""
    if Can.PACK & by_name(found.format).can:
        return "`prunectl strip --pack` compresses it inside its container, so that it still loads as it is."
    return "It pays once the file is compressed, as `prunectl size` shows."
