"""Whole runs on files: how much goes, in what pattern, and that nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunectl.calibration.prune import prune
from prunectl.errors import PrunectlError
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import Pruned
from prunectl.pruning.request import PruneRequest
from tests.calibration import nets
from tests.calibration.runs import FILES, KERNELS, NETS, TORCH_NETS, data, digits, examples, kernels, numbers, saved
from tests.contract import Array, digest
from tests.pruning import stock
from tests.running import FIXTURES
from tests.training.torch import nets as torch_nets

STRATEGIES = ("activation-magnitude", "obs")
WAYS = [
    (file, strategy, is_repaired)
    for file in FILES
    for strategy in (*STRATEGIES, "magnitude", "snip")
    for is_repaired in (False, True)
    # What looks at no data, and what onnxruntime cannot do, are refused.
    if (strategy != "magnitude" or is_repaired) and (strategy != "snip" or file != "digits_cnn.onnx")
]


def zeros(array: Array) -> int:
    return int(np.count_nonzero(array == 0))


def suffix(file: str) -> str:
    return Path(file).suffix


Once = Callable[[str, str, bool], tuple[Pruned, Path]]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """The digits network with a strategy, repaired or not, pruned once."""

    @cache
    def run(file: str, strategy: str, is_repaired: bool) -> tuple[Pruned, Path]:
        out = tmp_path_factory.mktemp("once") / f"out{suffix(file)}"
        return digits(file, out, strategy=strategy, is_repaired=is_repaired, sparsity=0.37), out

    return run


@pytest.mark.parametrize(("file", "strategy", "is_repaired"), WAYS)
def test_so_many_weights_go_and_nothing_else_is_touched(
    file: str, strategy: str, is_repaired: bool, once: Once
) -> None:
    done, out = once(file, strategy, is_repaired)
    for name, kernel in kernels(out).items():
        assert zeros(kernel) == round(0.37 * kernel.size), name
    assert sum(tally.dropped for tally in done.counts.values()) == done.plan.drop
    before, after = numbers(FIXTURES / file), numbers(out)
    may_change = {name for name in before if "weight" in name or "kernel" in name}
    if is_repaired:
        may_change |= {name for name in before if "bias" in name}
    may_change -= {name for name in before if name.startswith("optimizer")}
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        assert np.isfinite(after[name]).all()
        if name not in may_change:
            assert after[name].tobytes() == array.tobytes(), name
        elif strategy != "obs" and not is_repaired:
            kept = after[name] != 0
            np.testing.assert_array_equal(after[name][kept], array[kept])


@pytest.mark.parametrize("file", FILES)
def test_what_was_written_is_what_the_framework_reads(file: str, once: Once) -> None:
    _, out = once(file, "obs", True)
    theirs, ours = stock.load(out), numbers(out)
    loaded = {array.tobytes() for array in theirs}
    for name, array in ours.items():
        assert name.startswith("optimizer") or array.tobytes() in loaded, name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("file", FILES)
def test_two_of_four_inputs_of_each_output_go(file: str, strategy: str, tmp_path: Path) -> None:
    out = tmp_path / f"out{suffix(file)}"
    digits(file, out, strategy=strategy, sparsity=None, pattern="2:4")
    for name, kernel in kernels(out).items():
        if name == "conv1":  # its single input channel makes no group of four
            assert zeros(kernel) == 0
            continue
        fours = np.moveaxis(kernel, 1, -1).reshape(-1, 4)
        assert ((fours == 0).sum(axis=1) == 2).all(), name


@pytest.mark.parametrize("strategy", [*STRATEGIES, "fisher"])
@pytest.mark.parametrize("file", ["digits_cnn.keras", "digits_cnn.pt"])
def test_whole_blocks_go(file: str, strategy: str, tmp_path: Path) -> None:
    out = tmp_path / f"out{suffix(file)}"
    digits(file, out, strategy=strategy, pattern="block:2x2")
    kernel = kernels(out)["fc1"]
    blocks = (kernel == 0).reshape(16, 2, 128, 2).sum(axis=(1, 3))
    assert set(np.unique(blocks)) == {0, 4}
    assert zeros(kernel) == kernel.size // 2


@pytest.mark.parametrize("strategy", [*STRATEGIES, "gradient"])
@pytest.mark.parametrize("file", ["digits_cnn.h5", "digits_cnn.pt"])
def test_over_all_layers_the_total_is_exact(file: str, strategy: str, tmp_path: Path) -> None:
    out = tmp_path / f"out{suffix(file)}"
    digits(file, out, strategy=strategy, scope="global", sparsity=0.618)
    found = kernels(out)
    assert found.keys() == set(KERNELS)
    assert sum(map(zeros, found.values())) == round(0.618 * sum(kernel.size for kernel in found.values()))
    assert len({zeros(kernel) / kernel.size for kernel in found.values()}) > 1


@pytest.mark.parametrize("strategy", [*STRATEGIES, "snip"])
@pytest.mark.parametrize("file", ["digits_cnn.keras", "digits_cnn.pt"])
def test_the_same_words_give_the_same_bytes_and_others_do_not(
    file: str, strategy: str, once: Once, tmp_path: Path
) -> None:
    is_repaired = strategy == "obs"
    outs = {"first": digest(once(file, strategy, is_repaired)[1])}
    wishes: dict[str, dict[str, Any]] = {"again": {}, "seed": {"seed": 3}, "samples": {"samples": 7}}
    for name, wish in wishes.items():
        out = tmp_path / f"{name}{suffix(file)}"
        digits(file, out, strategy=strategy, is_repaired=is_repaired, sparsity=0.37, **wish)
        outs[name] = digest(out)
    assert outs["first"] == outs["again"]
    assert len(set(outs.values())) == 3


def test_all_formats_of_one_network_lose_the_same_weights(tmp_path: Path) -> None:
    found = []
    for file in FILES:
        out = tmp_path / f"{suffix(file)[1:]}{suffix(file)}"
        # Nine weights have no half: which outputs lose one more depends on the layout.
        digits(file, out, strategy="activation-magnitude", exclude=("conv1*",))
        found.append(kernels(out))
    for name in KERNELS:
        for other in found[1:]:
            np.testing.assert_array_equal(found[0][name], other[name])


@pytest.mark.parametrize("strategy", [*STRATEGIES, "magnitude-gradient"])
@pytest.mark.parametrize("file", ["digits_cnn_torchscript.pt", "digits_cnn.pt2"])
def test_scripts_and_exported_programs_lose_what_their_module_loses(file: str, strategy: str, tmp_path: Path) -> None:
    wish = {"strategy": strategy, "sparsity": 0.6, "samples": 16}
    digits(file, tmp_path / file, **wish)
    digits("digits_cnn.pt", tmp_path / "module.pt", **wish)
    found, expected = kernels(tmp_path / file), kernels(tmp_path / "module.pt")
    assert found.keys() == set(KERNELS)
    for name, kernel in found.items():
        assert zeros(kernel) == round(0.6 * kernel.size)
        np.testing.assert_array_equal(kernel == 0, expected[name] == 0)
        # Inputs that are rounded in another way end the fit of a row a step earlier or later.
        np.testing.assert_allclose(kernel, expected[name], atol=1e-3 if strategy != "obs" else 0.02)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "snip"])
def test_a_saved_model_loses_so_many_of_each_kernel(strategy: str, tmp_path: Path) -> None:
    digits("digits_cnn_savedmodel", tmp_path / "out", strategy=strategy, samples=16)
    found = {
        name: array for name, array in numbers(tmp_path / "out").items() if "kernel" in name and "optim" not in name
    }
    assert len(found) == 4
    for kernel in found.values():
        assert zeros(kernel) == kernel.size // 2


def test_over_all_layers_what_costs_least_of_its_layers_outputs_goes(tmp_path: Path) -> None:
    """By hand, a weight costs what outputs change by once the weights after it are fitted anew."""
    torch.manual_seed(0)
    module, x = torch_nets.Plain(), examples(40, 12)
    with torch.no_grad():
        # Which unit a layer puts out its numbers in says nothing about what it can do without.
        module.two.weight *= 1e-3
        inside = torch.relu(module.one(torch.from_numpy(x))).numpy().astype("f8")
    path = saved(module, tmp_path / "m.pt")
    source = data(tmp_path / "x.npz", x=x)
    wish = PruneRequest(
        sparsity=0.5, strategy="obs", scope="global", data=source, samples=40, model=f"{TORCH_NETS}:Plain"
    )
    done = prune(path, wish, Destination(tmp_path / "out.pt"))
    costs = []
    for name, met in (("one.weight", x.astype("f8")), ("two.weight", inside)):
        weights = module.state_dict()[name].numpy().astype("f8")
        diagonal = np.square(met).sum(axis=0)
        damped = met.T @ met + 0.01 * diagonal.mean() * np.eye(len(diagonal))
        later = [1 / np.linalg.inv(damped[at:, at:])[0, 0] for at in range(len(damped))]
        costs.append(np.square(weights) * later / np.square(met @ weights.T).sum())
    lowest = np.argsort(np.concatenate([cost.reshape(-1) for cost in costs]))[: done.plan.drop]
    by_hand = {"one.weight": int((lowest < costs[0].size).sum()), "two.weight": int((lowest >= costs[0].size).sum())}
    assert by_hand == {cut.tensor.name: done.counts[cut.tensor.name].dropped for cut in done.plan.cuts}
    assert 0 < by_hand["two.weight"] < costs[1].size


def test_half_precision_stays_half(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch_nets.Plain().half()
    path, x = saved(module, tmp_path / "half.pt"), examples(30, 12)
    for strategy in STRATEGIES:
        out = tmp_path / f"{strategy}.pt"
        wish = PruneRequest(
            sparsity=0.5, strategy=strategy, data=data(tmp_path / "x.npz", x=x), model=f"{TORCH_NETS}:Plain"
        )
        prune(path, wish, Destination(out))
        found = torch.load(out, weights_only=True)
        for name, value in found.items():
            assert value.dtype == torch.float16
            assert torch.isfinite(value).all()
            if name.endswith("weight"):
                assert int((value == 0).sum()) == value.numel() // 2
            else:
                assert torch.equal(value, module.state_dict()[name])


def test_windows_of_every_kind_are_pruned_and_what_is_never_called_by_magnitude(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nets.Windows()
    path = saved(module, tmp_path / "m.pt")
    source = data(tmp_path / "x.npz", x=examples(24, 4, 8, 8))
    for strategy, is_repaired in (("activation-magnitude", False), ("obs", False), ("obs", True)):
        out = tmp_path / f"{strategy}-{is_repaired}.pt"
        wish = PruneRequest(
            sparsity=0.5, strategy=strategy, data=source, model=f"{NETS}:Windows", is_repaired=is_repaired
        )
        done = prune(path, wish, Destination(out))
        before, after = module.state_dict(), torch.load(out, weights_only=True)
        for name in ("first", "grouped", "up", "head", "idle"):
            assert int((after[f"{name}.weight"] == 0).sum()) == after[f"{name}.weight"].numel() // 2
        said = [note for note in done.notes if "cannot be captured" in note]
        assert len(said) == 1
        assert said[0].startswith("idle.weight: ")
        idle = before["idle.weight"].flatten()
        expected = idle.clone()
        expected[idle.abs().argsort()[:50]] = 0
        assert torch.equal(after["idle.weight"].flatten(), expected)
        assert torch.equal(before["idle.bias"], after["idle.bias"])
        is_as_it_was = torch.equal(before["norm.running_mean"], after["norm.running_mean"])
        assert is_as_it_was is not is_repaired


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_embedding_that_was_chosen_is_ranked_by_magnitude_and_this_is_said(strategy: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch_nets.Reader()
    path = saved(module, tmp_path / "m.pt")
    words = np.random.default_rng(0).integers(0, 20, (16, 5))
    wish = PruneRequest(
        sparsity=0.5,
        strategy=strategy,
        only="words*",
        data=data(tmp_path / "x.npz", x=words),
        model=f"{TORCH_NETS}:Reader",
    )
    done = prune(path, wish, Destination(tmp_path / "out.pt"))
    assert any(note.startswith("words.weight: ranked by magnitude") for note in done.notes)
    old = module.words.weight.detach().flatten()
    expected = old.clone()
    expected[old.abs().argsort()[: old.numel() // 2]] = 0
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True)["words.weight"].flatten(), expected)


@pytest.mark.parametrize("is_repaired", [False, True])
@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (f"{TORCH_NETS}:Reader", {"x": np.arange(80).reshape(16, 5) % 20}),
        (f"{TORCH_NETS}:Forked", {"x0": examples(16, 6), "x1": examples(16, 6, seed=1)}),
        (f"{NETS}:Attentive", {"x": examples(16, 5, 8)}),
    ],
    ids=["recurrent", "several inputs", "attention"],
)
def test_models_of_many_kinds_lose_so_many_weights(
    net: str, inputs: dict[str, Array], is_repaired: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    name = net.split(":")[1]
    path = saved((getattr(nets, name, None) or getattr(torch_nets, name))(), tmp_path / "m.pt")
    source = data(tmp_path / "x.npz", **inputs) + f"[{'+'.join(inputs)}]"
    for strategy in STRATEGIES:
        out = tmp_path / f"{strategy}.pt"
        wish = PruneRequest(
            sparsity=0.5,
            strategy=strategy,
            # A bare state dict does not say that it is an embedding.
            exclude=("words*",) if name == "Reader" else (),
            data=source,
            model=net,
            is_repaired=is_repaired,
        )
        done = prune(path, wish, Destination(out))
        assert not [note for note in done.notes if "cannot be captured" in note]
        found = numbers(out)
        for cut in done.plan.cuts:
            assert zeros(found[cut.tensor.name]) == cut.drop


def test_made_up_data_is_said_to_be_made_up(tmp_path: Path) -> None:
    done = digits("digits_cnn.keras", tmp_path / "out.keras", strategy="obs", data="random:64")
    assert any("the data is random" in note for note in done.notes)


def test_targets_are_needed_for_gradients_alone(tmp_path: Path) -> None:
    with np.load(FIXTURES / "digits.npz") as digits_file:
        source = data(tmp_path / "x.npz", x=digits_file["x"][:64]) + "?norm=/16"
    for strategy in (*STRATEGIES, "magnitude"):
        out, is_repaired = tmp_path / f"{strategy}.keras", strategy == "magnitude"
        digits("digits_cnn.keras", out, strategy=strategy, data=source, is_repaired=is_repaired)
    with pytest.raises(PrunectlError, match="targets") as refused:
        digits("digits_cnn.keras", tmp_path / "no.keras", strategy="snip", data=source)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "no.keras").exists()


def test_a_dry_run_writes_nothing_and_tells_the_same(tmp_path: Path) -> None:
    wish = PruneRequest(sparsity=0.5, strategy="obs", data=f"{FIXTURES / 'digits.npz'}?norm=/16", samples=32)
    dry = prune(FIXTURES / "digits_cnn.h5", wish, None)
    wet = prune(FIXTURES / "digits_cnn.h5", wish, Destination(tmp_path / "out.h5"))
    assert dry.counts == wet.counts
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]


def test_not_even_a_gradient_that_is_no_number_writes_anything(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = saved(nets.Gaps(), tmp_path / "m.pt")
    x = examples(16, 12)
    wish = PruneRequest(
        sparsity=0.5,
        strategy="fisher",
        data=data(tmp_path / "x.npz", x=x, y=x[:, :4].argmax(1)),
        model=f"{NETS}:Gaps",
    )
    with pytest.raises(PrunectlError, match=r"the gradient of .* is NaN or infinite") as failed:
        prune(path, wish, Destination(tmp_path / "out.pt"))
    assert failed.value.exit_code == 5
    assert not (tmp_path / "out.pt").exists()


def test_inputs_inside_the_model_that_are_no_numbers_write_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch_nets.Plain()
    with torch.no_grad():
        module.one.bias[0] = torch.inf
    path = saved(module, tmp_path / "m.pt")
    for strategy in STRATEGIES:
        wish = PruneRequest(
            sparsity=0.5,
            strategy=strategy,
            data=data(tmp_path / "x.npz", x=examples(16, 12)),
            model=f"{TORCH_NETS}:Plain",
        )
        with pytest.raises(PrunectlError, match=r"the inputs of .* are NaN or infinite") as failed:
            prune(path, wish, Destination(tmp_path / "out.pt"))
        assert failed.value.exit_code == 5
        assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("way", [{"strategy": "obs"}, {"is_repaired": True}, {"is_matched": True, "repair_steps": 2}])
def test_a_tensor_that_keeps_its_least_is_named_where_kept_weights_change_too(
    way: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = nets.Windows()
    with torch.no_grad():
        module.grouped.weight.mul_(1e-5)
    saved(module, tmp_path / "net.pt")
    request: Any = {"model": f"{NETS}:Windows", "data": data(tmp_path / "x.npz", x=examples(32, 4, 8, 8))}
    for scope in ("global", "layer"):
        wish = PruneRequest(sparsity=0.9, scope=scope, **request, **{"strategy": "magnitude", **way})
        done = prune(tmp_path / "net.pt", wish, Destination(tmp_path / f"{scope}.pt"))
        kept = {cut.tensor.name: cut.tensor.size - done.counts[cut.tensor.name].dropped for cut in done.plan.cuts}
        least = {name: int(0.01 * module.get_parameter(name).numel()) for name in kept}
        notes = [note for note in done.notes if "the minimum share of weights" in note]
        assert bool(notes) is any(kept[name] == least[name] for name in kept) is (scope == "global")
