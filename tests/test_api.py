"""The commands as functions of Python."""

from __future__ import annotations

import html
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

import prunectl
from prunectl import api
from prunectl.api import keywords
from prunectl.commands._requests import CHANNEL_LIMITS
from prunectl.commands.app import COMMANDS
from prunectl.errors import UsageError
from prunectl.exporting import request as export_request
from prunectl.pruning.request import OPTIONS
from prunectl.training import request as finetune_request
from tests.running import FIXTURES, here
from tests.running import prunectl as command


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, prunectl; sys.exit(bool({'numpy', 'typer', 'h5py', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_function_is_listed() -> None:
    assert set(api.__all__) <= set(dir(prunectl))
    assert all(inspect.getdoc(getattr(prunectl, name)) for name in api.__all__)
    # Every command but those that only talk to a shell; `eval` has a name that hides nothing of Python.
    talking = {"help", "plugins"}
    assert prunectl.eval is prunectl.evaluate
    assert {*api.__all__} == {"evaluate" if name == "eval" else name for name in COMMANDS} - talking
    with pytest.raises(AttributeError, match="no attribute 'bake'"):
        prunectl.bake  # noqa: B018 - asking for it is the test


def test_inspect_and_size_return_what_the_commands_print() -> None:
    path = FIXTURES / "digits_cnn.pt"
    found = prunectl.inspect(path, layers="conv*")
    assert [row.name for row in found.layers] == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    assert f"{prunectl.size(path).bytes.compressed}\n" == command("size", "-q", path).out


def test_an_old_keyword_is_taken_for_the_new_one_with_a_warning_on_the_line_of_the_script(tmp_path: Path) -> None:
    path, old, new = FIXTURES / "digits_cnn.onnx", tmp_path / "old.onnx", tmp_path / "new.onnx"
    options: Any = {"only": "conv*", "sparsity": 0.5}
    with pytest.warns(FutureWarning, match="only is now called layers") as told:
        prunectl.prune(path, old, **options)
    prunectl.prune(path, new, sparsity=0.5, layers="conv*")
    assert told[0].filename == __file__
    assert old.read_bytes() == new.read_bytes()


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"strategy": "obs", "sparsity": 0.5}, "the strategy obs needs data", "add data='train.npz'"),
        ({}, "no sparsity is given", "add sparsity='80%', compression=5 or target_gzip='400KB'"),
        (
            {"sparsity": 0.5, "strategy": "movement"},
            "the strategy movement needs training",
            "use it in: prunectl finetune --strategy movement",
        ),
        ({"sparsity": 0.5, "samples": 3}, "samples, batch_size and loss need data", "add data=SPEC, or leave them out"),
    ],
)
def test_an_error_speaks_of_keywords_and_its_hint_is_in_the_traceback(
    options: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        prunectl.prune(FIXTURES / "digits_cnn.pt", None, **options)
    assert (str(caught.value), caught.value.hint) == (message, hint)
    assert f"hint: {hint}" in caught.value.__notes__


def test_prune_writes_what_the_command_writes(tmp_path: Path) -> None:
    path = FIXTURES / "digits_cnn.onnx"
    found = prunectl.prune(path, tmp_path / "ours.onnx", sparsity=0.8, scope="global", exclude=["fc2"])
    words = ["--sparsity", "0.8", "--scope", "global", "--exclude", "fc2"]
    assert command("prune", path, "-o", tmp_path / "theirs.onnx", *words).code == 0
    assert (tmp_path / "ours.onnx").read_bytes() == (tmp_path / "theirs.onnx").read_bytes()
    assert sum(tally.dropped for tally in found.counts.values()) == found.plan.drop


def test_channels_are_cut_with_the_words_of_the_command_line(tmp_path: Path) -> None:
    path = FIXTURES / "digits_cnn.onnx"
    found = prunectl.prune(path, tmp_path / "ours.onnx", pattern="channel", target_flops="-50%", round_to=4)
    words = ["--pattern", "channel", "--target-flops", "-50%", "--round-to", "4"]
    assert command("prune", path, "-o", tmp_path / "theirs.onnx", *words).code == 0
    assert (tmp_path / "ours.onnx").read_bytes() == (tmp_path / "theirs.onnx").read_bytes()
    assert found.after.macs * 2 <= found.before.macs


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes((FIXTURES / "digits_cnn.onnx").read_bytes())
    assert prunectl.prune(path, None, sparsity=0.5).after.params.prunable_zero == 4868
    assert list(tmp_path.iterdir()) == [path]


def test_in_place_replaces_no_model_but_the_one_that_is_named_twice(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    dense = (FIXTURES / "digits_cnn.onnx").read_bytes()
    path.write_bytes(dense)
    for call, options in ((prunectl.prune, {"sparsity": 0.5}), (prunectl.strip, {})):
        with pytest.raises(UsageError, match=r"in_place replaces .*m\.onnx, but the output is .*other\.onnx"):
            call(path, tmp_path / "other.onnx", in_place=True, **options)  # type: ignore[operator]
    with pytest.raises(UsageError, match="in_place replaces"):
        prunectl.finetune(path, tmp_path / "other.onnx", in_place=True, data="digits.npz")
    assert path.read_bytes() == dense
    (tmp_path / "link.onnx").symlink_to(path)
    prunectl.prune(tmp_path / "link.onnx", path, in_place=True, sparsity=0.5)
    assert prunectl.inspect(path).params.prunable_zero == 4868


def test_the_keywords_are_the_options_that_requests_know() -> None:
    assert get_type_hints(keywords.FinetuneOptions).keys() == set(finetune_request.OPTIONS)
    assert get_type_hints(keywords.ExportOptions).keys() == set(export_request.OPTIONS)
    assert (
        get_type_hints(keywords.PruneOptions).keys() - get_type_hints(keywords.ChannelOptions).keys() == OPTIONS.keys()
    )
    assert get_type_hints(keywords.ChannelOptions).keys() == {*CHANNEL_LIMITS, "allow_empty"} - {"latency"}


def test_a_word_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="sparcity") as caught:
        prunectl.prune(FIXTURES / "digits_cnn.onnx", None, sparcity=0.5)
    assert caught.value.__notes__[0].startswith("did you mean: sparsity")
    for options, hint in (({"scope": "glob"}, "layer, global or erk"), ({"nan": "none"}, "zero, keep or error")):
        with pytest.raises(UsageError, match="is not a valid") as caught:
            prunectl.prune(FIXTURES / "digits_cnn.onnx", None, sparsity=0.5, **options)  # type: ignore[arg-type]
        assert hint in caught.value.hint
    with pytest.raises(UsageError, match=r"^fail_on='zeros' is not known"):
        prunectl.diff(FIXTURES / "digits_cnn.onnx", FIXTURES / "digits_cnn.onnx", fail_on="zeros")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--nan zero sets them to zero", "nan='zero' sets them to zero"),
        ("try --policy all or --layers '*'", "try policy='all' or layers='*'"),
        ("--loss and the targets", "loss and the targets"),
        ("or use --strategy obs, which needs", "or use strategy='obs', which needs"),
        ("add --loss module:function", "add loss='module:function'"),
        ("--scope needs a sparsity", "scope needs a sparsity"),
    ],
)
def test_a_choice_is_quoted_as_in_python_and_another_word_is_not(typed: str, expected: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(expected)}$"), keywords.as_keywords():
        raise UsageError(typed)


