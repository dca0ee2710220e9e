"""Labels that repeat the tokens, in files that do not say that their model predicts the next one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.next_token import shift_if_causal
from prunectl.training.data.readers import from_arrays
from prunectl.training.data.source import peek
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


class Alone(torch.nn.Module):
    """Looks at each token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.answer = torch.nn.Embedding(WORDS, 6), torch.nn.Linear(6, WORDS)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.answer(self.embed(input_ids))
        return logits


class Convolved(torch.nn.Module):
    """Classes in axis 1; a padding on the left alone is causal."""

    def __init__(self, left: int, right: int, classes: int = WORDS) -> None:
        super().__init__()
        self.embed, self.pad = torch.nn.Embedding(classes, 6), torch.nn.ConstantPad1d((left, right), 0.0)
        self.answer = torch.nn.Conv1d(6, classes, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.answer(self.pad(self.embed(input_ids).transpose(1, 2)))
        return logits


def script(module: torch.nn.Module, folder: Path) -> Path:
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


def loss_of(model: Path, folder: Path, *words: str, ids: Any = IDS, **others: Any) -> float:
    np.savez(folder / "d.npz", input_ids=ids, labels=ids, **others)
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
    assert "call the labels y" in done.err


def test_keras_leaves_inputs_whole_that_are_no_sequences(tmp_path: Path) -> None:
    k = keras()
    k.utils.set_random_seed(0)
    ids, context = k.Input((None,), name="input_ids"), k.Input((16,), name="context")
    start = k.layers.Dense(5)(context)
    states = k.layers.GRU(5, return_sequences=True)(k.layers.Embedding(WORDS, 6)(ids), initial_state=start)
    model = k.Model([ids, context], k.layers.Dense(WORDS)(states))
    model.save(tmp_path / "m.keras")
    model.compile(loss=k.losses.SparseCategoricalCrossentropy(from_logits=True))
    # Of any length, and of that of the context too.
    for length in (LENGTH, 16):
        random = np.random.default_rng(1)
        tokens, given = random.integers(0, WORDS, (40, length)), random.normal(size=(40, 16)).astype(np.float32)
        expected = float(model.evaluate([tokens[:, :-1], given], tokens[:, 1:], verbose=0))
        found = loss_of(tmp_path / "m.keras", tmp_path, "--loss", "cross-entropy", ids=tokens, context=given)
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("is_mask", [False, True])
def test_keras_cuts_another_input_of_that_length_only_if_no_output_depends_on_its_end(
    is_mask: bool, tmp_path: Path
) -> None:
    k = keras()
    k.utils.set_random_seed(0)
    ids, other = k.Input((None,), name="input_ids"), k.Input((None,), name="other")
    states, seen = k.layers.Embedding(WORDS, 6)(ids), k.layers.Embedding(WORDS, 6)(other)
    if is_mask:
        states = k.layers.GRU(5, return_sequences=True)(k.layers.Multiply()([states, seen]))
    else:
        start = k.layers.Dense(5)(k.layers.GlobalAveragePooling1D()(seen))
        states = k.layers.GRU(5, return_sequences=True)(states, initial_state=start)
    model = k.Model([ids, other], k.layers.Dense(WORDS)(states))
    model.save(tmp_path / "m.keras")
    given = IDS[::-1]
    if is_mask:
        model.compile(loss=k.losses.SparseCategoricalCrossentropy(from_logits=True))
        expected = float(model.evaluate([IDS[:, :-1], given[:, :-1]], IDS[:, 1:], verbose=0))
        found = loss_of(tmp_path / "m.keras", tmp_path, "--loss", "cross-entropy", other=given)
        assert found == pytest.approx(expected, rel=1e-5)
        return
    np.savez(tmp_path / "d.npz", input_ids=IDS, labels=IDS, other=given)
    done = here("eval", tmp_path / "m.keras", "--data", tmp_path / "d.npz", "--loss", "cross-entropy")
    assert done.code == 2
    assert "another input of their length cannot lose its last place" in done.err


@pytest.mark.parametrize(("left", "right"), [(2, 0), (1, 1)])
@pytest.mark.parametrize("classes", [4, WORDS])
def test_classes_may_come_before_places(left: int, right: int, classes: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, ids = Convolved(left, right, classes).eval(), torch.from_numpy(IDS % classes)
    moved = 1 if right == 0 else 0
    expected = cross_entropy(module(ids)[:, :, : LENGTH - moved], ids[:, moved:]).item()
    assert loss_of(script(module, tmp_path), tmp_path, ids=ids.numpy()) == pytest.approx(expected, rel=1e-5)


def test_a_network_that_looks_at_each_token_alone_is_compared_in_place(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, ids = Alone().eval(), torch.from_numpy(IDS)
    expected = cross_entropy(module(ids).flatten(0, 1), ids.flatten()).item()
    assert loss_of(script(module, tmp_path), tmp_path) == pytest.approx(expected, rel=1e-5)


def test_the_tokens_may_be_any_of_the_inputs(tmp_path: Path) -> None:
    class Shifted(Language):
        def forward(self, context: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            logits: torch.Tensor = self.answer(self.read(self.embed(input_ids))[0]) + context.unsqueeze(1)
            return logits

    torch.manual_seed(1)
    module, ids = Shifted().eval(), torch.from_numpy(IDS)
    context = torch.randn(40, WORDS)
    expected = cross_entropy(module(context, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    found = loss_of(script(module, tmp_path), tmp_path, context=context.numpy())
    assert found == pytest.approx(expected, rel=1e-5)


def test_two_rows_tell_whether_a_model_predicts_the_next_token() -> None:
    port = TensorSpec("input_ids", (None,), "int64")
    signature = ModelSignature((port,), (), is_channels_first=True, ignored_label=-100)
    source = from_arrays("d", {"input_ids": IDS}, {"labels": IDS})
    rows = []

    def predict(x: Any) -> Any:
        rows.append(len(x))
        return np.cumsum(np.eye(WORDS)[x], 1)

    head = peek(shift_if_causal(source, signature, predict), 4)
    assert head is not None
    assert np.array_equal(head.y, np.pad(IDS[:4, 1:], ((0, 0), (0, 1)), constant_values=-100))
    assert sum(rows) == 2


OWN = """
from torch.nn.functional import cross_entropy

def loss(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

def step(model, x, y):
    return loss(model(x), y)

def last(logits, labels):
    return (labels[:, -1] == -100).float().mean()
"""


def test_a_loss_of_the_user_gets_labels_as_they_are_and_a_metric_what_the_loss_gets(tmp_path: Path) -> None:
    torch.manual_seed(1)
    (tmp_path / "own.py").write_text(OWN)
    module, ids = Language().eval(), torch.from_numpy(IDS)
    path, own = script(module, tmp_path), str(tmp_path / "own.py")
    logits = module(ids)
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss_of(path, tmp_path, "--loss", f"{own}:loss") == pytest.approx(expected, rel=1e-5)
    words = ("eval", path, "--data", tmp_path / "d.npz", "--metric", f"{own}:last:max", "--json")
    done = here(*words, "--loss", f"{own}:loss")
    assert done.json["evaluations"][0]["value"] == 0
    assert any("--loss gets the labels as they are" in warning for warning in done.json["warnings"])
    done = here(*words)
    assert done.json["evaluations"][0]["value"] == 1
    assert any("to compare them in place, call them y" in warning for warning in done.json["warnings"])


def test_a_training_step_of_the_user_gets_labels_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(1)
    (tmp_path / "own.py").write_text(OWN)
    np.savez(tmp_path / "d.npz", input_ids=IDS, labels=IDS)
    np.savez(tmp_path / "y.npz", input_ids=IDS, y=IDS)
    path = script(Language().eval(), tmp_path)
    outs = []
    for data in ("d", "y"):
        outs.append(tmp_path / f"{data}.pt")
        words = ("--data", tmp_path / f"{data}.npz", "--epochs", "1", "--lr", "0.03", "--optimizer", "sgd")
        done = here("finetune", path, "-o", outs[-1], *words, "--train-step", f"{tmp_path / 'own.py'}:step")
        assert done.code == 0, done.err
    states = [torch.jit.load(str(out)).state_dict() for out in outs]  # type: ignore[no-untyped-call]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("is_own", [False, True])
def test_gradients_are_those_of_the_next_token(is_own: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    (tmp_path / "own.py").write_text(OWN)
    module, ids = Language(), torch.from_numpy(IDS)
    np.savez(tmp_path / "d.npz", input_ids=IDS, labels=IDS)
    words = ("--strategy", "gradient", "--data", tmp_path / "d.npz", "-s", "50%", "--scope", "layer", "--samples", "40")
    own = ("--loss", f"{tmp_path / 'own.py'}:loss") if is_own else ()
    done = here("prune", script(module.eval(), tmp_path), "-o", tmp_path / "o.pt", *words, "--batch-size", "40", *own)
    assert done.code == 0, done.err
    cross_entropy(module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    kept = torch.jit.load(str(tmp_path / "o.pt")).state_dict()  # type: ignore[no-untyped-call]
    assert module.answer.weight.grad is not None
    scores = module.answer.weight.grad.abs().flatten()
    zeros = set(scores.argsort()[: scores.numel() // 2].tolist())
    assert set((kept["answer.weight"].flatten() == 0).nonzero().flatten().tolist()) == zeros


def test_a_program_is_trained_on_the_next_token(tmp_path: Path) -> None:
    ids = (np.arange(40)[:, np.newaxis] + 3 * np.arange(LENGTH)) % WORDS
    np.savez(tmp_path / "d.npz", input_ids=ids, labels=ids)
    path = program(Language().eval(), tmp_path)
    words = ("--data", tmp_path / "d.npz", "--epochs", "30", "--lr", "0.03", "--batch-size", "8")
    done = here("finetune", path, "-o", tmp_path / "t.pt2", *words)
    assert done.code == 0, done.err
    logits = torch.export.load(tmp_path / "t.pt2").module()(torch.from_numpy(ids))
    assert (logits[:, :-1].argmax(-1).numpy() == ids[:, 1:]).mean() > 0.9
