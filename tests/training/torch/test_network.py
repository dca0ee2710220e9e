"""PyTorch's part of finetune, held against PyTorch by hand."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from prunectl.errors import InputError, UntrustedError, UsageError, WorkError
from prunectl.formats.registry import open_model
from prunectl.training.backend import GradientStatistic, LoadOptions, TrainOptions
from prunectl.training.config import DivergedError
from prunectl.training.data.source import Batch
from prunectl.training.mask_schedule import MaskScheduler, PruningConfig
from prunectl.training.torch import losses, optimizers
from prunectl.training.torch.build import BuiltModule, build_module
from prunectl.training.torch.model import TorchTrainable, load_trainable
from prunectl.training.torch.optimizers import WeightMasks
from tests.running import FIXTURES
from tests.training.torch import nets

NETS = "tests.training.torch.nets"


def examples(count: int = 48, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 12)).astype("f4")
    return Batch(x, (x[:, :4].argmax(1)).astype("i8"))


def saved(module: torch.nn.Module, path: Path) -> Path:
    torch.save(module.state_dict(), path)
    return path


def opened(path: Path, model: str, example: Batch, **means: Any) -> TorchTrainable:
    network = load_trainable(open_model(path), LoadOptions(f"{NETS}:{model}"))
    assert isinstance(network, TorchTrainable)
    network.prepare(TrainOptions(example=example, device="cpu", **means))
    return network


@pytest.fixture
def plain(tmp_path: Path) -> tuple[nets.Plain, Path]:
    torch.manual_seed(1)
    module = nets.Plain()
    return module, saved(module, tmp_path / "plain.pt")


def test_a_module_may_keep_what_it_is_given_and_change_it(tmp_path: Path) -> None:
    path = saved(nets.Centred(), tmp_path / "centred.pt")
    before = path.read_bytes()
    module = build_module(open_model(path), LoadOptions(f"{NETS}:Centred")).module
    assert isinstance(module, nets.Centred)
    module.train()(torch.ones(2, 12))
    assert module.mean.tolist() == [1.0] * 12
    assert path.read_bytes() == before


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam:lr=0.01": lambda weights: torch.optim.Adam(weights, 0.01),
    "sgd:lr=0.1,momentum=0.9,nesterov=true": lambda weights: torch.optim.SGD(weights, 0.1, 0.9, nesterov=True),
    "adamw:lr=0.01,weight_decay=0.1,betas=(0.8,0.9)": lambda weights: torch.optim.AdamW(
        weights, 0.01, (0.8, 0.9), weight_decay=0.1
    ),
}


@pytest.mark.parametrize("words", OPTIMIZERS)
def test_without_masks_it_is_what_pytorch_does(words: str, plain: tuple[nets.Plain, Path]) -> None:
    module, path = plain
    network, optimizer = opened(path, "Plain", examples(), optimizer=words), OPTIMIZERS[words](module.parameters())
    for seed in range(5):
        batch = examples(16, seed)
        network.step(batch, 1.0)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(torch.from_numpy(batch.x)), torch.from_numpy(batch.y)).backward()
        optimizer.step()
    for name, value in network.tensors().items():
        assert np.array_equal(value, module.state_dict()[name].numpy()), name


@pytest.mark.parametrize("most_bytes", [0, 1 << 20], ids=["booleans", "bits"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_a_mask_drops_becomes_plus_zero_whatever_it_was(
    kind: torch.dtype, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "_MOST_BYTES", most_bytes)
    drawn = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    drawn[0, 0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -1])
    kept = torch.rand(drawn.shape) > 0.5
    kept[0, 0, 0, :4] = False
    weight = torch.nn.Parameter(drawn.to(kind))
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight] = {"momentum": drawn.to(kind), "single": drawn.clone(), "step": torch.ones(())}
    masks = WeightMasks()
    masks.hold({weight: kept}, optimizer)
    weight.grad = drawn.to(kind).contiguous()
    masks.zero_gradients()
    expected = torch.where(kept, drawn, torch.zeros(()))
    for zeroed in (weight, weight.grad, *list(optimizer.state[weight].values())[:2]):
        assert zeroed.double().numpy(force=True).tobytes() == expected.to(zeroed.dtype).double().numpy().tobytes()


def test_sparse_gradients_of_an_embedding_are_masked() -> None:
    module = torch.nn.Embedding(6, 3, sparse=True)
    kept = torch.rand(6, 3) > 0.5
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    masks = WeightMasks()
    masks.hold({module.weight: kept}, optimizer)
    module(torch.tensor([1, 4, 1, 5])).sum().backward()
    expected = torch.zeros(6, 3)
    expected[[1, 4, 5]] = torch.tensor([[2.0], [1], [1]])
    masks.zero_gradients()
    assert torch.equal(module.weight.grad.to_dense(), torch.where(kept, expected, 0))  # type: ignore[union-attr]
    optimizer.step()
    assert not module.weight[~kept].any()


@pytest.mark.parametrize(
    "words", [*OPTIMIZERS, "adam:weight_decay=0.1", "rmsprop:momentum=0.9", "sgd:lr=1,momentum=0.9"]
)
def test_zeros_stay_zero_through_momentum_and_decay(words: str, plain: tuple[nets.Plain, Path]) -> None:
    network = opened(plain[1], "Plain", examples(), optimizer=words)
    for seed in range(3):  # momentum that pushes
        network.step(examples(16, seed), 1.0)
    masks = {
        name: np.random.default_rng(3).random(one.shape) > 0.7
        for name, one in network.weights(["one.weight", "two.weight"]).items()
    }
    network.mask(masks)
    for seed in range(6):
        network.step(examples(16, seed), 1.0)
        for name, one in network.weights(masks).items():
            assert not one[~masks[name]].any()
            assert (one[masks[name]] != 0).all()
            assert not np.signbit(one[~masks[name]]).any()


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.float16, torch.float64])
def test_an_exported_program_declares_the_type_of_its_input(kind: torch.dtype, tmp_path: Path) -> None:
    module = torch.nn.Linear(5, 3, dtype=kind) if kind.is_floating_point else torch.nn.Embedding(5, 3)
    torch.export.save(torch.export.export(module, (torch.zeros(2, 5, dtype=kind),)), tmp_path / "typed.pt2")
    network = load_trainable(open_model(tmp_path / "typed.pt2"), LoadOptions())
    assert [port.dtype for port in network.signature.inputs] == [str(kind).removeprefix("torch.")]


class Weighted(torch.nn.Module):
    """A layer in single precision that takes inputs in another one, and a factor in a third."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.layer(x.float()) * factor.float()
        return answer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_an_exported_program_is_given_the_types_that_it_declares_whatever_its_parameters_are(
    kind: torch.dtype, precision: str, tmp_path: Path
) -> None:
    module = Weighted()
    size = torch.export.Dim("size")
    program = torch.export.export(
        module, (torch.zeros(2, 5, dtype=kind), torch.zeros(2, 1)), dynamic_shapes=({0: size}, {0: size})
    )
    torch.export.save(program, tmp_path / "mixed.pt2")
    x, factor = torch.rand(6, 5).to(kind), torch.rand(6, 1)
    batch = Batch((x.float().numpy(), factor.numpy()), np.arange(6) % 3)
    network = load_trainable(open_model(tmp_path / "mixed.pt2"), LoadOptions())
    network.prepare(TrainOptions(example=batch, loss="cross-entropy", precision=precision))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(module(x, factor), torch.from_numpy(batch.y))
    tolerance = 1e-6 if precision == "fp32" else 1e-2
    assert network.evaluate([batch])["loss"] == pytest.approx(float(expected), rel=tolerance)
    before = network.weights(["layer.weight"])["layer.weight"]
    network.step(batch, 1.0)
    assert not np.array_equal(network.weights(["layer.weight"])["layer.weight"], before)


