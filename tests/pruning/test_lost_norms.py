"""What is said where much of a layer goes and no data was looked at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import prunectl
from prunectl.errors import WorkError
from prunectl.formats.registry import open_model
from prunectl.pruning import engine
from prunectl.pruning import prune as prune_module
from prunectl.pruning.destination import Destination
from prunectl.pruning.engine import keep_masks
from prunectl.pruning.plan import make_plan, select_tensors
from prunectl.pruning.prune import prune
from prunectl.pruning.request import PruneRequest, resolve_method
from tests.calibration.runs import numbers
from tests.contract import Array
from tests.pruning.reference import lowest, together
from tests.running import FIXTURES, here

FALL = "accuracy is likely to fall"


@pytest.mark.parametrize("file", ["digits_cnn.keras", "chunked_and_gzipped.h5", "digits_cnn.onnx", "digits_cnn.tflite"])
def test_the_share_of_each_norm_that_goes_is_that_of_what_was_zeroed(file: str, tmp_path: Path) -> None:
    out = tmp_path / f"out{Path(file).suffix}"
    found = prune(FIXTURES / file, PruneRequest(sparsity=0.7), Destination(out))
    before, after = open_model(FIXTURES / file), open_model(out)
    tensors = {tensor.name: tensor for tensor in after.tensors}
    assert found.lost.keys() == {cut.tensor.name for cut in found.plan.cuts}
    for cut in found.plan.cuts:
        old, new = before.read(cut.tensor).astype("f8"), after.read(tensors[cut.tensor.name]).astype("f8")
        expected = np.linalg.norm(old - new) / np.linalg.norm(old)
        assert found.lost[cut.tensor.name] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("file", "words", "remedy"),
    [
        ("digits_cnn.keras", ("-s", "95%"), "Add --repair outputs --data train.npz to win it back"),
        ("digits_cnn.pt", ("-s", "95%"), "Add --repair outputs --data train.npz --builder net.py:Net to win it back"),
        ("digits_cnn.onnx", ("-s", "95%"), "Add --repair --data train.npz to win some of it back"),
        ("digits_cnn.tflite", ("-s", "95%"), "Prune and train the Keras or PyTorch file"),
    ],
)
def test_a_prune_that_ruins_layers_says_so_and_what_wins_it_back(
    file: str, words: tuple[str, ...], remedy: str, tmp_path: Path
) -> None:
    done = here("prune", FIXTURES / file, "-o", tmp_path / file, *words)
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if FALL in line]
    assert "of 4 tensors lose more than half of the norm of their weights" in line
    assert remedy in line


@pytest.mark.parametrize(
    ("network", "data", "test"),
    [
        ("LlamaForCausalLM", "corpus.txt", "--data test.txt --metric perplexity"),
        ("BertForSequenceClassification", "train.npz", "--data test.npz"),
    ],
)
def test_what_wins_it_back_in_a_model_folder_is_text_for_a_language_model_and_never_code(
    network: str, data: str, test: str, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    weights = np.random.default_rng(0).normal(size=(32, 32)).astype("f4")
    save_file({"layers.0.fc1.weight": weights, "layers.0.fc2.weight": weights.T.copy()}, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({"architectures": [network]}))
    done = here("prune", model, "-o", out, "-s", "95%", "--format", "human")
    words = " ".join((done.out + done.err).split())
    assert f"Add --repair outputs --data {data} to win it back" in words
    assert f"prunectl eval {out} {test} --against {model}" in words


def test_a_mild_prune_one_with_data_and_a_dry_run_say_nothing_of_it(tmp_path: Path) -> None:
    data = ("--data", f"{FIXTURES / 'digits.npz'}?norm=/16", "--samples", "16", "--strategy", "activation-magnitude")
    model = FIXTURES / "digits_cnn.onnx"
    for number, words in enumerate((("-s", "20%"), ("-s", "95%", *data))):
        done = here("prune", model, "-o", tmp_path / f"{number}.onnx", *words)
        assert done.code == 0
        assert FALL not in done.err
    assert FALL not in here("prune", model, "-s", "95%", "--dry-run").err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layer", "fc1/kernel=100%", "-s", "10%"), "nothing would be left of fc1/kernel; nothing was written"),
        (("--layer", "*/kernel=100%", "-s", "10%"), "left of conv1/kernel and of 3 more tensors; nothing was written"),
        (("-s", "99.99%", "--scope", "global", "--dry-run"), "nothing would be left of"),
    ],
)
def test_a_tensor_of_which_nothing_is_left_is_refused_unless_that_is_allowed(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    to = () if "--dry-run" in words else ("-o", tmp_path / "out.keras")
    done = here("prune", FIXTURES / "digits_cnn.keras", *to, *words)
    assert done.code == 5
    assert message in done.err
    assert "prune less, use --scope layer or --exclude NAME, or add --allow-empty" in done.err
    assert not list(tmp_path.iterdir())
    done = here("prune", FIXTURES / "digits_cnn.keras", *to, *words, "--allow-empty")
    assert done.code == 0
    assert ("Nothing is left of" in done.err) is bool(to)


def scaled(path: Path, *scales: float) -> dict[str, Array]:
    """Write normal weights of several sizes, one tensor for each scale."""
    random = np.random.default_rng(0)
    weights = {
        f"l{n}.weight": (scale * random.standard_normal((40, 25 * (n + 1)))).astype("f4")
        for n, scale in enumerate(scales)
    }
    save_file(weights, path)
    return weights


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98, 0.995])
@pytest.mark.parametrize("scales", [(1, 1e-4), (1e-6, 1e-3, 1, 1e-5), (1, 1, 0.1)])
def test_ranked_with_all_others_no_tensor_loses_more_than_all_but_a_hundredth(
    scales: tuple[float, ...], sparsity: float, tmp_path: Path
) -> None:
    weights = scaled(tmp_path / "m.safetensors", *scales)
    expected = together(weights, sparsity)
    request = PruneRequest(sparsity=sparsity, scope="global")
    found = prune(tmp_path / "m.safetensors", request, Destination(tmp_path / "o.safetensors"))
    for name, array in load_file(tmp_path / "o.safetensors").items():
        np.testing.assert_array_equal(array, np.where(expected[name], 0, weights[name]), name)
    pure = lowest(np.abs(np.concatenate([array.ravel() for array in weights.values()])), found.plan.drop)
    sizes = [array.size for array in weights.values()]
    floored = sum(
        np.count_nonzero(before) != np.count_nonzero(after)
        for before, after in zip(np.split(pure, np.cumsum(sizes)[:-1]), expected.values(), strict=True)
    )
    assert any("more than the ranking over all layers would leave" in note for note in found.notes) is bool(floored)


def test_zeros_that_a_tensor_had_need_no_place_among_those_that_stay(tmp_path: Path) -> None:
    weights = scaled(tmp_path / "m.safetensors", 1, 1e-5, 1)
    weights["l1.weight"][:] = 0
    weights["l2.weight"].reshape(-1)[3:] = 0
    save_file(weights, tmp_path / "m.safetensors")
    expected = together(weights, 0.5)
    request = PruneRequest(sparsity=0.5, scope="global")
    found = prune(tmp_path / "m.safetensors", request, Destination(tmp_path / "o.safetensors"))
    after = load_file(tmp_path / "o.safetensors")
    for name, array in after.items():
        np.testing.assert_array_equal(array, np.where(expected[name], 0, weights[name]), name)
    assert np.count_nonzero(after["l2.weight"]) == 3
    assert not any("ranking over all layers" in note for note in found.notes)


def test_tensors_that_starve_one_after_another_are_found_without_writing_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What each keeps beyond its rank makes the next one keep too little.
    weights = {"big": np.full((200, 200), 1e-3, "f4") + 1e-6 * np.arange(40_000, dtype="f4").reshape(200, 200)}
    for number in range(60):
        small = np.full(200, 1e-6, "f4")
        small[:2] = weights["big"].reshape(-1)[-150 - 3 * number] + 1e-9
        weights[f"l{number:02}.weight"] = small.reshape(10, 20)
    weights = {"big.weight" if name == "big" else name: array for name, array in weights.items()}
    save_file(weights, tmp_path / "m.safetensors")
    sparsity = 1 - 270 / sum(array.size for array in weights.values())
    written = []
    monkeypatch.setattr(prune_module, "execute", lambda *words: (written.append(1), engine.execute(*words))[1])
    request = PruneRequest(sparsity=sparsity, scope="global")
    prune(tmp_path / "m.safetensors", request, Destination(tmp_path / "o.safetensors"))
    expected = together(weights, sparsity)
    for name, array in load_file(tmp_path / "o.safetensors").items():
        np.testing.assert_array_equal(array, np.where(expected[name], 0, weights[name]), name)
    assert len(written) == 2


def test_masks_of_training_leave_as_much_of_each_tensor(tmp_path: Path) -> None:
    weights = scaled(tmp_path / "m.safetensors", 1, 1e-5, 1e-3)
    model, method = open_model(tmp_path / "m.safetensors"), resolve_method(PruneRequest(sparsity=0.9, scope="global"))
    selection = select_tensors(model, method.criteria)
    plan = make_plan(selection, method.criteria, 0.9)
    masks = keep_masks(model, plan, method, selection, dict(weights))
    expected = together(weights, 0.9)
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, ~expected[name], name)


def test_python_refuses_it_too_and_may_allow_it(tmp_path: Path) -> None:
    path, out = FIXTURES / "digits_cnn.onnx", tmp_path / "out.onnx"
    with pytest.raises(WorkError, match="nothing would be left of"):
        prunectl.prune(path, out, sparsity=0.1, layer={"fc1.weight": 1.0})
    prunectl.prune(path, out, sparsity=0.1, layer={"fc1.weight": 1.0}, allow_empty=True)
    assert not np.count_nonzero(numbers(out)["fc1.weight"])


def test_what_was_zero_before_may_be_zero_after(tmp_path: Path) -> None:
    arrays = {"zeros.weight": np.zeros((4, 4), "f4"), "other.weight": np.arange(1, 17, dtype="f4").reshape(4, 4)}
    save_file(arrays, tmp_path / "m.safetensors")
    done = here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "-s", "50%")
    assert done.code == 0, done.err


def test_rounding_alone_never_takes_the_last_weight(tmp_path: Path) -> None:
    save_file({"gate.weight": np.float32([[1, 3, 2]])}, tmp_path / "m.safetensors")
    done = here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "-s", "90%")
    assert done.code == 0, done.err
    assert load_file(tmp_path / "out.safetensors")["gate.weight"].tolist() == [[0, 3, 0]]
