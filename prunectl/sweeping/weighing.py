"""How good is a file that a point came to, and how big?"""

from __future__ import annotations

import math
from pathlib import Path

from prunectl.formats.table import open_model
from prunectl.measuring.codecs import CodecName, pick
from prunectl.measuring.sizes import measure
from prunectl.sweeping.point import Outcome
from prunectl.training.judging.judge import judge
from prunectl.training.request import Request


def weighed(path: Path, request: Request, name: str) -> Outcome:
    """Return what a file is worth, as it is noted under a name."""
    survey = measure(open_model(path), pick(CodecName.GZIP, None))
    judged = judge(path, request)
    assert survey.bytes.compressed is not None
    logs = {key: value for key, value in judged.logs.items() if math.isfinite(value)}
    sparsity = survey.sparsity or 0.0
    return Outcome(
        judged.metric, judged.value, logs, sparsity, survey.bytes.raw, survey.bytes.compressed, name, judged.notes
    )
