"""`prunectl prune --data`, as a user types it: what it does, and what it refuses in which words."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from prunectl.errors import UsageError
from prunectl.training.torch.build import BuiltModule
from tests.calibration.runs import DIGITS, KERNELS, data, kernels, numbers, saved
from tests.contract import digest
from tests.running import FIXTURES, here
from tests.training.torch import nets

KERAS, TORCH, ONNX = (FIXTURES / f"digits_cnn.{suffix}" for suffix in ("keras", "pt", "onnx"))
BUILD = ("--builder", f"{FIXTURES / 'digits_torch.py'}:DigitsCNN")
SEEN = ("--data", DIGITS, "--samples", "32")


@pytest.mark.parametrize(
    "words",
    [
        ("--pattern", "2:4", "--strategy", "obs", "--param", "damp=0.05", "--param", "blocksize=7", "--repair"),
        ("-s", "0.8", "--strategy", "fisher", "--scope", "global", "--loss", "cross-entropy", "--seed", "4", "--pack"),
    ],
    ids=" ".join,
)
def test_a_manifest_replays_to_the_same_bytes(words: tuple[str, ...], tmp_path: Path) -> None:
    first, second, kept = tmp_path / "first.pt", tmp_path / "second.pt", tmp_path / "run.json"
    done = here("prune", TORCH, "-o", first, *SEEN, *BUILD, *words, "--manifest", kept)
    assert done.code == 0, done.err
    again = here("prune", TORCH, "-o", second, "--recipe", kept, "--trust", "--manifest", tmp_path / "again.json")
    assert again.code == 0, again.err
    assert digest(first) == digest(second)
    assert kept.read_text() == (tmp_path / "again.json").read_text()


@pytest.mark.parametrize("model", [ONNX], ids=lambda path: path.suffix[1:])
def test_the_report_counts_what_is_in_the_file(model: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out{model.suffix}"
    done = here("prune", model, "-o", out, *SEEN, "-s", "75%", "--strategy", "obs", "--repair")
    assert done.code == 0, done.err
    found = kernels(out)
    assert found.keys() == set(KERNELS)
    rows = {row[0].replace("/", ".").split(".")[0]: int(row[3]) for row in done.rows if len(row) > 3}
    for name, kernel in found.items():
        assert np.count_nonzero(kernel == 0) == round(0.75 * kernel.size) == rows[name]


def test_made_up_data_is_called_made_up(tmp_path: Path) -> None:
    words = ("-s", "0.5", "--strategy", "activation-magnitude", "--data", "random:64")
    done = here("prune", ONNX, "-o", tmp_path / "out.onnx", *words)
    assert done.code == 0
    assert "the data is random" in done.err


REFUSED: dict[str, tuple[Path, tuple[str, ...], str]] = {
    "a strategy that looks at data, without any": (KERAS, ("--strategy", "obs"), "needs data"),
    "repairs without data": (KERAS, ("--repair",), "--repair needs data"),
    "data for what looks at none": (KERAS, SEEN, "magnitude uses no data"),
    "gradients of what onnxruntime runs": (ONNX, (*SEEN, "--strategy", "snip"), "onnxruntime cannot compute"),
    "a file with wrappers": (
        FIXTURES / "wrapped_by_tfmot.h5",
        (*SEEN, "--strategy", "activation-magnitude"),
        "prunectl strip",
    ),
    "negative damping": (KERAS, (*SEEN, "--strategy", "obs", "--param", "damp=-1"), "a number above zero, not '-1'"),
    "no damping": (KERAS, (*SEEN, "--strategy", "obs", "--param", "damp=0"), "a number above zero"),
    "a block size in letters": (KERAS, (*SEEN, "--strategy", "obs", "--param", "blocksize=x"), "not 'x'"),
    "half a column": (KERAS, (*SEEN, "--strategy", "obs", "--param", "blocksize=1.5"), "not '1.5'"),
    "a norm that there is not": (
        KERAS,
        (*SEEN, "--strategy", "activation-magnitude", "--param", "norm=3"),
        "'3' is not a norm",
    ),
    "a parameter that there is not": (KERAS, (*SEEN, "--strategy", "obs", "--param", "dampp=1"), "did you mean"),
    "no examples": (KERAS, ("--data", DIGITS, "--samples", "0", "--strategy", "obs"), "--samples"),
    "needs training": (KERAS, (*SEEN, "--strategy", "movement"), "prunectl finetune --strategy movement"),
    "weights alone": (TORCH, (*SEEN, "--strategy", "obs"), "--builder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    model, words, expected = REFUSED[case]
    out = tmp_path / f"out{model.suffix}"
    done = here("prune", model, "-o", out, "-s", "0.5", *words)
    assert done.code == 2, done.err
    assert expected in " ".join(done.err.split())
    assert done.out == ""
    assert not out.exists()


@pytest.mark.parametrize("strategy", ["obs", "activation-magnitude", "snip"])
def test_what_looks_at_a_model_that_stands_still_is_no_way_to_train(strategy: str, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    words = ("--data", DIGITS, *BUILD, "--epochs", "1", "-s", "0.5", "--strategy", strategy)
    done = here("finetune", TORCH, "-o", out, *words)
    assert done.code == 2
    assert f"prunectl prune --strategy {strategy} --data" in done.err
    assert not out.exists()


def test_gradients_need_targets(tmp_path: Path) -> None:
    with np.load(FIXTURES / "digits.npz") as digits:
        source = data(tmp_path / "x.npz", x=digits["x"][:32])
    out = tmp_path / "out.keras"
    done = here("prune", KERAS, "-o", out, "-s", "0.5", "--strategy", "snip", "--data", f"{source}?norm=/16")
    assert done.code == 2
    assert "has no targets, which the strategy snip needs" in " ".join(done.err.split())
    assert not out.exists()


@pytest.mark.parametrize("model", [KERAS, TORCH, ONNX], ids=lambda path: path.suffix[1:])
def test_inputs_of_the_wrong_shape_are_refused_with_both_shapes(model: Path, tmp_path: Path) -> None:
    source, out = data(tmp_path / "x.npz", x=np.zeros((8, 5, 7, 3), "f4")), tmp_path / f"out{model.suffix}"
    build = BUILD if model == TORCH else ()
    done = here("prune", model, "-o", out, "-s", "0.5", "--strategy", "obs", "--data", source, *build)
    assert done.code == 2, done.err
    assert "5x7x3" in done.err or "3x5x7" in done.err
    said = " ".join(done.err.split())
    assert "8x8x1" in said or "1x8x8" in said or "expected input" in said or "1x?x?" in said, said
    assert not out.exists()


@pytest.mark.parametrize(("strategy", "wrong"), [("obs", np.nan), ("activation-magnitude", np.inf), ("fisher", np.nan)])
def test_data_that_is_no_number_is_refused(strategy: str, wrong: float, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((16, 12)).astype("f4")
    x[5, 3] = wrong
    source = data(tmp_path / "x.npz", x=x, y=np.arange(16) % 4)
    path, out = saved(nets.Plain(), tmp_path / "m.pt"), tmp_path / "out.pt"
    words = ("--strategy", strategy, "--data", source, "--builder", "tests.training.torch.nets:Plain")
    done = here("prune", path, "-o", out, "-s", "0.5", *words)
    assert done.code in {3, 5}, done.err
    assert "NaN or infinit" in done.err
    assert not out.exists()


def test_several_inputs_are_given_by_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nets.Forked()
    random = np.random.default_rng(0)
    source = data(tmp_path / "x.npz", a=random.random((20, 6), "f4"), b=random.random((20, 6), "f4"))
    path, out = saved(module, tmp_path / "m.pt"), tmp_path / "out.pt"
    words = ("--strategy", "obs", "--data", f"{source}[a+b]", "--builder", "tests.training.torch.nets:Forked")
    done = here("prune", path, "-o", out, "-s", "0.5", *words)
    assert done.code == 0, done.err
    for name, array in numbers(out).items():
        if name.endswith("weight"):
            assert np.count_nonzero(array == 0) == array.size // 2


def test_the_only_way_to_the_same_output_is_to_say_so(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    words = ("prune", ONNX, "-o", out, "-s", "0.5", "--strategy", "obs", *SEEN)
    assert here(*words).code == 0
    before = digest(out)
    assert here(*words[:-1], "16").code == 2
    assert digest(out) == before
    assert here(*words[:-1], "16", "--force").code == 0
    assert digest(out) != before


def small_network() -> torch.nn.Module:
    return torch.nn.Linear(3, 8)


def two_networks(folder: Path, other: str) -> tuple[str, ...]:
    """Save a network beside another one, and return the options to prune half of it."""
    torch.manual_seed(0)
    states = {prefix: small_network().state_dict() for prefix in ("model", other)}
    tensors = {f"{prefix}.{name}": value for prefix, state in states.items() for name, value in state.items()}
    torch.save(tensors, folder / "m.pt")
    np.savez(folder / "d.npz", x=torch.randn(40, 3).numpy(), y=np.arange(40) % 8)
    return ("-s", "50%", "--data", "d.npz", "--builder", f"{__name__}:small_network", "-o", "out.pt")


COPY = ("--exclude 'ema.*'", "prunectl strip m.pt --keep raw -o raw.pt")
OTHER = ("--exclude 'my critic [[]1].*'",)


@pytest.mark.parametrize(
    ("other", "hints", "words"),
    [
        ("ema", COPY, ("prune", "--strategy", "obs")),
        ("ema", COPY, ("prune", "--strategy", "activation-magnitude")),
        ("ema", COPY, ("prune", "--repair", "outputs")),
        ("ema", COPY, ("finetune", "--epochs", "1")),
        ("my critic [1]", OTHER, ("prune", "--strategy", "magnitude-gradient")),
        ("my critic [1]", OTHER, ("finetune", "--epochs", "1")),
    ],
)
def test_weights_that_no_data_goes_through_are_refused_with_a_way_to_leave_them_out(
    other: str, hints: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    more = two_networks(tmp_path, other)
    refused = here(words[0], "m.pt", *words[1:], *more, cwd=tmp_path)
    assert refused.code == 2, refused.err
    assert f"{other}.weight is not part of the network that the data goes through" in refused.err
    assert all(hint in refused.err for hint in hints)
    exclude = shlex.split(hints[0])
    done = here(words[0], "m.pt", *words[1:], *more, *exclude, cwd=tmp_path)
    assert done.code == 0, done.err
    held = torch.load(tmp_path / "out.pt", weights_only=True)
    assert [int((held[f"{name}.weight"] == 0).sum()) for name in ("model", other)] == [12, 0]


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (("--strategy", "obs"), "ranked by magnitude and not reconstructed"),
        (("--strategy", "activation-magnitude"), "ranked by magnitude"),
        (("--repair", "outputs"), "pruned but not matched, because no data goes through them"),
    ],
)
def test_a_second_network_is_pruned_by_magnitude_with_a_note(words: tuple[str, ...], note: str, tmp_path: Path) -> None:
    done = here("prune", "m.pt", *words, "--scope", "layer", *two_networks(tmp_path, "critic"), cwd=tmp_path)
    assert done.code == 0, done.err
    assert f"critic.weight: {note}" in done.err
    held, given = (torch.load(tmp_path / name, weights_only=True) for name in ("out.pt", "m.pt"))
    assert int((held["model.weight"] == 0).sum()) == 12
    weights = given["critic.weight"]
    is_small = weights.abs() <= weights.abs().flatten().kthvalue(12).values
    torch.testing.assert_close(held["critic.weight"], weights.masked_fill(is_small, 0), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "selector"), [("net.critic.fc.weight", "'net.critic.*'"), ("aux", "aux"), ("net.w", "net.w")]
)
def test_a_hint_leaves_out_as_much_as_possible_but_nothing_of_the_network_itself(name: str, selector: str) -> None:
    built = BuiltModule(small_network(), {"net.actor.weight": "weight", "net.actor.bias": "bias"})
    with pytest.raises(UsageError) as caught:
        built.inside(name)
    assert caught.value.hint == f"leave it out: --exclude {selector}"
