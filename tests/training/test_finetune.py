"""`finetune` from a file to a file: what is kept, what changes, and what is refused before the first step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from prunectl.errors import InputError, PrunectlError, UsageError, WorkError
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest as Pruning
from prunectl.training.backend import LoadOptions, TrainOptions
from prunectl.training.checkpoint import differences
from prunectl.training.finetune import FinetuneResult, finetune
from prunectl.training.logger import EventWriter
from prunectl.training.request import (
    FinetuneRequest,
    KeepWeights,
    MaskMode,
    ScheduleOptions,
    parse_metrics,
    parse_request,
)
from prunectl.training.torch.model import TorchTrainable
from tests import forked
from tests.pruning import reference
from tests.running import COMMAND, FIXTURES, ROOT, clean, here

DIGITS = FIXTURES / "digits_cnn.pt"
DATA = f"{FIXTURES / 'digits.npz'}?limit=400"
NET = f"{FIXTURES / 'digits_torch.py'}:DigitsCNN"


@pytest.fixture(scope="module", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


def tuned(path: Path, target: Path, **words: Any) -> FinetuneResult:
    """Fine-tune a digits network briefly."""
    own = {
        "means": TrainOptions(lr=0.002, device="cpu"),
        "origin": LoadOptions(NET),
        "val_split": 0.25,
        "epochs": 2,
        **words,
    }
    return finetune(path, FinetuneRequest(DATA, **own), Destination(target))


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ('"class_name": "Dense"', '"class_name": "mine>Own"', "holds code: custom class Own", "--custom-objects"),
        ("", "", "cannot be applied", "save the model as .keras"),
    ],
    ids=["own-class", "mask-missing"],
)
def test_what_keeps_wrappers_on_is_told_of_the_file_that_was_named(
    old: str, new: str, message: str, hint: str, tmp_path: Path
) -> None:
    path = Path(shutil.copy(FIXTURES / "wrapped_by_tfmot.h5", tmp_path))
    with h5py.File(path, "r+") as file:
        masks: list[str] = []
        file.visit(lambda name: masks.append(name) if name.endswith("mask:0") else None)
        if not old:
            del file[masks[0]]
        file.attrs["model_config"] = str(file.attrs["model_config"]).replace(old, new)
    with pytest.raises(InputError) as caught:
        tuned(path, tmp_path / "o.h5", origin=LoadOptions())
    assert str(path) in caught.value.message
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "--only" not in caught.value.hint


def arrays(path: Path) -> dict[str, Any]:
    return reference.arrays(path)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.prune(DIGITS, tmp_path_factory.mktemp("pruned"), sparsity=0.8)[1]


def test_the_zeros_of_a_pruned_file_are_kept_and_counted(pruned: Path, tmp_path: Path) -> None:
    found = tuned(pruned, tmp_path / "out.pt")
    before, after = arrays(pruned), arrays(tmp_path / "out.pt")
    kernels = [tensor.name for tensor in open_model(pruned).tensors if tensor.is_prunable]
    assert found.masked == found.kept == sum(int((before[name] == 0).sum()) for name in kernels)
    for name in kernels:
        assert np.array_equal(before[name] == 0, after[name] == 0), name
        assert not np.array_equal(before[name], after[name]), name
    assert found.judged_after["accuracy"] > found.judged_before["accuracy"]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_dense_file_is_pruned_on_the_way_to_exactly_what_was_asked_for(scope: str, tmp_path: Path) -> None:
    found = tuned(DIGITS, tmp_path / "out.pt", pruning=Pruning(sparsity=0.9, scope=scope))
    kernels = {name: one for name, one in arrays(tmp_path / "out.pt").items() if one.ndim > 1}
    total = sum(one.size for one in kernels.values())
    wanted = round(0.9 * total) if scope == "global" else sum(round(0.9 * one.size) for one in kernels.values())
    assert sum(int((one == 0).sum()) for one in kernels.values()) == wanted == found.kept
    assert found.history[0].sparsity < found.history[-1].sparsity


@pytest.mark.parametrize("strategy", ["movement", "magnitude-gradient", "lamp"])
def test_every_strategy_reaches_the_sparsity(strategy: str, tmp_path: Path) -> None:
    found = tuned(DIGITS, tmp_path / "out.pt", pruning=Pruning(sparsity=0.7, strategy=strategy))
    assert found.masked == found.kept >= 0.699 * 9736


def test_masks_that_regrow_move_and_keep_their_number(pruned: Path, tmp_path: Path) -> None:
    found = tuned(pruned, tmp_path / "out.pt", mask=MaskMode.REGROW, epochs=4, keep=KeepWeights.LAST)
    before, after = arrays(pruned), arrays(tmp_path / "out.pt")
    assert found.masked == found.kept
    for name in ("conv2.weight", "fc1.weight"):
        assert not np.array_equal(before[name] == 0, after[name] == 0)
        # What has just come back is zero until its first step.
        assert (after[name] == 0).sum() >= (before[name] == 0).sum()


def test_two_of_four_is_kept_in_the_file(tmp_path: Path) -> None:
    tuned(DIGITS, tmp_path / "out.pt", pruning=Pruning(pattern="2:4"))
    for name, one in arrays(tmp_path / "out.pt").items():
        if one.ndim > 1 and one.shape[1] % 4 == 0:
            groups = np.moveaxis(one, 1, -1).reshape(-1, 4)
            assert ((groups == 0).sum(1) >= 2).all(), name


def test_a_checkpoint_stays_what_it_was_around_its_weights(tmp_path: Path) -> None:
    source = FIXTURES / "checkpoint_with_optimizer.pt"
    tuned(source, tmp_path / "out.pt")
    before = torch.load(source, weights_only=True)
    after = torch.load(tmp_path / "out.pt", weights_only=True)
    assert before.keys() == after.keys()
    for name, value in before["model_state_dict"].items():
        assert not torch.equal(value, after["model_state_dict"][name]), name
    old, new = before["optimizer_state_dict"], after["optimizer_state_dict"]
    assert old["param_groups"] == new["param_groups"]
    assert all(torch.equal(old["state"][0][key], new["state"][0][key]) for key in old["state"][0])


def test_only_the_bytes_of_the_weights_change(tmp_path: Path) -> None:
    tuned(DIGITS, tmp_path / "out.pt")
    before, after = DIGITS.read_bytes(), (tmp_path / "out.pt").read_bytes()
    assert len(before) == len(after)
    weights = sum(tensor.nbytes for tensor in open_model(DIGITS).tensors)
    # Each entry of the archive has its checksum twice.
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= weights + 8 * len(open_model(DIGITS).tensors)
    assert torch.load(tmp_path / "out.pt", weights_only=True).keys() == torch.load(DIGITS, weights_only=True).keys()


@pytest.mark.parametrize("name", ["digits_cnn_torchscript.pt", "digits_cnn.safetensors", "masks_of_torch_prune.pt"])
def test_other_containers_of_pytorch_are_trained_as_well(name: str, tmp_path: Path) -> None:
    origin = LoadOptions() if "script" in name else LoadOptions(NET)
    found = tuned(FIXTURES / name, tmp_path / name, origin=origin, pruning=Pruning(sparsity=0.85))
    assert found.masked == found.kept == sum(round(0.85 * size) for size in (72, 1152, 8192, 320))
    assert not open_model(tmp_path / name).about.wrappers


def test_zeros_behind_masks_are_zeros(tmp_path: Path) -> None:
    source = FIXTURES / "masks_of_torch_prune.pt"
    held = arrays(source)
    tuned(source, tmp_path / "out.pt")
    after = arrays(tmp_path / "out.pt")
    for layer in ("conv1", "conv2", "fc1", "fc2"):
        assert not after[f"{layer}.weight"][held[f"{layer}.weight_mask"] == 0].any()


def test_the_same_run_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        tuned(DIGITS, tmp_path / name, pruning=Pruning(sparsity=0.8, scope="global"))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_resumed_run_gives_the_same_bytes_as_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: dict[str, Any] = {"pruning": Pruning(sparsity=0.8, strategy="movement"), "epochs": 3}
    tuned(DIGITS, tmp_path / "unbroken.pt", **words)
    step, done = TorchTrainable.step, []

    def tiring(self: TorchTrainable, *args: Any) -> None:
        step(self, *args)
        done.append(1)
        if len(done) == 17:  # in the middle of the second epoch
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TorchTrainable, "step", tiring)
    with pytest.raises(KeyboardInterrupt):
        tuned(DIGITS, tmp_path / "broken.pt", checkpoint_dir=tmp_path / "kept", **words)
    assert not (tmp_path / "broken.pt").exists()
    monkeypatch.undo()
    tuned(DIGITS, tmp_path / "broken.pt", checkpoint_dir=tmp_path / "kept", is_resumed=True, **words)
    assert (tmp_path / "unbroken.pt").read_bytes() == (tmp_path / "broken.pt").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "kept" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]


def test_a_run_is_not_resumed_with_other_choices_nor_overwritten(tmp_path: Path) -> None:
    tuned(DIGITS, tmp_path / "a.pt", checkpoint_dir=tmp_path / "kept", epochs=1)
    with pytest.raises(UsageError, match="already holds a checkpoint"):
        tuned(DIGITS, tmp_path / "b.pt", checkpoint_dir=tmp_path / "kept", epochs=1)
    with pytest.raises(UsageError, match=r"had --batch-size 32, not 16$"):
        tuned(DIGITS, tmp_path / "b.pt", checkpoint_dir=tmp_path / "kept", epochs=1, is_resumed=True, batch_size=16)


def test_the_best_epoch_is_written_unless_the_last_is_asked_for(tmp_path: Path) -> None:
    words: dict[str, Any] = {"means": TrainOptions(lr=0.3, optimizer="sgd", device="cpu"), "epochs": 4}
    best = tuned(DIGITS, tmp_path / "best.pt", **words)
    last = tuned(DIGITS, tmp_path / "last.pt", keep=KeepWeights.LAST, **words)
    assert best.judged_after["accuracy"] == max(entry.val["accuracy"] for entry in best.history)
    assert last.judged_after["accuracy"] == last.history[-1].val["accuracy"]


def test_training_stops_early_when_nothing_improves(tmp_path: Path) -> None:
    means = TrainOptions(lr=0.0, optimizer="sgd", device="cpu")
    found = tuned(DIGITS, tmp_path / "out.pt", means=means, epochs=9, early_stop=2)
    assert len(found.history) == 3


def test_epochs_that_are_not_yet_sparse_enough_are_never_the_best(tmp_path: Path) -> None:
    found = tuned(DIGITS, tmp_path / "out.pt", pruning=Pruning(sparsity=0.95), epochs=4)
    assert found.best_epoch is not None
    assert found.best_epoch >= 3
    assert found.after.prunable_sparsity == pytest.approx(0.95, abs=1e-3)


def test_an_epoch_at_whose_end_the_last_turn_comes_is_not_sparse_enough(tmp_path: Path) -> None:
    # What is never changed by training is best as early as it may be.
    words: dict[str, Any] = {"means": TrainOptions(lr=0.0, optimizer="sgd", device="cpu"), "epochs": 4}
    words |= {"pruning": Pruning(sparsity=0.5), "ramping": ScheduleOptions("polynomial", begin="0", end="2ep")}
    found = tuned(DIGITS, tmp_path / "out.pt", **words)
    assert found.best_epoch == 3
    assert found.after.prunable_sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("strategy", ["magnitude-gradient", "movement"])
def test_what_watches_training_does_not_prune_before_it_has_seen_any(strategy: str, tmp_path: Path) -> None:
    words: dict[str, Any] = {"pruning": Pruning(sparsity=0.5, strategy=strategy), "epochs": 1}
    with pytest.raises(UsageError, match="before the first step"):
        tuned(DIGITS, tmp_path / "out.pt", ramping=ScheduleOptions("constant"), **words)
    found = tuned(DIGITS, tmp_path / "out.pt", ramping=ScheduleOptions("constant", begin="50%"), **words)
    assert found.after.prunable_sparsity == pytest.approx(0.5, abs=1e-3)


def test_nothing_is_trained_for_no_epochs_but_statistics_may_be_taken_anew(tmp_path: Path) -> None:
    found = tuned(DIGITS, tmp_path / "out.pt", epochs=0, is_recalibrated=True)
    assert any("no batch normalisation" in note for note in found.notes)
    assert all(np.array_equal(one, arrays(tmp_path / "out.pt")[name]) for name, one in arrays(DIGITS).items())


def test_what_is_frozen_is_the_same_in_the_file(tmp_path: Path) -> None:
    tuned(DIGITS, tmp_path / "out.pt", frozen=("conv*",))
    before, after = arrays(DIGITS), arrays(tmp_path / "out.pt")
    assert {name for name in before if np.array_equal(before[name], after[name])} == {
        name for name in before if name.startswith("conv")
    }


def test_any_file_may_be_the_teacher(tmp_path: Path) -> None:
    for name in ("digits_cnn.onnx", "digits_cnn_torchscript.pt"):
        found = tuned(DIGITS, tmp_path / f"of_{name}.pt", distill=str(FIXTURES / name), epochs=1)
        assert found.history


def test_a_run_that_is_not_resumed_says_every_choice_that_differs_and_nothing_else(tmp_path: Path) -> None:
    words: dict[str, Any] = {"checkpoint_dir": tmp_path / "kept", "epochs": 1}
    tuned(DIGITS, tmp_path / "a.pt", **words)
    other = {"means": TrainOptions(lr=0.1, clip=1.0, device="cpu", is_compiled=True), "frozen": ("fc*",), "epochs": 1}
    with pytest.raises(UsageError) as caught:
        tuned(DIGITS, tmp_path / "b.pt", is_resumed=True, **{**words, **other})
    _, _, said = str(caught.value).partition("had ")
    assert sorted(said.split("; ")) == [
        "--clip (none), not 1.0",
        "--compile off, not on",
        "--freeze (none), not fc*",
        "--lr 0.002, not 0.1",
    ]


def test_a_choice_that_an_older_checkpoint_does_not_know_differs_in_nothing() -> None:
    assert differences({"batch_size": 32}, {"batch_size": 32, "means": {"lr": None}}) == []


def test_a_number_beyond_single_precision_does_not_end_the_run(tmp_path: Path) -> None:
    events = EventWriter(tmp_path)
    events.scalars(1, {"loss": 1e39, "other": -1e39, "small": 0.5})
    events.close()
    (path,) = tmp_path.iterdir()
    for value in (np.inf, -np.inf, 0.5):
        assert np.float32(value).tobytes() in path.read_bytes()


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    from tensorflow.python.summary.summary_iterator import summary_iterator  # noqa: PLC0415 - seconds, for one test

    tuned(DIGITS, tmp_path / "out.pt", logdir=tmp_path / "log", pruning=Pruning(sparsity=0.5))
    (events,) = (tmp_path / "log").glob("events.out.tfevents.*")
    seen = {
        (event.step, value.tag): value.simple_value
        for event in summary_iterator(str(events))
        for value in event.summary.value
    }
    lines = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert seen[line["step"], "val/accuracy"] == pytest.approx(line["val"]["accuracy"])
        assert seen[line["step"], "sparsity"] == pytest.approx(line["sparsity"])
        assert (line["step"], "sparsity/fc1.weight") in seen


def test_a_lost_zero_fails_and_writes_nothing(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TorchTrainable.tensors

    def leaky(self: TorchTrainable) -> dict[str, Any]:
        found = whole(self)
        found["fc2.weight"][found["fc2.weight"] == 0] = 1e-9
        return found

    monkeypatch.setattr(TorchTrainable, "tensors", leaky)
    with pytest.raises(WorkError, match=r"256 of \d+ zeros became nonzero"):
        tuned(pruned, tmp_path / "out.pt", keep=KeepWeights.LAST)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_no_number_ends_the_run_with_advice(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="the loss is") as caught:
        tuned(DIGITS, tmp_path / "out.pt", means=TrainOptions(lr=1e30, optimizer="sgd", device="cpu"))
    assert "--lr" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def spoiled(path: Path, **arrays_: Any) -> str:
    held = dict(np.load(FIXTURES / "digits.npz"))
    np.savez(path, **{**held, **arrays_})
    return str(path)


def wrong_label(path: Path) -> str:
    labels = np.zeros(1797, "i8")
    labels[1234] = 17
    return spoiled(path, y=labels)


def not_a_number(path: Path) -> str:
    x = np.zeros((1797, 8, 8, 1), "f4")
    x[77, 3, 3] = np.nan
    return spoiled(path, x=x)


def no_targets(path: Path) -> str:
    np.save(path.with_suffix(".npy"), np.zeros((9, 8, 8, 1), "f4"))
    return str(path.with_suffix(".npy"))


def other_shape(path: Path) -> str:
    return spoiled(path, x=np.zeros((1797, 3, 8, 8), "f4"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (wrong_label, "17"),
        (not_a_number, "77"),
        (no_targets, "no targets"),
        (other_shape, "3x8x8"),
    ],
)
def test_bad_data_is_told_before_the_first_step(spoil: Any, said: str, tmp_path: Path) -> None:
    data = spoil(tmp_path / "data.npz")
    words = FinetuneRequest(data, origin=LoadOptions(NET), means=TrainOptions(device="cpu"))
    with pytest.raises((UsageError, InputError), match=said):
        finetune(DIGITS, words, Destination(tmp_path / "out.pt"))
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("options", "scope"),
    [
        ({"sparsity": 0.9}, "global"),
        ({"sparsity": 0.9, "strategy": "lamp", "keep_wrappers": True, "scope": "auto"}, "global"),
        ({"sparsity": 0.9, "scope": "layer"}, "layer"),
        ({"sparsity": 0.9, "strategy": "movement"}, "layer"),
        ({"sparsity": 0.9, "layer": [("fc*", 0.5)]}, "layer"),
        ({"sparsity": 0.9, "mask": "regrow"}, "layer"),
        ({"pattern": "2:4"}, "layer"),
        ({}, "layer"),
    ],
    ids=str,
)
def test_layers_are_ranked_together_where_scores_mean_the_same_and_nothing_is_said_of_single_ones(
    options: dict[str, Any], scope: str
) -> None:
    assert parse_request({"data": "d.npz", **options}).pruning.scope == scope


def test_layers_are_ranked_together_where_the_sparsity_is_searched_for() -> None:
    assert parse_request({"data": "d.npz"}, is_searched=True).pruning.scope == "global"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"val": DATA}, "cannot be used together"),
        ({"val_split": 0.0, "early_stop": 2}, "needs validation data"),
        ({"is_resumed": True}, "needs --checkpoint-dir"),
        ({"rate": "cosinus"}, "not a known learning-rate schedule"),
        ({"ramping": ScheduleOptions("cosine")}, "needs a final sparsity"),
        ({"steps": 5, "epochs": 2}, "cannot be used together"),
        ({"frozen": ("cnv*",)}, "cnv"),
        ({"pruning": Pruning(sparsity=0.5, strategy="movement", params=("a=1",))}, "takes no --param"),
        ({"pruning": Pruning(sparsity=0.5, strategy="obs")}, "cannot be used during training"),
        (
            {"pruning": Pruning(sparsity=0.5), "ramping": ScheduleOptions(end="999")},
            "end at step 999, but training has only 20",
        ),
    ],
)
def test_choices_that_make_no_sense_are_refused(words: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(PrunectlError, match=said) as caught:
        tuned(DIGITS, tmp_path / "out.pt", **words)
    assert caught.value.exit_code == 2


def test_formats_without_a_graph_to_differentiate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be trained"):
        tuned(FIXTURES / "digits_cnn.tflite", tmp_path / "out.tflite")


def test_the_command_prints_the_result_and_a_line_for_each_epoch(tmp_path: Path) -> None:
    words = ["--data", DATA, "--val-split", "25%", "--epochs", "2", "-s", "80%", "--builder", NET, "--device", "cpu"]
    done = here("finetune", DIGITS, "-o", tmp_path / "out.pt", *words)
    assert done.code == 0, done.err
    ((path, metric, before, after, *_, kept, zeros, how),) = done.rows
    assert (path, metric, kept, zeros) == (str(tmp_path / "out.pt"), "accuracy", "7789", "7789")
    assert 0 < float(after) <= 1 >= float(before)
    assert how.startswith("magnitude, global, polynomial")
    assert "epoch 1/2: loss " in done.err
    assert "epoch 2/2: loss " in done.err


def test_the_json_has_the_training_beside_the_model(tmp_path: Path) -> None:
    words = ["--data", DATA, "--val-split", "25%", "--epochs", "1", "--builder", NET, "--device", "cpu", "--json"]
    done = here("finetune", DIGITS, "-o", tmp_path / "out.pt", *words)
    assert done.code == 0, done.err
    training = done.json["models"][1]["training"]
    assert training["steps"] == 10
    assert training["before"].keys() == training["after"].keys() == {"loss", "accuracy"}


STEP = """
import os, signal
import torch

