"""Strategies and policies that somebody else wrote: installed, in a module, in a file."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from prunectl.errors import PrunectlError, UsageError, WorkError
from prunectl.formats.registry import open_model
from prunectl.plugins import attribute
from prunectl.pruning.schedules import SparsitySchedule
from prunectl.pruning.strategies import bind_params
from tests.pruning import reference
from tests.pruning.reference import arrays, prune
from tests.running import FIXTURES, ROOT, Outcome, here

DIGITS = FIXTURES / "digits_cnn.pt"
EXAMPLE = ROOT / "examples" / "prunectl-entropy"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What Python must find the example under."""
    target = tmp_path_factory.mktemp("installed")
    words = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target), str(EXAMPLE)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *words], check=True)
    return f"{ROOT}:{target}"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example", EXAMPLE / "prunectl_entropy" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_example(installed: str, *words: str | Path) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "prunectl", "prune", DIGITS, *words],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": installed, "PATH": ""},
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def kernels() -> dict[str, Any]:
    return {tensor.name: arrays(DIGITS)[tensor.name] for tensor in open_model(DIGITS).tensors if tensor.is_prunable}


def test_an_installed_strategy_goes_by_its_name(installed: str, example: ModuleType, tmp_path: Path) -> None:
    words = ("-s", "0.6", "--strategy", "entropy", "--param", "power=2")
    done = with_example(installed, "-o", tmp_path / "out.pt", *words)
    assert done.code == 0, done.err
    after = arrays(tmp_path / "out.pt")
    for name, kernel in kernels().items():
        mark = reference.lowest(example.entropy(kernel, power=2.0), round(0.6 * kernel.size))
        np.testing.assert_array_equal(after[name], np.where(mark, 0, kernel))


def test_a_strategy_may_look_at_the_whole_model(installed: str, example: ModuleType, tmp_path: Path) -> None:
    words = ("-s", "0.6", "--strategy", "relative", "--scope", "global")
    done = with_example(installed, "-o", tmp_path / "out.pt", *words)
    assert done.code == 0, done.err
    after, before = arrays(tmp_path / "out.pt"), kernels()
    scores = np.concatenate([example.relative(before)[name].ravel().astype(np.float64) for name in before])
    mark = reference.lowest(scores, round(0.6 * scores.size))
    found = np.concatenate([after[name].ravel() for name in before])
    np.testing.assert_array_equal(found == 0, mark)


def test_an_installed_policy_says_why_it_leaves_out(installed: str, tmp_path: Path) -> None:
    done = with_example(installed, "-o", tmp_path / "out.pt", "-s", "0.6", "--policy", "wide")
    assert done.code == 0, done.err
    assert [row[0] for row in done.rows] == ["conv2.weight", "fc1.weight", "fc2.weight"]
    assert "1 tensor (not wide)" in done.err


def test_a_slip_in_an_installed_name_finds_it(installed: str, tmp_path: Path) -> None:
    done = with_example(installed, "-o", tmp_path / "out.pt", "-s", "0.6", "--strategy", "entropie", "--json")
    assert done.code == 2
    assert done.json["error"]["did_you_mean"] == ["entropy"]


def plug(folder: Path, text: str) -> str:
    (folder / "mine.py").write_text("import numpy as np\n" + text)
    return str(folder / "mine.py")


def test_a_function_in_a_file_is_named_by_the_file(tmp_path: Path) -> None:
    where = plug(tmp_path, "def first(w):\n    return np.arange(w.size).reshape(w.shape)\n")
    _, written = prune(DIGITS, tmp_path / "out", sparsity=0.5, strategy=f"{where}:first")
    for name, kernel in kernels().items():
        flat = arrays(written)[name].ravel()
        assert not flat[: round(0.5 * kernel.size)].any()
        np.testing.assert_array_equal(flat[round(0.5 * kernel.size) :], kernel.ravel()[round(0.5 * kernel.size) :])


def test_a_function_in_a_module_is_named_by_the_module(tmp_path: Path) -> None:
    words = ("-s", "0.5", "--strategy", "tests.pruning.reference:magnitudes")
    assert here("prune", DIGITS, "-o", tmp_path / "a.pt", *words).code == 0
    assert here("prune", DIGITS, "-o", tmp_path / "b.pt", "-s", "0.5", "--scope", "layer").code == 0
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_elementwise_scores_are_taken_piece_by_piece_to_the_same_end(tmp_path: Path) -> None:
    where = plug(tmp_path, "def a(w):\n    return abs(w)\n\ndef b(w):\n    return abs(w)\n\na.is_elementwise = True\n")
    results = [
        prune(DIGITS, tmp_path / name, sparsity=0.5, scope="global", strategy=f"{where}:{name}")[1].read_bytes()
        for name in "ab"
    ]
    assert results[0] == results[1]


