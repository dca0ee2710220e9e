"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prunectl.formats import sandbox
from prunectl.formats.sandbox import SandboxPolicy

TRUSTED = frozenset({"calibrating", "channels", "exporting", "gates", "golden", "measuring", "prune", "training"})
"""Folders of tests whose files are sound: what is asked of them is not how files are read."""
TRUSTED_FILES = frozenset({"test_packing.py", "test_strip_keras.py", "test_strip_saved_model.py", "test_inspect.py"})


@pytest.fixture(autouse=True)
def _policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Read files in a sandbox, as users' files are read, or here, which is faster."""
    folder, *_ = request.path.relative_to(Path(__file__).parent).parts
    is_trusted = folder in TRUSTED or request.path.name in TRUSTED_FILES
    with monkeypatch.context() as patched:
        patched.setattr(sandbox, "policy", SandboxPolicy.HERE if is_trusted else SandboxPolicy.SANDBOX)
        yield