count = 0

def step(model, x, y):
    global count
    count += 1
    if count == int(os.environ.get("STOPS_AT", "0")):
        os.kill(os.getpid(), signal.SIGINT)
    return torch.nn.functional.cross_entropy(model(x), y)
"""


def test_ctrl_c_keeps_a_checkpoint_and_leaves_no_output(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(STEP)
    words = ["--data", DATA, "--epochs", "3", "--builder", NET, "--train-step", f"{tmp_path / 'own.py'}:step"]
    words += ["--device", "cpu", "--checkpoint-dir", str(tmp_path / "kept")]
    command = [*COMMAND, "finetune", str(DIGITS), "-o", str(tmp_path / "out.pt"), *words]
    # In the second epoch, whose first steps are not lost.
    assert forked.run(command, env=clean(STOPS_AT="17")).returncode == 130
    assert not (tmp_path / "out.pt").exists()
    assert json.loads((tmp_path / "kept" / "last" / "run.json").read_text())["step"] == 17


ALIKE = ["--device", "cpu", "--json"]


def by_torchrun(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run prunectl in two processes, as users start them; torchrun, which is not ours, has PyTorch at hand."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "prunectl"]
    done = forked.run([*launch, *map(str, words)], env=clean(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"))
    return subprocess.CompletedProcess([], done.returncode, done.stdout.decode(), done.stderr.decode())


def in_two(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run prunectl in two processes as torchrun would have started them, and return what came of the first."""
    first, second = forked.run_two([*COMMAND, *map(str, words)], env=clean(OMP_NUM_THREADS="1", **env))
    assert (first.returncode == 0) == (second.returncode == 0), second.stderr.decode()
    return subprocess.CompletedProcess([], first.returncode, first.stdout.decode(), first.stderr.decode())