def test_a_tensor_that_a_whole_model_strategy_leaves_alone_is_said(tmp_path: Path) -> None:
    text = "def some(all):\n    return {n: None if n.startswith('conv') else abs(w) for n, w in all.items()}\n\n"
    where = plug(tmp_path, text + "some.prunectl_scope = 'model'\n")
    for scope in ("layer", "global"):
        found, written = prune(DIGITS, tmp_path / scope, sparsity=0.5, scope=scope, strategy=f"{where}:some")
        assert [cut.tensor.name for cut in found.plan.cuts] == ["fc1.weight", "fc2.weight"]
        left = {skip.name for skip in found.plan.skips if skip.reason.startswith("not scored by ")}
        assert left == {"conv1.weight", "conv2.weight"}
        np.testing.assert_array_equal(arrays(written)["conv1.weight"], kernels()["conv1.weight"])


def test_scores_of_a_whole_model_fit_patterns_and_targets(tmp_path: Path) -> None:
    where = plug(
        tmp_path, "def s(all):\n    return {n: abs(w) for n, w in all.items()}\n\ns.prunectl_scope = 'model'\n"
    )
    for number, words in enumerate(({"pattern": "2:4"}, {"target_gzip": 25_000}, {"compression": 2.0})):
        _, theirs = prune(DIGITS, tmp_path / f"a{number}", strategy=f"{where}:s", **words)
        _, ours = prune(DIGITS, tmp_path / f"b{number}", **words)
        assert theirs.read_bytes() == ours.read_bytes()


@pytest.mark.parametrize(
    ("text", "says", "code"),
    [
        ("def s(w):\n    return w\n", "a negative score", 5),
        ("def s(w):\n    return abs(w).ravel()[1:]\n", "scores of shape", 5),
        ("def s(w):\n    return None\n", "scores of shape", 5),
        ("def s(w):\n    return np.full(w.shape, 'a')\n", "that are not numbers", 5),
        ("def s(w):\n    return w * np.nan\n", "s returned scores for conv1.weight that are NaN or infinite", 5),
        ("def s(w):\n    return 1 / 0\n", "ZeroDivisionError", 5),
        ("def s(w):\n    raise MemoryError\n", "MemoryError", 5),
        ("def s(w):\n    w[...] = 0\n    return abs(w)\n", "ValueError", 5),
        ("s = 3\n", "not a function", 2),
        ("def t(w):\n    return abs(w)\n", "has no s", 2),
        ("def s(w, power):\n    return abs(w)\n", "needs the parameter power", 2),
        ("def s(all):\n    return abs\n\ns.prunectl_scope = 'model'\n", "dictionary", 5),
        ("def s(all):\n    return {'x': 1}\n\ns.prunectl_scope = 'model'\n", "dictionary", 5),
        ("def s(all):\n    return {}\n\ns.prunectl_scope = 'model'\n", "scores no tensor of", 2),
        ("def s(:\n", "SyntaxError", 2),
        ("import nothing_of_this_name\n", "nothing_of_this_name", 2),
        ("1 / 0\n", "ZeroDivisionError", 2),
    ],
)
def test_a_broken_plug_in_is_told_in_a_sentence(text: str, says: str, code: int, tmp_path: Path) -> None:
    where = plug(tmp_path, text)
    with pytest.raises(PrunectlError) as caught:
        prune(DIGITS, tmp_path / "out", sparsity=0.5, strategy=f"{where}:s")
    assert caught.value.exit_code == code
    assert says in caught.value.message
    assert not (tmp_path / "out" / "digits_cnn.pt").exists()


@pytest.mark.parametrize("score", ["inf", "nan"])
@pytest.mark.parametrize(("policy", "kept"), [("keep", [[1, 0, 0, 4]]), ("zero", [[0, 0, 3, 4]])])
def test_weights_whose_scores_are_not_finite_are_kept_or_pruned_as_asked(
    score: str, policy: str, kept: list[list[int]], tmp_path: Path
) -> None:
    where = plug(tmp_path, f"def s(w):\n    return np.array([[np.{score}, 2, 3, 4]])\n")
    path = tmp_path / "m.safetensors"
    save_file({"weight": np.array([[1, 2, 3, 4]], "f4")}, path)
    asked: dict[str, Any] = {"sparsity": 0.5, "strategy": f"{where}:s"}
    with pytest.raises(WorkError) as caught:
        prune(path, tmp_path / "out", **asked)
    assert f"--nan {policy}" in caught.value.hint
    _, written = prune(path, tmp_path / "out", nan=policy, **asked)
    np.testing.assert_array_equal(arrays(written)["weight"], kept)


def test_a_schedule_of_another_signature_is_refused_with_the_right_one(tmp_path: Path) -> None:
    where = plug(tmp_path, "def s(step):\n    return 0.5\n")
    with pytest.raises(UsageError, match="cannot be called with three numbers: too many positional") as caught:
        SparsitySchedule(f"{where}:s", 0.8, end=10)
    assert "(done, initial, final)" in caught.value.hint


@pytest.mark.parametrize("name", ["./nowhere.py:s", "no.such.module:s", "numpy:absolut", "numpy.nothing:s"])
def test_a_plug_in_that_is_not_there_is_a_slip(name: str, tmp_path: Path) -> None:
    done = here("prune", DIGITS, "-o", tmp_path / "out.pt", "-s", "0.5", "--strategy", name)
    assert done.code == 2
    assert done.err.startswith("error: ")


