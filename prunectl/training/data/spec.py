"""Every kind of data at once: how a SPEC is recognised, what opens it, which options are its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prunectl.errors import UsageError
from prunectl.training.data import (
    code,
    columns,
    csv_table,
    filters,
    grammar,
    images,
    made_up,
    npy,
    npz,
    parquet,
    records,
)
from prunectl.training.data.grammar import Spec
from prunectl.training.data.source import Source
from prunectl.training.signature import Signature


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of data."""

    fits: Callable[[str], bool]
    """Whether what stands before the question mark names it."""
    opener: Callable[[Spec, Signature | None, int], Source]
    """Given the SPEC, the model's signature and the seed."""
    options: tuple[str, ...] = ()


KINDS = (
    Kind(made_up.fits, made_up.open_random),
    Kind(npz.fits, lambda spec, _, __: npz.open_npz(spec)),
    Kind(npy.fits, lambda spec, _, __: npy.open_npy(spec)),
    Kind(csv_table.fits, lambda spec, _, __: csv_table.open_csv(spec), columns.OPTIONS),
    Kind(parquet.fits, lambda spec, _, __: parquet.open_parquet(spec), columns.OPTIONS),
    Kind(records.fits, lambda spec, _, __: records.open_records(spec), records.OPTIONS),
    Kind(code.fits, lambda spec, signature, _: code.open_code(spec, signature)),
    Kind(images.fits, lambda spec, signature, _: images.open_images(spec, signature), images.OPTIONS),
)


def open_source(spec: str, *, signature: Signature | None, seed: int) -> Source:
    """Return the examples that a SPEC means, as the file has them but for what its options say."""
    parsed = grammar.parse(spec)
    for kind in KINDS:
        if kind.fits(parsed.where):
            grammar.check_options(parsed, kind.options)
            return filters.apply(kind.opener(parsed, signature, seed), parsed, signature)
    raise _unknown(parsed)


def _unknown(spec: Spec) -> UsageError:
    grammar.existing(spec.path)
    return UsageError(f"{spec.text} is no data that prunectl knows", hint=grammar.GRAMMAR)