def test_finetune_takes_the_words_of_the_command_line(tmp_path: Path) -> None:
    words = {"data": f"{FIXTURES / 'digits.npz'}?limit=64", "sparsity": 0.5, "epochs": 1, "device": "cpu"}
    build = f"{FIXTURES / 'digits_torch.py'}:DigitsCNN"
    found = prunectl.finetune(FIXTURES / "digits_cnn.pt", tmp_path / "out.pt", builder=build, **words)
    assert found.kept == found.masked == 9736 // 2
    with pytest.raises(UsageError, match="no option sparsty") as caught:
        prunectl.finetune(FIXTURES / "digits_cnn.pt", tmp_path / "out.pt", sparsty=0.5)
    assert caught.value.did_you_mean[0] == "sparsity"


def test_values_may_be_written_as_on_the_command_line(tmp_path: Path) -> None:
    path, ours, typed = FIXTURES / "digits_cnn.onnx", tmp_path / "ours.onnx", tmp_path / "typed.onnx"
    prunectl.prune(path, ours, sparsity=0.8, layer=[("fc*", 0.5)], exclude=["conv1"])
    prunectl.prune(path, typed, sparsity="80%", layer={"fc*": "50%"}, exclude="conv1")
    assert ours.read_bytes() == typed.read_bytes()
    prunectl.prune(path, typed, sparsity=np.float32(0.8), layer=["fc*=50%"], exclude=("conv1",), force=True)
    assert ours.read_bytes() == typed.read_bytes()
    assert (
        prunectl.prune(path, None, target_gzip="20KB").sparsity
        == prunectl.prune(path, None, target_gzip=20000).sparsity
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": "80"}, UsageError, r"sparsity: '80' is not between 0 and 1"),
        ({"sparsity": [0.8]}, TypeError, r"sparsity must be a number or a string or None, not list"),
        ({"sparsity": True}, TypeError, r"sparsity must be a number"),
        ({"target_gzip": "4 miles"}, UsageError, r"target_gzip: '4 miles' is not a size"),
        ({"sparsity": 0.5, "exclude": 3}, TypeError, r"exclude must be a string or a list, not int: 3"),
        ({"layer": ["fc"]}, UsageError, r"layer: 'fc' is not a pattern and a ratio"),
        ({"layer": [0.5]}, TypeError, r"layer must be pairs"),
        ({"sparcity": 0.5}, UsageError, r"prune has no option sparcity"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_keyword(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prunectl.prune(FIXTURES / "digits_cnn.onnx", None, **options)


def test_a_path_that_is_none_is_refused_by_its_name() -> None:
    with pytest.raises(TypeError, match="model must be a string or a path, not int: 3"):
        prunectl.inspect(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="output must be a string or a path, not float"):
        prunectl.strip(FIXTURES / "digits_cnn.pt", 0.5)  # type: ignore[arg-type]


def test_two_models_are_compared_and_verified_as_by_the_commands(tmp_path: Path) -> None:
    path, sparse = FIXTURES / "digits_cnn.onnx", tmp_path / "sparse.onnx"
    prunectl.prune(path, sparse, sparsity="50%")
    changes = prunectl.diff(sparse, path, fail_on=["growth:0%", "shape"])
    assert changes.is_ok
    assert changes.to_dict()["changes"] == here("diff", sparse, path, "--json").json["changes"]
    assert not prunectl.diff(sparse, path, fail_on="changed").is_ok
    assert prunectl.verify(sparse, against=path).is_ok
    assert not prunectl.verify(path, against=sparse).is_ok
    with pytest.raises(UsageError, match="nothing to compare"):
        prunectl.verify(sparse)


def test_budgets_are_written_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_bytes((FIXTURES / "digits_cnn.onnx").read_bytes())
    written = prunectl.init(tmp_path, margin="20%")
    assert written.path == tmp_path / "prunectl.toml"
    monkeypatch.chdir(tmp_path)
    verdict = prunectl.check(update_baseline=True, reason="first")
    assert verdict.is_ok
    assert verdict.models == 1
    assert prunectl.check("m*").to_dict()["ok"]


def test_doctor_returns_what_is_installed() -> None:
    assert prunectl.doctor().to_dict()["extras"] == here("doctor", "--json").json["extras"]


def test_a_sweep_is_a_function(tmp_path: Path) -> None:
    data = f"{FIXTURES / 'digits.npz'}?norm=/16&limit=64"
    swept = prunectl.sweep(FIXTURES / "digits_cnn.onnx", tmp_path / "trials", data=data, sparsities=["50%", 0.8])
    assert sorted(trial.sparsity for trial in swept.outcomes) == [0.0, 0.5, 0.8]
    assert "2 trials" in repr(swept)
    assert "svg" in swept._repr_html_()


def test_a_file_is_evaluated_on_data(tmp_path: Path) -> None:
    with np.load(FIXTURES / "digits.npz") as arrays:
        x, y = (arrays[name] for name in arrays.files[:2])
    x, y = x[:64].astype(np.float32) / 16, y[:64]
    found = prunectl.evaluate(FIXTURES / "digits_cnn.onnx", data=(x, y), metric="accuracy")
    assert (
        found.value
        == prunectl.evaluate(FIXTURES / "digits_cnn.onnx", f"{FIXTURES / 'digits.npz'}?norm=/16&limit=64").value
    )
    assert found.value > 0.9
    assert found.to_dict()["logs"] == {"accuracy": found.value}


def test_results_show_themselves_in_ten_lines_and_as_the_page(tmp_path: Path) -> None:
    path = FIXTURES / "digits_cnn.onnx"
    results: list[Any] = [
        prunectl.inspect(path),
        prunectl.size(path),
        prunectl.prune(path, tmp_path / "a.onnx", sparsity="80%"),
        prunectl.prune(path, None, pattern="channel", sparsity=0.5),
        prunectl.strip(path, None),
        prunectl.export(FIXTURES / "digits_cnn.pt", tmp_path / "a.safetensors"),
        prunectl.diff(tmp_path / "a.onnx", path),
        prunectl.verify(tmp_path / "a.onnx", against=path),
        prunectl.doctor(),
    ]
    for result in results:
        assert len(repr(result).splitlines()) <= 10
        assert len(repr(result)) < 1000
        assert result.to_dict()["command"] == result.command
        page = html.unescape(result._repr_html_())
        assert "<!doctype html>" in page
        assert "<table" in page
    assert "39.9 kB -> 39.9 kB" in repr(results[2])
    assert "sparsity  0.0 % -> 80.0 %" in repr(results[2])
    assert "nothing was written" in repr(results[3])
    assert results[2].to_dict()["models"][0]["params"] == here("inspect", path, "--json").json["models"][0]["params"]


def test_prune_looks_at_data_as_the_command_does(tmp_path: Path) -> None:
    data = f"{FIXTURES / 'digits.npz'}?norm=/16"
    words = ["-s", "0.8", "--strategy", "activation-magnitude", "--samples", "64", "--data", data]
    done = command("prune", FIXTURES / "digits_cnn.onnx", "-o", tmp_path / "a.onnx", *words)
    assert done.code == 0, done.err
    said = {"sparsity": 0.8, "samples": 64, "data": data}
    model, target = FIXTURES / "digits_cnn.onnx", tmp_path / "b.onnx"
    prunectl.prune(model, target, strategy="activation-magnitude", **said)
    assert (tmp_path / "a.onnx").read_bytes() == target.read_bytes()
    assert any(
        "reconstructed from 64 examples" in note for note in prunectl.prune(model, None, repair=True, **said).notes
    )
