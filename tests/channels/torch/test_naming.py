"""What the class beside weights is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunectl.pruning.destination import code_beside


@pytest.mark.parametrize(
    ("weights", "code"),
    [
        ("small.pt", "small.py"),
        ("my-net.v2.pt", "my_net_v2.py"),
        ("best.pth.tar", "best.py"),
        (".hidden.pt", "hidden.py"),
        ("8bit.safetensors", "net_8bit.py"),
        ("torch.pt", "net_torch.py"),
        ("json.pt", "net_json.py"),
        ("class.pt", "net_class.py"),
        ("größe.pt", "größe.py"),
        ("-.pt", "_.py"),
    ],
)
def test_a_file_can_be_imported_and_hides_no_other(weights: str, code: str) -> None:
    assert code_beside(Path("folder") / weights) == Path("folder") / code