@pytest.mark.parametrize("kind", [GradientStatistic.GRADIENT, GradientStatistic.SALIENCE, GradientStatistic.MOVEMENT])
def test_evidence_is_that_of_autograd_by_hand(kind: GradientStatistic, plain: tuple[nets.Plain, Path]) -> None:
    module, path = plain
    network = opened(path, "Plain", examples(), optimizer="sgd:lr=0.1")
    network.track_gradients(kind, ["one.weight"])
    optimizer, total = torch.optim.SGD(module.parameters(), 0.1), torch.zeros_like(module.one.weight)
    for seed in range(4):
        batch = examples(16, seed)
        network.step(batch, 1.0)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(torch.from_numpy(batch.x)), torch.from_numpy(batch.y)).backward()
        weight, gradient = module.one.weight.detach(), module.one.weight.grad
        assert gradient is not None
        total += {
            GradientStatistic.GRADIENT: gradient,
            GradientStatistic.SALIENCE: (weight * gradient).abs(),
            GradientStatistic.MOVEMENT: -weight * gradient,
        }[kind]
        optimizer.step()
    assert np.allclose(network.gradient_statistics()["one.weight"], total.numpy(), atol=1e-7)
    network.reset_gradient_statistics()
    assert not network.gradient_statistics()["one.weight"].any()