@pytest.mark.parametrize(
    ("run", "more"), [(by_torchrun, []), (in_two, ["--shard"])], ids=["whole models", "each its part"]
)
def test_two_processes_make_the_same_masks_and_one_of_them_writes(run: Any, more: list[str], tmp_path: Path) -> None:
    words = ["--data", DATA, "--val-split", "25%", "--epochs", "2", "-s", "80%", "--scope", "global", "--builder", NET]
    done = run("finetune", DIGITS, "-o", tmp_path / "two.pt", *words, *more, *ALIKE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"][1]["training"]["zeros_kept"] == round(0.8 * 9736)
    alone = tuned(
        DIGITS, tmp_path / "one.pt", pruning=Pruning(sparsity=0.8, scope="global"), means=TrainOptions(device="cpu")
    )
    one, two = arrays(tmp_path / "one.pt"), arrays(tmp_path / "two.pt")
    assert alone.masked == sum(int((two[name] == 0).sum()) for name in two if two[name].ndim > 1)
    # The same batches in other halves: the same numbers, but for the order in which they are added.
    for name in one:
        assert np.allclose(one[name], two[name], atol=2e-3), name


def test_spread_parameters_go_on_to_the_same_weights_after_an_interruption(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(STEP)
    words = ["--data", DATA, "-s", "80%", "--strategy", "movement", "--builder", NET, "--clip", "1", "--shard"]
    words += [
        "--optimizer",
        "adam:weight_decay=0.01",
        "--train-step",
        f"{tmp_path / 'own.py'}:step",
        "--epochs",
        "2",
        *ALIKE,
    ]
    whole = in_two("finetune", DIGITS, "-o", tmp_path / "whole.pt", *words)
    assert whole.returncode == 0, whole.stderr
    kept = ["--checkpoint-dir", tmp_path / "kept"]
    assert in_two("finetune", DIGITS, "-o", tmp_path / "broken.pt", *words, *kept, STOPS_AT="17").returncode != 0
    assert not (tmp_path / "broken.pt").exists()
    again = in_two("finetune", DIGITS, "-o", tmp_path / "again.pt", *words, *kept, "--resume")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


def test_a_model_is_spread_over_several_processes_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this is the only one"):
        tuned(DIGITS, tmp_path / "out.pt", means=TrainOptions(is_sharded=True, device="cpu"))


def test_frozen_tensors_are_not_pruned_either(tmp_path: Path) -> None:
    found = tuned(DIGITS, tmp_path / "out.pt", pruning=Pruning(sparsity=0.8), frozen=("fc*",), epochs=1)
    before, after = arrays(DIGITS), arrays(tmp_path / "out.pt")
    for name in before:
        assert np.array_equal(before[name], after[name]) == name.startswith("fc"), name
    assert found.kept == round(0.8 * 72) + round(0.8 * 1152)


def test_training_that_goes_astray_is_not_the_fault_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="training diverged"):
        tuned(DIGITS, tmp_path / "out.pt", pruning=Pruning(sparsity=0.8), means=TrainOptions(lr=1e30, device="cpu"))
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"ramping": ScheduleOptions(end="10")}, "a schedule needs a final sparsity"),
        ({"ramping": ScheduleOptions(frequency=3)}, "a schedule needs a final sparsity"),
        ({"pruning": Pruning(strategy="movement")}, "need a sparsity"),
        ({"mask": MaskMode.REGROW}, "no zeros that could be regrown"),
    ],
)
def test_words_about_pruning_need_a_sparsity(words: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        tuned(DIGITS, tmp_path / "out.pt", **words)


def test_a_file_that_is_sparser_already_keeps_its_zeros_and_it_is_said(pruned: Path, tmp_path: Path) -> None:
    found = tuned(pruned, tmp_path / "out.pt", pruning=Pruning(sparsity=0.5), epochs=1)
    assert any("is already sparser than 50.0%" in note for note in found.notes)
    assert found.after.prunable_sparsity == pytest.approx(0.8, abs=1e-3)


def test_targets_of_another_shape_are_refused_with_both(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a target is a number for each example, and the model gives 10"):
        tuned(DIGITS, tmp_path / "out.pt", means=TrainOptions(loss="mse", device="cpu"))


def test_the_best_epoch_is_not_guessed_from_the_name_of_a_function(tmp_path: Path) -> None:
    (tmp_path / "laptop.py").write_text(
        "def err(out, y):\n    return (out.argmax(1) != y.reshape(-1)).float().mean()\n"
        "def same(out, y):\n    return 1 - err(out, y)\n"
    )
    name = f"{tmp_path / 'laptop.py'}"
    words: dict[str, Any] = {"epochs": 4}
    for keep in ({"keep": KeepWeights.BEST}, {"keep": KeepWeights.LAST, "early_stop": 1}):
        with pytest.raises(UsageError, match="is better"):
            tuned(
                DIGITS,
                tmp_path / "no.pt",
                means=TrainOptions(device="cpu", **parse_metrics([f"{name}:err"])),
                **words,
                **keep,
            )
    free = TrainOptions(lr=0.3, optimizer="sgd", device="cpu", **parse_metrics([f"{name}:err"]))
    assert tuned(DIGITS, tmp_path / "last.pt", means=free, **words, keep=KeepWeights.LAST).best_epoch is None
    wanted = {"err:min": min, "same:max": max}
    for word, best in wanted.items():
        means = TrainOptions(lr=0.3, optimizer="sgd", device="cpu", **parse_metrics([f"{name}:{word}"]))
        found = tuned(DIGITS, tmp_path / f"{best.__name__}.pt", means=means, **words)
        numbers = [entry.val[means.decides] for entry in found.history]
        assert found.best_epoch == numbers.index(best(numbers)) + 1
        assert found.judged_after[means.decides] == best(numbers)


def test_a_loss_of_the_users_with_labels_is_judged_by_accuracy(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch.nn import functional\ndef loss(out, y):\n    return functional.cross_entropy(out, y.long())\n"
    )
    found = tuned(
        DIGITS, tmp_path / "out.pt", means=TrainOptions(loss=f"{tmp_path / 'own.py'}:loss", device="cpu"), epochs=1
    )
    named = tuned(DIGITS, tmp_path / "named.pt", means=TrainOptions(loss="cross-entropy", device="cpu"), epochs=1)
    assert found.judged_after == pytest.approx(named.judged_after)
    assert set(found.judged_after) == {"loss", "accuracy"}


def test_the_command_loads_what_searches_cuts_and_calibrates_only_where_it_is_asked_for() -> None:
    code = (
        "import sys, prunectl.commands.finetune;"
        "rooms = 'sweeping', 'channels', 'calibration', 'training.torch', 'training.onnx';"
        "sys.exit(any(name.removeprefix('prunectl.').startswith(rooms) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