def test_a_policy_in_a_file_is_a_function_of_a_tensor(tmp_path: Path) -> None:
    where = plug(
        tmp_path, "def p(tensor):\n    return None if tensor.layer == 'fc1' and tensor.is_prunable else 'mine'\n"
    )
    found, _ = prune(DIGITS, tmp_path / "out", sparsity=0.5, policy=f"{where}:p")
    assert [cut.tensor.name for cut in found.plan.cuts] == ["fc1.weight"]
    assert {skip.reason for skip in found.plan.skips} == {"mine"}


def signature(
    weights: Any, power: float = 1.0, steps: int = 2, name: str = "x", *, fast: bool = False, any_: Any = None
) -> None:
    """A strategy with parameters of every type."""


def test_parameters_come_in_the_types_of_the_signature() -> None:
    words = ("power=2", "steps=3", "name=4", "fast=true", "any_=[1, 2]")
    assert bind_params(words, signature) == {"power": 2.0, "steps": 3, "name": "4", "fast": True, "any_": [1, 2]}
    assert isinstance(bind_params(("power=2",), signature)["power"], float)


@pytest.mark.parametrize("word", ["steps=1.5", "power=x", "fast=1", "powr=2", "power"])
def test_parameters_that_do_not_fit_are_refused(word: str) -> None:
    with pytest.raises(PrunectlError) as caught:
        bind_params((word,), signature)
    assert caught.value.exit_code == 2


def test_built_in_strategies_take_only_their_own_parameters(tmp_path: Path) -> None:
    done = here("prune", DIGITS, "-o", tmp_path / "out.pt", "-s", "0.5", "--param", "power=2")
    assert done.code == 2
    assert "the strategy magnitude takes no --param" in done.err


def test_a_strategy_that_watches_training_is_sent_to_finetune(tmp_path: Path) -> None:
    done = here("prune", FIXTURES / "digits_cnn.h5", "-o", tmp_path / "x.h5", "-s", "0.5", "--strategy", "movement")
    assert done.code == 2
    assert "prunectl finetune --strategy movement" in done.err
    assert not list(tmp_path.iterdir())


def test_a_file_is_executed_once_for_all_that_is_asked_of_it(tmp_path: Path) -> None:
    noting = "with open(__file__ + '.log', 'a') as log:\n    log.write('x')\n\n"
    where = plug(tmp_path, f"{noting}def s(w):\n    return abs(w)\n\ndef p(tensor):\n    return None\n")
    for name in "ab":
        prune(DIGITS, tmp_path / name, sparsity=0.5, strategy=f"{where}:s", policy=f"{where}:p")
    assert Path(f"{where}.log").read_text() == "x"


def test_a_file_that_has_changed_is_executed_again(tmp_path: Path) -> None:
    first = attribute(plug(tmp_path, "n = 1\n"), "n")
    assert (first, attribute(plug(tmp_path, "n = 22\n"), "n")) == (1, 22)


def test_a_file_that_failed_is_executed_again(tmp_path: Path) -> None:
    where = plug(tmp_path, "import os\n\nif not os.path.exists(__file__ + '.ready'):\n    raise OSError\n\nn = 1\n")
    with pytest.raises(PrunectlError, match="cannot be imported"):
        attribute(where, "n")
    Path(f"{where}.ready").touch()
    assert attribute(where, "n") == 1


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path: Path) -> None:
    text = "import dataclasses\n\n@dataclasses.dataclass\nclass Thing:\n    pass\n"
    made = []
    for name in "ab":
        (tmp_path / name).mkdir()
        thing: Any = attribute(plug(tmp_path / name, text), "Thing")
        made.append(thing())
    assert made[0] != made[1]
    assert [type(pickle.loads(pickle.dumps(one))) for one in made] == [type(one) for one in made]


def test_a_file_imports_what_lies_beside_it_at_once_and_later(tmp_path: Path) -> None:
    (tmp_path / "beside_at_once.py").write_text("def scores(w):\n    return abs(w)\n")
    (tmp_path / "beside_later.py").write_text("factor = 2\n")
    text = "from beside_at_once import scores\n\ndef s(w):\n    import beside_later\n    return beside_later.factor * "
    done = here(
        *("prune", DIGITS, "-o", tmp_path / "out.pt", "-s", "0.5"),
        *("--strategy", f"{plug(tmp_path, f'{text}scores(w)')}:s"),
    )
    assert done.code == 0, done.err
    assert here("prune", DIGITS, "-o", tmp_path / "plain.pt", "-s", "0.5", "--scope", "layer").code == 0
    assert (tmp_path / "out.pt").read_bytes() == (tmp_path / "plain.pt").read_bytes()


def test_what_lies_beside_a_file_hides_nothing_that_prunectl_imports_later(tmp_path: Path) -> None:
    before = sys.path.copy()
    attribute(plug(tmp_path, "n = 1\n"), "n")
    assert sys.path in (before, [*before, str(tmp_path)])
