"""Labels that repeat the tokens, in files that do not say that their model predicts the next one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.networks import keras
from tests.running import here

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]

WORDS, LENGTH = 20, 8
IDS = np.random.default_rng(0).integers(0, WORDS, (40, LENGTH))


class Language(torch.nn.Module):
    def __init__(self, both_ways: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, 6)
        self.read = torch.nn.GRU(6, 5, batch_first=True, bidirectional=both_ways)
        self.answer = torch.nn.Linear(10 if both_ways else 5, WORDS)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.answer(self.read(self.embed(input_ids))[0])
        return logits


def script(module: Language, folder: Path) -> Path:
    torch.jit.script(module).save(str(folder / "m.pt"))  # type: ignore[no-untyped-call]
    return folder / "m.pt"


def program(module: Language, folder: Path) -> Path:
    rows = ({0: torch.export.Dim("rows")},)
    torch.export.save(torch.export.export(module, (torch.from_numpy(IDS),), dynamic_shapes=rows), folder / "m.pt2")
    return folder / "m.pt2"


def in_keras(folder: Path, length: int | None) -> tuple[Path, Any]:
    k = keras()
    ids = k.Input((length,), name="input_ids")
    states = k.layers.GRU(5, return_sequences=True)(k.layers.Embedding(WORDS, 6)(ids))
    model = k.Model(ids, k.layers.Dense(WORDS)(states))
    model.save(folder / "m.keras")
    return folder / "m.keras", model


def loss_of(model: Path, folder: Path, *words: str) -> float:
    np.savez(folder / "d.npz", input_ids=IDS, labels=IDS)
    done = here("eval", model, "--data", folder / "d.npz", "--batch-size", "16", "--metric", "loss", "--json", *words)
    assert done.code == 0, done.err
    return float(done.json["evaluations"][0]["value"])


@pytest.mark.parametrize("save", [script, program])
@pytest.mark.parametrize("both_ways", [False, True])
def test_pytorch_compares_them_one_place_on_unless_a_later_token_is_seen(
    save: Callable[[Language, Path], Path], both_ways: bool, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    module, ids = Language(both_ways).eval(), torch.from_numpy(IDS)
    logits = module(ids)
    in_place = cross_entropy(logits.flatten(0, 1), ids.flatten())
    one_on = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected = (in_place if both_ways else one_on).item()
    assert loss_of(save(module, tmp_path), tmp_path) == pytest.approx(expected, rel=1e-5)


def test_keras_compares_them_one_place_on(tmp_path: Path) -> None:
    path, model = in_keras(tmp_path, None)
    model.compile(loss=keras().losses.SparseCategoricalCrossentropy(from_logits=True))
    expected = model.evaluate(IDS[:, :-1], IDS[:, 1:], verbose=0)
    assert loss_of(path, tmp_path, "--loss", "cross-entropy") == pytest.approx(float(expected), rel=1e-5)


def test_keras_has_no_label_for_the_last_token_where_the_length_is_fixed(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", input_ids=IDS, labels=IDS)
    done = here("eval", in_keras(tmp_path, LENGTH)[0], "--data", tmp_path / "d.npz", "--loss", "cross-entropy")
    assert done.code == 2
    assert "no token follows the last one" in done.err


def test_a_program_is_trained_on_the_next_token(tmp_path: Path) -> None:
    ids = (np.arange(40)[:, np.newaxis] + 3 * np.arange(LENGTH)) % WORDS
    np.savez(tmp_path / "d.npz", input_ids=ids, labels=ids)
    path = program(Language().eval(), tmp_path)
    words = ("--data", tmp_path / "d.npz", "--epochs", "30", "--lr", "0.03", "--batch-size", "8")
    done = here("finetune", path, "-o", tmp_path / "t.pt2", *words)
    assert done.code == 0, done.err
    logits = torch.export.load(tmp_path / "t.pt2").module()(torch.from_numpy(ids))
    assert (logits[:, :-1].argmax(-1).numpy() == ids[:, 1:]).mean() > 0.9
