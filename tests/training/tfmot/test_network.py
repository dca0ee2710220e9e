from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.plan import Scope
from prunectl.pruning.request import PruneRequest as Pruning
from prunectl.pruning.schedules import SparsitySchedule
from prunectl.training.backend import LoadOptions, TrainOptions
from prunectl.training.data.source import Batch
from prunectl.training.finetune import FinetuneResult, finetune
from prunectl.training.keras.model import KerasTrainable
from prunectl.training.native_pruning import NativePruning
from prunectl.training.request import FinetuneRequest, KeepWeights, MaskMode, ScheduleOptions
from prunectl.training.wrap import read_saved_pruning
from prunectl.training.wrap.prune import prune_wrapped
from tests.networks import tf_keras
from tests.pruning import reference
from tests.running import FIXTURES, here
from tests.training.tfmot.models import convolutional, flat, functional, recurrent, saved

k = tf_keras()
tfmot = pytest.importorskip("prunectl.training.tfmot.wrappers").load_tfmot()
load_trainable = importlib.import_module("prunectl.training.tfmot.model").load_trainable
pytestmark = [
    pytest.mark.usefixtures("_forked_rebuilding"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

RANDOM = np.random.default_rng(7)
X = RANDOM.normal(size=(80, 8, 8, 1)).astype(np.float32)
Y = (np.arange(80) % 3).astype(np.int64)
BATCHES = [Batch(X[at : at + 8], Y[at : at + 8]) for at in range(0, 80, 8)]
SGD = "sgd:learning_rate=0.05,momentum=0.9"
LOSS = "sparse_categorical_crossentropy"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(convolutional(k), tmp_path_factory.mktemp("plain") / "m.h5")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data") / "d.npz"
    np.savez(place, x=X, y=Y)
    return place


def tuned(path: Path, target: Path, data: Path, ramping: ScheduleOptions | None = None, **words: Any) -> FinetuneResult:
    pruning = {
        name: words.pop(name) for name in ("sparsity", "pattern", "scope", "layers", "strategy") if name in words
    }
    given = {
        "epochs": 3,
        "batch_size": 8,
        "means": TrainOptions(optimizer=SGD, loss=LOSS),
        "keep": KeepWeights.LAST,
        **words,
    }
    request = FinetuneRequest(str(data), pruning=Pruning(**pruning), ramping=ramping or ScheduleOptions(), **given)
    return finetune(path, request, Destination(target))


def by_tfmot(path: Path, schedules: dict[str, Any], batches: list[Batch]) -> Any:
    """Train as the documentation of tfmot has it, in a loop of one's own, each layer by a schedule."""

    def pruned(layer: Any) -> Any:
        ramp = schedules.get(layer.name)
        return layer if ramp is None else tfmot.prune_low_magnitude(layer, pruning_schedule=ramp)

    model = k.models.clone_model(k.models.load_model(path, compile=False), clone_function=pruned)
    model.compile(optimizer=k.optimizers.SGD(0.05, 0.9), loss=LOSS)
    update = tfmot.UpdatePruningStep()
    update.set_model(model)
    update.on_train_begin()
    for batch in batches:
        model.train_on_batch(batch.x, batch.y)
    update.on_epoch_end(0)
    return tfmot.strip_pruning(model)


def is_by_tfmot(found: FinetuneResult) -> bool:
    return any("tensorflow-model-optimization" in note for note in found.notes)


class TestTheNetwork:
    def test_ends_with_the_very_weights_of_tfmot(self, path: Path) -> None:
        network = load_trainable(open_model(path), LoadOptions())
        network.prepare(TrainOptions(optimizer=SGD, loss=LOSS, example=BATCHES[0]))
        ours = {
            "conv/kernel:0": SparsitySchedule("polynomial", 0.8, 0, 8, 0.2, 2),
            "hidden/kernel:0": SparsitySchedule("constant", 0.7, 3, 3, 0.0, 1),
        }
        theirs = {
            "conv": tfmot.PolynomialDecay(0.2, 0.8, 0, 8, 3, 2),
            "hidden": tfmot.ConstantSparsity(0.7, 3, 3, 1),
        }
        assert network.prune_by(NativePruning(ours)) == ours.keys()
        for batch in BATCHES:
            network.step(batch, 1.0)
        expected = by_tfmot(path, theirs, BATCHES)
        found = network.tensors()
        for variable in expected.weights:
            assert np.allclose(found[variable.name], variable.numpy(), atol=1e-6), variable.name
        for name, mask in network.masks().items():
            assert np.array_equal(mask, found[name] != 0)

    def test_its_step_is_traced_once_and_not_at_every_epoch(self, path: Path) -> None:
        network = load_trainable(open_model(path), LoadOptions())
        network.prepare(TrainOptions(optimizer=SGD, loss=LOSS, example=BATCHES[0]))
        network.prune_by(NativePruning({"hidden/kernel:0": SparsitySchedule("polynomial", 0.8, 0, 8, 0.0, 2)}))
        traced = []
        step = network._model.train_step
        network._model.train_step = lambda data: (traced.append(1), step(data))[1]
        for epoch in range(3):
            network.reseed(epoch)
            for batch in BATCHES[:2]:
                network.step(batch, 1.0)
        assert len(traced) == 1

    def test_is_masked_when_it_is_looked_at_though_tfmot_masks_at_the_end_of_an_epoch(self, path: Path) -> None:
        network = load_trainable(open_model(path), LoadOptions())
        network.prepare(TrainOptions(optimizer=SGD, loss=LOSS, example=BATCHES[0]))
        network.prune_by(NativePruning({"hidden/kernel:0": SparsitySchedule("constant", 0.5, 1, 1, frequency=1)}))
        for batch in BATCHES[:3]:
            network.step(batch, 1.0)
        (mask,) = network.masks().values()
        assert np.count_nonzero(~mask) == mask.size // 2
        assert np.all(network.tensors()["hidden/kernel:0"][~mask] == 0)
        network.assign({"hidden/kernel:0": np.ones(mask.shape, np.float32)})
        assert np.array_equal(network.weights(["hidden/kernel:0"])["hidden/kernel:0"], mask.astype(np.float32))

    def test_goes_on_from_a_checkpoint_to_the_same_weights(self, path: Path, tmp_path: Path) -> None:
        def begun() -> Any:
            network = load_trainable(open_model(path), LoadOptions())
            network.prepare(TrainOptions(optimizer="adam", loss=LOSS, example=BATCHES[0]))
            network.prune_by(NativePruning({"hidden/kernel:0": SparsitySchedule("polynomial", 0.8, 0, 8, 0.0, 2)}))
            return network

        whole, rest = begun(), begun()
        for batch in BATCHES[:5]:
            whole.step(batch, 1.0)
        whole.save(tmp_path)
        rest.restore(tmp_path)
        for network in (whole, rest):
            for batch in BATCHES[5:]:
                network.step(batch, 1.0)
        for name, value in whole.tensors().items():
            assert np.array_equal(rest.tensors()[name], value), name

    def test_that_tfmot_cannot_wrap_as_asked_is_left_as_it_was(self, tmp_path: Path) -> None:
        path = saved(functional(k), tmp_path / "m.h5")
        network = load_trainable(open_model(path), LoadOptions())
        ramp = SparsitySchedule("constant", 0.5, 1, 1, frequency=1)
        network.prepare(TrainOptions(optimizer=SGD, loss=LOSS))
        assert not network.prune_by(NativePruning({"spread/kernel:0": ramp, "shared/kernel:0": ramp}))
        assert not any(hasattr(layer, "pruning_vars") for layer in network._model.layers)

    def test_of_a_layer_that_is_called_twice_counts_batches(self, tmp_path: Path) -> None:
        path = saved(functional(k), tmp_path / "m.h5")
        network = load_trainable(open_model(path), LoadOptions())
        x = tuple(RANDOM.normal(size=(4, 6)).astype(np.float32) for _ in range(2))
        batch = Batch(x, np.array([0, 1, 2, 0]))
        network.prepare(TrainOptions(optimizer=SGD, loss=LOSS, example=batch))
        names = ("shared/kernel:0", "inside/kernel:0", "out/kernel:0")
        assert network.prune_by(
            NativePruning(dict.fromkeys(names, SparsitySchedule("polynomial", 0.5, 0, 6, 0.0, 2)))
        ) == set(names)
        for _ in range(6):
            network.step(batch, 1.0)
        assert {int(wrapper.pruning_step) for wrapper in network._wrapped.wrappers} == {6}
        for mask in network.masks().values():
            assert np.count_nonzero(~mask) == pytest.approx(mask.size / 2, abs=0.5)


class TestWhoPrunes:
    @pytest.mark.parametrize(
        ("words", "ramping"),
        [
            ({"sparsity": 0.8}, ScheduleOptions("cosine", end="60%")),
            ({"sparsity": 0.8}, ScheduleOptions("constant")),
            ({"pattern": "2:4"}, ScheduleOptions()),
            (
                {"sparsity": 0.6, "layers": (("hidden/kernel*", 0.9),)},
                ScheduleOptions("polynomial", end="13", frequency=5),
            ),
        ],
        ids=["cosine", "constant", "groups", "a ratio of its own and an end between turns"],
    )
    def test_tfmot_does_what_it_can_to_the_exact_count(
        self, words: Any, ramping: ScheduleOptions, path: Path, data: Path, tmp_path: Path
    ) -> None:
        found = tuned(path, tmp_path / "out.h5", data, ramping, **words)
        assert is_by_tfmot(found)
        written = open_model(tmp_path / "out.h5")
        assert not written.about.wrappers
        assert found.kept == found.masked
        for tensor in written.tensors:
            if tensor.is_prunable:
                assert not np.signbit(written.read(tensor)[written.read(tensor) == 0]).any()
                own = dict(words.get("layers", ())).get("hidden/kernel*") if tensor.layer == "hidden" else None
                if "pattern" not in words:
                    zeros = np.count_nonzero(written.read(tensor) == 0)
                    assert zeros == round((own or words["sparsity"]) * tensor.size), tensor.name

    @pytest.mark.parametrize(
        "words",
        [
            {"sparsity": 0.8, "scope": Scope.GLOBAL.value},
            {"sparsity": 0.8, "strategy": "magnitude-gradient"},
            {"sparsity": 0.8, "mask": MaskMode.REGROW},
            {"sparsity": 0.5, "pattern": "block:2x2"},
        ],
        ids=["global", "evidence", "regrow", "blocks of images"],
    )
    def test_our_own_masks_do_what_tfmot_cannot(self, words: Any, path: Path, data: Path, tmp_path: Path) -> None:
        assert not is_by_tfmot(tuned(path, tmp_path / "out.h5", data, epochs=1, **words))

    def test_frozen_layers_stay_as_they_are_beside_those_of_tfmot(self, path: Path, data: Path, tmp_path: Path) -> None:
        found = tuned(path, tmp_path / "out.h5", data, epochs=1, sparsity=0.8, frozen=("hidden*",))
        assert is_by_tfmot(found)
        before, after = reference.arrays(path), reference.arrays(tmp_path / "out.h5")
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        assert changed
        assert not any(name.startswith("hidden") for name in changed)

    def test_blocks_of_matrices_are_tfmots(self, data: Path, tmp_path: Path) -> None:
        found = tuned(
            saved(flat(k), tmp_path / "m.h5"), tmp_path / "out.h5", data, sparsity=0.5, pattern="block:4x3:max"
        )
        assert is_by_tfmot(found)
        kernel = open_model(tmp_path / "out.h5").read(
            next(t for t in open_model(tmp_path / "out.h5").tensors if t.is_prunable)
        )
        blocks = (kernel == 0).reshape(16, 4, 2, 3).mean(axis=(1, 3))
        assert sorted(blocks.reshape(-1)) == [0.0] * 16 + [1.0] * 16

    def test_recurrent_layers_are_tfmots(self, tmp_path: Path) -> None:
        path = saved(recurrent(k), tmp_path / "m.h5", is_compiled=False)
        np.savez(tmp_path / "d.npz", x=RANDOM.normal(size=(40, 5, 4)).astype(np.float32), y=np.arange(40) % 2)
        found = tuned(path, tmp_path / "out.h5", tmp_path / "d.npz", sparsity=0.75)
        assert is_by_tfmot(found)
        assert found.kept == round(0.75 * 96) + round(0.75 * 144) + round(0.75 * 12)

    def test_weights_that_tie_are_dropped_to_the_count(self, data: Path, tmp_path: Path) -> None:
        model = convolutional(k)
        path = saved(model, tmp_path / "m.h5")
        for weight in model.weights:
            weight.assign(np.ones(weight.shape, np.float32))
        model.save(path)
        still = TrainOptions(optimizer="sgd:learning_rate=0.0", loss=LOSS)
        found = tuned(path, tmp_path / "out.h5", data, sparsity=0.5, means=still)
        assert is_by_tfmot(found)
        assert found.kept == sum(round(0.5 * size) for size in (72, 288 * 12))

    def test_an_odd_half_is_rounded_as_we_round(self, tmp_path: Path) -> None:
        path = saved(
            k.Sequential([k.layers.Input((3,)), k.layers.Dense(1, name="d")]), tmp_path / "m.h5", is_compiled=False
        )
        np.savez(tmp_path / "d.npz", x=np.ones((16, 3), np.float32), y=np.zeros((16, 1), np.float32))
        # tfmot keeps round(1.5) = 2 of three weights, and we drop as many.
        found = tuned(
            path, tmp_path / "out.h5", tmp_path / "d.npz", sparsity=0.5, means=TrainOptions(optimizer=SGD, loss="mse")
        )
        assert is_by_tfmot(found)
        assert found.kept == 2


class TestAFileWithWrappers:
    @pytest.mark.parametrize("suffix", [".h5", ""])
    def test_goes_on_with_its_own_schedule_in_pieces_to_the_sparsity_of_one_run(
        self, suffix: str, data: Path, tmp_path: Path
    ) -> None:
        path = saved(flat(k), tmp_path / f"m{suffix}")
        ramp = SparsitySchedule("polynomial", 0.0, 0, 20, 0.1, 5)
        middle, end = tmp_path / f"middle{suffix}", tmp_path / f"end{suffix}"
        prune_wrapped(path, Pruning(sparsity=0.75), ramp, LoadOptions(), Destination(tmp_path / f"w{suffix}"))
        first = tuned(tmp_path / f"w{suffix}", middle, data, epochs=1, keeps_wrappers=True)
        assert any("schedule ends at step 20, but training ended at step 10" in note for note in first.notes)
        held = read_saved_pruning(open_model(middle))
        assert held is not None
        assert held.step == 10
        assert first.masked == round(ramp_at(10) * 64 * 6)
        second = tuned(middle, end, data, epochs=2)
        assert is_by_tfmot(second)
        assert second.masked == second.kept == round(0.75 * 64 * 6)
        sparsities = [entry.sparsity for entry in (*first.history, *second.history)]
        assert sparsities == sorted(sparsities)

    def test_that_is_at_its_end_keeps_its_zeros_by_our_own_masks(self, data: Path, path: Path, tmp_path: Path) -> None:
        prune_wrapped(path, Pruning(sparsity=0.75), None, LoadOptions(), Destination(tmp_path / "w.h5"))
        found = tuned(tmp_path / "w.h5", tmp_path / "out.h5", data, keeps_wrappers=True)
        assert not is_by_tfmot(found)
        assert found.masked == found.kept == sum(round(0.75 * size) for size in (72, 288 * 12))
        assert {wrapper.layer for wrapper in open_model(tmp_path / "out.h5").about.wrappers} == {"conv", "hidden"}

    def test_made_by_tfmot_is_taken_where_its_constant_schedule_has_its_next_turn(
        self, data: Path, path: Path, tmp_path: Path
    ) -> None:
        schedule = tfmot.ConstantSparsity(0.5, 0, frequency=12)
        model = tfmot.prune_low_magnitude(k.models.load_model(path, compile=False), pruning_schedule=schedule)
        model.save(tmp_path / "theirs.h5", include_optimizer=False)
        found = tuned(tmp_path / "theirs.h5", tmp_path / "out.h5", data)
        assert is_by_tfmot(found)
        assert [entry.sparsity > 0.4 for entry in found.history] == [False, True, True]

    def test_follows_another_schedule_if_one_is_asked_for(self, data: Path, path: Path, tmp_path: Path) -> None:
        ramp = SparsitySchedule("polynomial", 0.0, 0, 20, 0.1, 4)
        prune_wrapped(path, Pruning(sparsity=0.75), ramp, LoadOptions(), Destination(tmp_path / "w.h5"))
        found = tuned(tmp_path / "w.h5", tmp_path / "out.h5", data, sparsity=0.5)
        assert found.kept == sum(round(0.5 * size) for size in (72, 288 * 12))

    def test_with_a_schedule_that_nobody_knows_keeps_its_zeros_and_says_so(
        self, data: Path, path: Path, tmp_path: Path
    ) -> None:
        model = k.models.load_model(path, compile=False)
        model = tfmot.prune_low_magnitude(model, pruning_schedule=Mine(0.5, 0))
        model.save(tmp_path / "theirs.h5", include_optimizer=False)
        found = tuned(tmp_path / "theirs.h5", tmp_path / "out.h5", data, epochs=1)
        assert any("schedule Mine is not known" in note for note in found.notes)
        assert not is_by_tfmot(found)


class Mine(tfmot.ConstantSparsity):  # type: ignore[misc, name-defined]
    pass


def ramp_at(step: int) -> float:
    return SparsitySchedule("polynomial", 0.75, 0, 20, 0.1, 5).sparsity_at(step)


def test_a_keras_network_stands_behind_it(path: Path) -> None:
    assert isinstance(load_trainable(open_model(path), LoadOptions()), KerasTrainable)


def test_the_command_tunes_a_wrapped_file_and_says_who_prunes(tmp_path: Path) -> None:
    wrapped = FIXTURES / "wrapped_by_tfmot.h5"
    words = ("--data", FIXTURES / "digits.npz", "--val-split", "20%", "--epochs", "3", "--logdir", tmp_path / "log")
    done = here("finetune", wrapped, "-o", tmp_path / "out.h5", *words, "--lr", "0.002")
    assert done.code == 0, done.err
    assert "tensorflow-model-optimization" in done.err
    row = done.rows[0]
    assert row.count("7790") == 2
    assert list((tmp_path / "log" / "metrics").iterdir()), "tfmot writes its summaries"
