"""How good is a file that a point came to, and how big?"""

from __future__ import annotations

import math
from pathlib import Path

from prunectl.formats.table import open_model
from prunectl.measuring.codecs import CodecName, pick
from prunectl.measuring.sizes import measure
from prunectl.sweeping.made import digest
from prunectl.sweeping.point import Outcome
from prunectl.training.judging.judge import judge, judge_whole
from prunectl.training.request import Request


def weighed(path: Path, request: Request, name: str) -> Outcome:
    """Return what a file is worth, as it is noted under a name; one without is the model as it is."""
    survey = measure(open_model(path), pick(CodecName.GZIP, None))
    judged = judge(path, request) if name else judge_whole(path, request)
    assert survey.bytes.compressed is not None
    logs = {key: value for key, value in judged.logs.items() if math.isfinite(value)}
    sparsity = survey.sparsity or 0.0
    return Outcome(
        metric=judged.metric,
        value=judged.value if judged.is_finite else math.nan,
        logs=logs,
        sparsity=sparsity,
        raw=survey.bytes.raw,
        gzip=survey.bytes.compressed,
        path=name,
        notes=judged.notes,
        is_up=judged.is_up,
        digest=digest(path),
    )