def test_the_gradient_of_what_is_masked_is_gathered_before_it_is_zeroed(plain: tuple[nets.Plain, Path]) -> None:
    network = opened(plain[1], "Plain", examples())
    network.mask({"one.weight": np.zeros((16, 12), bool)})
    network.track_gradients(GradientStatistic.GRADIENT, ["two.weight"])
    network.mask({"two.weight": np.zeros((4, 16), bool)})
    network.track_gradients(GradientStatistic.GRADIENT, ["two.weight"])
    network.step(examples(), 1.0)
    assert network.gradient_statistics()["two.weight"].any()


def test_a_share_of_the_learning_rate_is_that_share(plain: tuple[nets.Plain, Path]) -> None:
    before = opened(plain[1], "Plain", examples()).tensors()
    moved = []
    for rate in (1.0, 0.25):
        network = opened(plain[1], "Plain", examples(), optimizer="sgd:lr=0.1")
        network.step(examples(), rate)
        moved.append(network.tensors()["one.weight"] - before["one.weight"])
    assert np.allclose(moved[0] * 0.25, moved[1], atol=1e-7)


def test_clipping_sees_the_norm_of_what_is_kept_only(plain: tuple[nets.Plain, Path]) -> None:
    network = opened(plain[1], "Plain", examples(), optimizer="sgd:lr=1", clip=0.01)
    before = network.tensors()
    network.step(examples(), 1.0)
    after = network.tensors()
    norm = np.sqrt(sum(float(np.square(after[name] - before[name]).sum()) for name in before))
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_what_is_frozen_stays_bit_for_bit(tmp_path: Path) -> None:
    module = nets.Noisy()
    path = saved(module, tmp_path / "noisy.pt")
    random = np.random.default_rng(0)
    batch = Batch(random.normal(size=(16, 1, 8, 8)).astype("f4"), random.integers(0, 10, 16))
    frozen = frozenset({"conv.weight", "norm.weight"})
    network = opened(path, "Noisy", batch, frozen=frozen)
    before = network.tensors()
    for _ in range(3):
        network.step(batch, 1.0)
    after = network.tensors()
    for name in ("conv.weight", "norm.weight", "norm.running_mean", "norm.running_var"):
        assert np.array_equal(before[name], after[name]), name
    assert not np.array_equal(before["head.weight"], after["head.weight"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_keeps_zeros_and_single_weights(
    precision: str, plain: tuple[nets.Plain, Path]
) -> None:
    network = opened(plain[1], "Plain", examples(), precision=precision, lr=0.01)
    mask = np.random.default_rng(0).random((16, 12)) > 0.5
    network.mask({"one.weight": mask})
    first = network.evaluate([examples()])["loss"]
    for _ in range(30):
        network.step(examples(), 1.0)
    assert network.evaluate([examples()])["loss"] < 0.7 * first
    weight = network.tensors()["one.weight"]
    assert weight.dtype == np.float32
    assert not weight[~mask].any()


def test_recalibration_gives_the_statistics_of_the_data_and_changes_nothing_else(tmp_path: Path) -> None:
    path = saved(nets.Noisy(), tmp_path / "noisy.pt")
    random = np.random.default_rng(0)
    batches = [Batch(random.normal(3, 2, (32, 1, 8, 8)).astype("f4"), random.integers(0, 10, 32)) for _ in range(4)]
    network = opened(path, "Noisy", batches[0])
    before = network.tensors()
    assert network.recalibrate(iter(batches)) == 1
    after = network.tensors()
    conv = torch.nn.functional.conv2d(
        torch.from_numpy(np.concatenate([batch.x for batch in batches])),
        torch.from_numpy(before["conv.weight"]),
        torch.from_numpy(before["conv.bias"]),
    ).numpy()
    assert np.allclose(after["norm.running_mean"], conv.mean((0, 2, 3)), atol=1e-5)
    assert np.allclose(after["norm.running_var"], conv.var((0, 2, 3)), rtol=1e-2)
    statistics = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    assert all(np.array_equal(before[name], after[name]) for name in before if name not in statistics)


def test_evaluating_changes_nothing(tmp_path: Path) -> None:
    path = saved(nets.Noisy(), tmp_path / "noisy.pt")
    random = np.random.default_rng(0)
    batch = Batch(random.normal(size=(16, 1, 8, 8)).astype("f4"), random.integers(0, 10, 16))
    network = opened(path, "Noisy", batch)
    before = network.tensors()
    assert network.evaluate([batch]) == network.evaluate([batch])
    assert all(np.array_equal(one, network.tensors()[name]) for name, one in before.items())


def test_means_weigh_batches_by_their_examples(plain: tuple[nets.Plain, Path]) -> None:
    network = opened(plain[1], "Plain", examples())
    whole = examples(48)
    parts = [Batch(whole.x[:40], whole.y[:40]), Batch(whole.x[40:], whole.y[40:])]
    together, apart = network.evaluate([whole]), network.evaluate(parts)
    assert apart == pytest.approx(together, rel=1e-5)
    logits = plain[0](torch.from_numpy(whole.x)).detach()
    assert together["accuracy"] == pytest.approx(float((logits.argmax(1).numpy() == whole.y).mean()))


def test_going_on_from_what_was_saved_is_as_if_nothing_had_happened(tmp_path: Path) -> None:
    path = saved(nets.Noisy(), tmp_path / "noisy.pt")
    random = np.random.default_rng(0)
    batches = [Batch(random.normal(size=(16, 1, 8, 8)).astype("f4"), random.integers(0, 10, 16)) for _ in range(6)]
    unbroken = opened(path, "Noisy", batches[0], seed=3)
    unbroken.reseed(5)
    unbroken.track_gradients(GradientStatistic.MOVEMENT, ["head.weight"])
    for batch in batches[:3]:
        unbroken.step(batch, 1.0)
    unbroken.save(tmp_path)
    for batch in batches[3:]:
        unbroken.step(batch, 1.0)
    again = opened(path, "Noisy", batches[0], seed=3)
    again.track_gradients(GradientStatistic.MOVEMENT, ["head.weight"])
    again.restore(tmp_path)
    for batch in batches[3:]:
        again.step(batch, 1.0)
    assert all(np.array_equal(one, again.tensors()[name]) for name, one in unbroken.tensors().items())
    assert np.array_equal(unbroken.gradient_statistics()["head.weight"], again.gradient_statistics()["head.weight"])


def test_a_teacher_alone_is_learned_by_heart(plain: tuple[nets.Plain, Path]) -> None:
    torch.manual_seed(9)
    teacher = nets.Plain()
    network = opened(plain[1], "Plain", examples(), teacher_share=1.0, lr=0.02)
    batch = examples(64)
    with torch.no_grad():
        teacher_outputs = teacher(torch.from_numpy(batch.x)).numpy()
    for _ in range(300):
        network.step(batch, 1.0, teacher_outputs)
    agreed = (np.asarray(network.predict(batch.x)).argmax(1) == teacher_outputs.argmax(1)).mean()
    assert agreed > 0.95


def test_towards_its_own_answers_nothing_is_dropped_out_and_normalisations_take_the_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nets.Noisy()
    batch = Batch(np.random.default_rng(0).normal(size=(16, 1, 8, 8)).astype("f4"))
    network = opened(
        saved(module, tmp_path / "noisy.pt"), "Noisy", batch, loss="mse", teacher_share=1.0, is_matching=True
    )
    teacher_outputs = np.asarray(network.predict(batch.x))
    network.step(batch, 0.0, teacher_outputs)
    module.drop.eval()
    expected = (module(torch.from_numpy(batch.x)) - torch.from_numpy(teacher_outputs)).square().mean()
    assert network.logs()["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    np.testing.assert_allclose(network.tensors()["norm.running_mean"], module.norm.running_mean, rtol=1e-5, atol=1e-7)


def test_fused_steps_towards_its_own_answers_are_those_of_adam_but_for_rounding(plain: tuple[nets.Plain, Path]) -> None:
    module, path = plain
    network = opened(path, "Plain", examples(), loss="mse", teacher_share=1.0, lr=0.01, is_matching=True)
    optimizer, teacher_outputs = torch.optim.Adam(module.parameters(), 0.01), np.ones((16, 4), "f4")
    for seed in range(20):
        x = examples(16, seed).x
        network.step(Batch(x), 1.0, teacher_outputs)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(module(torch.from_numpy(x)), torch.from_numpy(teacher_outputs)).backward()
        optimizer.step()
    for name, value in network.tensors().items():
        np.testing.assert_allclose(value, module.state_dict()[name].numpy(), rtol=1e-4, atol=1e-6)


def test_a_training_step_of_ones_own_is_taken(plain: tuple[nets.Plain, Path]) -> None:
    module, path = plain
    network = opened(path, "Plain", examples(), custom_step=f"{NETS}:squared", optimizer="sgd:lr=0.1")
    optimizer, batch = torch.optim.SGD(module.parameters(), 0.1), examples()
    network.step(batch, 1.0)
    nets.squared(module, torch.from_numpy(batch.x), torch.from_numpy(batch.y)).backward()
    optimizer.step()
    assert all(np.array_equal(one, module.state_dict()[name].numpy()) for name, one in network.tensors().items())


def test_several_inputs_and_outputs_and_a_layer_used_twice(tmp_path: Path) -> None:
    path = saved(nets.Forked(), tmp_path / "forked.pt")
    random = np.random.default_rng(0)
    x = (random.normal(size=(32, 6)).astype("f4"), random.normal(size=(32, 6)).astype("f4"))
    batch = Batch(x, (random.integers(0, 3, 32), random.normal(size=(32, 1)).astype("f4")))
    network = opened(path, "Forked", batch, lr=0.01)
    assert [port.name for port in network.signature.inputs] == ["a", "b"]
    mask = random.random((6, 6)) > 0.5
    network.mask({"shared.weight": mask})
    first = network.evaluate([batch])["loss"]
    for _ in range(40):
        network.step(batch, 1.0)
    assert network.evaluate([batch])["loss"] < first
    assert not network.weights(["shared.weight"])["shared.weight"][~mask].any()


def test_recurrent_kernels_are_masked_like_any(tmp_path: Path) -> None:
    path = saved(nets.Reader(), tmp_path / "reader.pt")
    random = np.random.default_rng(0)
    batch = Batch(random.integers(0, 20, (16, 5)), random.integers(0, 3, 16))
    network = opened(path, "Reader", batch)
    assert network.signature.inputs[0].dtype == "int64"
    mask = random.random((48, 12)) > 0.8
    network.mask({"lstm.weight_hh_l0": mask})
    for _ in range(4):
        network.step(batch, 1.0)
    assert not network.weights(["lstm.weight_hh_l0"])["lstm.weight_hh_l0"][~mask].any()


@pytest.mark.parametrize(
    ("model", "y", "said"),
    [
        ("Plain", np.arange(48) % 4, "cross-entropy"),
        ("Shares", np.arange(48) % 4, "probabilities"),
        ("Plain", np.ones((48, 4), "f4") * 0.3, "mse"),
        ("Plain", np.eye(4, dtype="f4")[np.arange(48) % 4], "cross-entropy"),
        ("Plain", np.tile(np.array([1, 1, 0, 0], "f4"), (48, 1)), "bce"),
    ],
)
def test_the_loss_that_nobody_named_fits_the_outputs_and_is_told(
    model: str, y: Any, said: str, plain: tuple[nets.Plain, Path]
) -> None:
    network = opened(plain[1], model, Batch(examples().x, y))
    assert any(f"The loss is {said}" in note for note in network.notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"optimizer": "adm"}, "adm is not a known optimizer"),
        ({"optimizer": "sgd:momentm=0.9"}, "no setting momentm"),
        ({"optimizer": "sgd:momentum=-1"}, "does not accept these settings"),
        ({"loss": "cross-entropi"}, "not a known loss"),
        ({"metrics": ("acuracy",)}, "not a known metric"),
        ({"precision": "fp8"}, "is not known"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(words: Any, said: str, plain: tuple[nets.Plain, Path]) -> None:
    with pytest.raises(UsageError, match=said):
        opened(plain[1], "Plain", examples(), **words)


def test_inputs_that_do_not_fit_are_told_with_their_shape(plain: tuple[nets.Plain, Path]) -> None:
    with pytest.raises(UsageError, match="does not accept inputs of 4x9"):
        opened(plain[1], "Plain", Batch(np.zeros((4, 9), "f4"), np.zeros(4, "i8")))


def test_weights_alone_need_something_that_builds_the_model(plain: tuple[nets.Plain, Path]) -> None:
    with pytest.raises(UsageError, match="holds only weights, not the network that uses them"):
        load_trainable(open_model(plain[1]), LoadOptions())


def test_a_model_with_other_widths_is_told_by_tensor_and_shapes(plain: tuple[nets.Plain, Path]) -> None:
    with pytest.raises(UsageError, match=r"has no tensor words\.weight, which the model of .*nets:Reader needs"):
        load_trainable(open_model(plain[1]), LoadOptions(f"{NETS}:Reader"))


def test_a_whole_module_is_not_unpickled_without_trust(tmp_path: Path) -> None:
    with pytest.raises(UntrustedError):
        load_trainable(open_model(FIXTURES / "whole_module.pt"), LoadOptions())
    network = load_trainable(open_model(FIXTURES / "whole_module.pt"), LoadOptions(is_trusted=True))
    assert set(network.tensors()) == {"0.weight", "0.bias"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_whose_weights_were_frozen_is_refused(tmp_path: Path) -> None:
    script = torch.jit.freeze(torch.jit.script(nets.Plain().eval()))
    torch.jit.save(script, tmp_path / "frozen.pt")
    with pytest.raises((InputError, UsageError)):
        load_trainable(open_model(tmp_path / "frozen.pt"), LoadOptions())


def test_an_exported_program_for_one_example_takes_any_batch(tmp_path: Path) -> None:
    module = nets.Plain()
    torch.export.save(torch.export.export(module, (torch.zeros(3, 12),)), tmp_path / "plain.pt2")
    network = load_trainable(open_model(tmp_path / "plain.pt2"), LoadOptions())
    batch = examples(7)
    network.prepare(TrainOptions(example=batch, device="cpu"))
    wanted = module(torch.from_numpy(batch.x)).detach().numpy()
    assert np.allclose(np.asarray(network.predict(batch.x)), wanted, atol=1e-6)
    other = copy.deepcopy(module)
    optimizer = torch.optim.Adam(other.parameters())
    network.step(batch, 1.0)
    torch.nn.functional.cross_entropy(other(torch.from_numpy(batch.x)), torch.from_numpy(batch.y)).backward()
    optimizer.step()
    for name, value in network.tensors().items():
        assert np.allclose(value, other.state_dict()[name].numpy(), atol=1e-5), name


@pytest.mark.parametrize("kind", [GradientStatistic.GRADIENT, GradientStatistic.SALIENCE, GradientStatistic.MOVEMENT])
def test_gradients_of_half_precision_steps_that_overflow_are_no_evidence(
    kind: GradientStatistic, plain: tuple[nets.Plain, Path]
) -> None:
    batch = examples()
    network = opened(plain[1], "Plain", batch, precision="fp16", lr=0.01)
    network.track_gradients(kind, ["one.weight", "two.weight"])
    network._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = network.tensors()
    network.step(batch, 1.0)
    assert all(np.array_equal(one, before[name]) for name, one in network.tensors().items()), "the step was skipped"
    assert not any(one.any() for one in network.gradient_statistics().values())
    for _ in range(40):
        network.step(batch, 1.0)
    found = network.gradient_statistics()
    assert all(np.isfinite(one).all() and one.any() for one in found.values())


def test_evidence_that_is_not_finite_ends_the_run(
    plain: tuple[nets.Plain, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = opened(plain[1], "Plain", examples(), lr=0.01)
    network.track_gradients(GradientStatistic.MOVEMENT, ["one.weight"])
    keeper = MaskScheduler(
        cast(
            "PruningConfig",
            SimpleNamespace(names=("one.weight",), statistic=GradientStatistic.MOVEMENT, schedule=None, regrowth=None),
        )
    )
    network._statistics.sums["one.weight"][0, 0] = float("inf")
    monkeypatch.setattr(MaskScheduler, "_is_update", lambda *_: True)
    with pytest.raises(DivergedError, match=r"gradient of one\.weight"):
        keeper.maybe_update(network, 5)


def test_recalibration_weighs_a_smaller_last_batch_by_its_examples(tmp_path: Path) -> None:
    path = saved(nets.Noisy(), tmp_path / "noisy.pt")
    x = np.random.default_rng(0).normal(3, 2, (36, 1, 8, 8)).astype("f4")
    x[32:] += 5
    y = np.zeros(36, np.int64)
    network = opened(path, "Noisy", Batch(x, y))
    before = network.tensors()
    network.recalibrate([Batch(x[:32], y[:32]), Batch(x[32:], y[32:])])
    conv = torch.nn.functional.conv2d(
        torch.from_numpy(x), torch.from_numpy(before["conv.weight"]), torch.from_numpy(before["conv.bias"])
    )
    assert np.allclose(network.tensors()["norm.running_mean"], conv.numpy().mean((0, 2, 3)), atol=1e-4)


def drawn() -> tuple[float, float, float]:
    """A number of each generator that a user's code may use."""
    return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002 - the global one is meant


def test_python_and_numpy_go_on_from_what_was_saved_too(tmp_path: Path) -> None:
    network = opened(saved(nets.Plain(), tmp_path / "plain.pt"), "Plain", examples())
    network.reseed(3)
    first = drawn()
    network.save(tmp_path)
    expected = drawn()
    network.reseed(3)
    assert drawn() == first
    network.restore(tmp_path)
    assert drawn() == expected


def test_every_process_goes_on_with_its_own_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(nets.Noisy(), tmp_path / "noisy.pt")
    batch = Batch(np.ones((16, 1, 8, 8), "f4"), np.arange(16) % 10)
    torch.manual_seed(77)
    of_the_other = torch.get_rng_state()

    def gathered(_: Any, mine: Any) -> list[Any]:
        return [mine, {**mine, "cpu": of_the_other}]

    first = opened(path, "Noisy", batch)
    first._place = replace(first._place, ranks=2)
    monkeypatch.setattr("prunectl.training.torch.distributed.gather_objects", gathered)
    monkeypatch.setattr("prunectl.training.torch.distributed.barrier", lambda _: None)
    first.reseed(1)
    first.save(tmp_path)
    own = torch.get_rng_state()
    for rank, wanted in ((0, own), (1, of_the_other)):
        again = opened(path, "Noisy", batch)
        again._place = replace(again._place, rank=rank, ranks=2)
        again.restore(tmp_path)
        assert torch.equal(torch.get_rng_state(), wanted)
    with pytest.raises(UsageError, match="2 processes, but is resumed by 1"):
        opened(path, "Noisy", batch).restore(tmp_path)


def test_the_random_numbers_of_a_gpu_go_on_from_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, batch = saved(nets.Noisy(), tmp_path / "noisy.pt"), Batch(np.ones((4, 1, 8, 8), "f4"), np.arange(4))
    state = torch.arange(16, dtype=torch.uint8)
    found: list[tuple[torch.Tensor, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _device: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda one, device: found.append((one, device)))
    network = opened(path, "Noisy", batch)
    on_cpu, on_gpu = network._place, replace(network._place, device=torch.device("cuda", 1))
    network._place = on_gpu
    network.save(tmp_path)
    parts = torch.load(tmp_path / "torch.pt", weights_only=True)
    assert torch.equal(parts["random"][0]["cuda"], state)
    monkeypatch.setattr(torch, "load", lambda *_, **__: parts)
    network.restore(tmp_path)
    assert len(found) == 1
    assert torch.equal(found[0][0], state)
    assert found[0][1] == torch.device("cuda", 1)
    network._place = on_cpu
    network.restore(tmp_path)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "the device cpu ran out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the device cpu ran out of memory"),
        (RuntimeError("CUDA error: device-side assert triggered"), "cpu failed: CUDA error"),
        (
            torch.distributed.DistBackendError("NCCL error in: ..."),
            "a process lost contact with the others: NCCL error",
        ),
    ],
)
def test_a_device_that_fails_is_not_told_as_a_wrong_shape(
    error: RuntimeError, said: str, plain: tuple[nets.Plain, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = opened(plain[1], "Plain", examples())

    def failing(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(network._module, "forward", failing)
        with pytest.raises(WorkError, match=said) as caught:
            network.predict(examples().x)
    assert ("--batch-size" in caught.value.hint) == ("ran out of memory" in said)
    monkeypatch.setattr(torch.Tensor, "backward", failing)
    with pytest.raises(WorkError, match=said):
        network.step(examples(), 1.0)


class Ended(torch.nn.Module):
    """A matrix, and some activation after it."""

    def __init__(self, last: Callable[[torch.Tensor], torch.Tensor], classes: int = 4) -> None:
        super().__init__()
        self.two = torch.nn.Linear(12, classes)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.two(x))


def network_of(module: torch.nn.Module, example: Batch, **means: Any) -> TorchTrainable:
    network = TorchTrainable(BuiltModule(module, {name: name for name in module.state_dict()}))
    network.prepare(TrainOptions(example=example, device="cpu", **means))
    return network


def one_hot_relu(out: torch.Tensor) -> torch.Tensor:
    """Numbers that look like probabilities on every batch, and come of a ReLU."""
    return torch.relu(out * 0 + torch.nn.functional.one_hot(out.argmax(1), 4))


@pytest.mark.parametrize(
    ("last", "loss"),
    [
        (lambda out: out, "cross-entropy"),
        (lambda out: torch.softmax(out, 1), "probabilities"),
        (lambda out: torch.log_softmax(out, 1).reshape(-1, 4), "nll"),
        (one_hot_relu, "cross-entropy"),
        (lambda out: out.exp() / out.exp().sum(1, keepdim=True), "probabilities"),
    ],
    ids=["logits", "softmax", "log-softmax", "relu that looks like softmax", "softmax by hand"],
)
def test_the_loss_goes_by_the_last_activation_before_it_goes_by_numbers(last: Any, loss: str) -> None:
    network = network_of(Ended(last), examples())
    assert network.notes[0].startswith(f"The loss is {loss}, inferred from the targets and")


def test_a_model_that_is_surely_wrong_still_has_a_gradient() -> None:
    out = torch.tensor([[1.0, 0.0]], requires_grad=True)
    losses.LOSSES["probabilities"](out, torch.tensor([1])).backward()
    assert out.grad is not None
    assert torch.isfinite(out.grad).all()
    assert out.grad[0, 1] < 0


@pytest.mark.parametrize("last", ["logits", "softmax"])
def test_kl_compares_probabilities_whatever_the_model_ends_in(last: str) -> None:
    y = np.random.default_rng(0).dirichlet(np.ones(4), 16).astype("f4")
    x = np.random.default_rng(1).normal(size=(16, 12)).astype("f4")
    module = Ended((lambda out: torch.softmax(out, 1)) if last == "softmax" else (lambda out: out))
    network = network_of(module, Batch(x, y), loss="kl")
    shares = torch.softmax(module.two(torch.from_numpy(x)), 1).detach().numpy().astype("f8")
    assert network.evaluate([Batch(x, y)])["loss"] == pytest.approx((y * np.log(y / shares)).sum(1).mean(), rel=1e-4)


@pytest.mark.parametrize("signs", [(0, 1), (-1, 1)])
def test_hinge_takes_targets_of_zero_and_one_for_signs(signs: tuple[int, int]) -> None:
    y = np.array(signs, "f4")[np.arange(16) % 2][:, None]
    x = np.random.default_rng(1).normal(size=(16, 12)).astype("f4")
    module = Ended(lambda out: out, 1)
    out = module.two(torch.from_numpy(x)).detach().numpy()
    expected = np.maximum(0, 1 - out * np.where(y > 0, 1, -1)).mean()
    assert network_of(module, Batch(x, y), loss="hinge").evaluate([Batch(x, y)])["loss"] == pytest.approx(expected)


def test_that_metrics_judge_the_first_output_alone_is_said(tmp_path: Path) -> None:
    a, b = (np.ones((8, 6), "f4"),) * 2
    batch = Batch((a, b), (np.zeros(8, np.int64), np.ones((8, 1), "f4")))
    network = opened(saved(nets.Forked(), tmp_path / "forked.pt"), "Forked", batch)
    assert "The metrics use only the first of the model's 2 outputs." in network.notes


def test_a_teacher_alone_needs_no_targets(plain: tuple[nets.Plain, Path]) -> None:
    batch = Batch(examples().x)
    network = opened(plain[1], "Plain", batch, teacher_share=1.0, optimizer="sgd", lr=0.1)
    teacher_outputs = np.zeros((48, 4), "f4")
    before = network.logs()
    network.step(batch, 1.0, teacher_outputs)
    first = network.logs()["loss"]
    for _ in range(20):
        network.step(batch, 1.0, teacher_outputs)
    assert before == {}
    assert network.logs()["loss"] < first
    with pytest.raises(UsageError, match="the data has no targets"):
        network.step(batch, 1.0)


def test_means_are_added_up_without_double_precision_where_a_device_has_none() -> None:
    on_mps = cast("torch.Tensor", SimpleNamespace(device=SimpleNamespace(type="mps"), float=lambda: "single"))
    assert losses._double(on_mps) == "single"
    assert losses._double(torch.ones(())).dtype == torch.float64


def test_a_run_of_an_older_version_is_said_to_be_one(tmp_path: Path) -> None:
    network = opened(saved(nets.Plain(), tmp_path / "plain.pt"), "Plain", examples())
    network.save(tmp_path)
    parts = torch.load(tmp_path / "torch.pt", weights_only=True)
    torch.save({**parts, "random": torch.get_rng_state()}, tmp_path / "torch.pt")
    with pytest.raises(InputError, match="was written by another version") as caught:
        network.restore(tmp_path)
    assert "another folder" in caught.value.hint


@pytest.mark.parametrize(
    ("builder", "layout"),
    [
        ("Pooled", torch.channels_last),
        ("pooled_by_view_in_training", torch.contiguous_format),
        ("pooled_by_view", torch.contiguous_format),
        ("pooled_by_strided_kernel", torch.contiguous_format),
    ],
)
def test_images_lie_channels_last_where_the_network_runs_so_and_it_learns_the_same(
    builder: str, layout: torch.memory_format, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    module: torch.nn.Module = getattr(nets, builder)().train()
    random = np.random.default_rng(4)
    batches = [Batch(random.normal(size=(6, 3, 8, 8)).astype("f4"), random.integers(0, 4, 6)) for _ in range(4)]
    network = opened(saved(module, tmp_path / "m.pt"), builder, batches[0], optimizer="sgd:lr=0.05")
    for name, value in network.tensors().items():
        # Trying how it runs leaves no trace, in the statistics of normalisations least of all.
        assert np.array_equal(value, module.state_dict()[name].numpy()), name
    weight = network._module.get_parameter("first.weight")
    assert weight.is_contiguous(memory_format=layout)
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    for batch in batches:
        network.step(batch, 1.0)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(torch.from_numpy(batch.x)), torch.from_numpy(batch.y)).backward()
        optimizer.step()
    for name, value in network.tensors().items():
        np.testing.assert_allclose(value, module.state_dict()[name].numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(batches[0].x)).numpy()
    np.testing.assert_allclose(network.predict(batches[0].x), expected, rtol=1e-4, atol=1e-5)
