"""Small models of Keras in files that tests only read."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.training.keras import nets


@pytest.fixture(scope="session")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> nets.Files:
    """The file of a model, built and saved once: that takes as long as a step of it."""

    @cache
    def saved(k: Any, make: Any) -> Path:
        return nets.saved(make(k()), tmp_path_factory.mktemp("model") / "model.keras")

    return saved
