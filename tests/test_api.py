"""The commands as functions of Python."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import prunectl
from prunectl import api
from prunectl.commands._requests import CHANNEL_LIMITS
from prunectl.errors import UsageError
from prunectl.exporting import request as export_request
from prunectl.pruning.request import OPTIONS
from prunectl.training import quiet
from prunectl.training import request as finetune_request
from tests.running import FIXTURES
from tests.running import prunectl as command


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, prunectl; sys.exit(bool({'numpy', 'typer', 'h5py', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_function_is_listed() -> None:
    assert {"export", "finetune", "inspect", "prune", "size", "strip"} <= set(dir(prunectl))
    with pytest.raises(AttributeError, match="no attribute 'bake'"):
        prunectl.bake  # noqa: B018 - asking for it is the test


def test_inspect_and_size_return_what_the_commands_print() -> None:
    path = FIXTURES / "digits_cnn.pt"
    found = prunectl.inspect(path, layers="conv*")
    assert [row.name for row in found.layers] == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    assert f"{prunectl.size(path).bytes.compressed}\n" == command("size", "-q", path).out


def test_prune_writes_what_the_command_writes(tmp_path: Path) -> None:
    path = FIXTURES / "digits_cnn.onnx"
    found = prunectl.prune(path, tmp_path / "ours.onnx", sparsity=0.8, scope="global", exclude=["fc2"])
    words = ["--sparsity", "0.8", "--scope", "global", "--exclude", "fc2"]
    assert command("prune", path, "-o", tmp_path / "theirs.onnx", *words).code == 0
    assert (tmp_path / "ours.onnx").read_bytes() == (tmp_path / "theirs.onnx").read_bytes()
    assert sum(tally.dropped for tally in found.tallies.values()) == found.plan.drop


def test_channels_are_cut_with_the_words_of_the_command_line(tmp_path: Path) -> None:
    path = FIXTURES / "digits_cnn.onnx"
    found = prunectl.prune(path, tmp_path / "ours.onnx", pattern="channel", flops="-50%", round_to=4)
    words = ["--pattern", "channel", "--flops", "-50%", "--round-to", "4"]
    assert command("prune", path, "-o", tmp_path / "theirs.onnx", *words).code == 0
    assert (tmp_path / "ours.onnx").read_bytes() == (tmp_path / "theirs.onnx").read_bytes()
    assert found.after.macs * 2 <= found.before.macs


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes((FIXTURES / "digits_cnn.onnx").read_bytes())
    assert prunectl.prune(path, None, sparsity=0.5).after.params.prunable_zero == 4868
    assert list(tmp_path.iterdir()) == [path]


def test_the_keywords_are_the_options_that_requests_know() -> None:
    assert get_type_hints(api.FinetuneOptions).keys() == set(finetune_request.OPTIONS)
    assert get_type_hints(api.ExportOptions).keys() == set(export_request.OPTIONS)
    assert get_type_hints(api.PruneOptions).keys() - get_type_hints(api.ChannelOptions).keys() == OPTIONS.keys()
    assert get_type_hints(api.ChannelOptions).keys() == {*CHANNEL_LIMITS, "allow_empty"} - {"latency"}


def test_a_word_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="sparcity"):
        prunectl.prune(FIXTURES / "digits_cnn.onnx", None, sparcity=0.5)


def test_finetune_takes_the_words_of_the_command_line(tmp_path: Path) -> None:
    words = {"data": f"{FIXTURES / 'digits.npz'}?limit=64", "sparsity": 0.5, "epochs": 1, "device": "cpu"}
    build = f"{FIXTURES / 'digits_torch.py'}:DigitsCNN"
    found = prunectl.finetune(FIXTURES / "digits_cnn.pt", tmp_path / "out.pt", model=build, **words)
    assert found.kept == found.masked == 9736 // 2
    with pytest.raises(UsageError, match="no choice sparsty") as caught:
        prunectl.finetune(FIXTURES / "digits_cnn.pt", tmp_path / "out.pt", sparsty=0.5)
    assert caught.value.did_you_mean[0] == "sparsity"


def test_prune_looks_at_data_as_the_command_does(tmp_path: Path) -> None:
    data = f"{FIXTURES / 'digits.npz'}?norm=/16"
    words = ["-s", "0.8", "--strategy", "activation-magnitude", "--samples", "64", "--data", data]
    done = command("prune", FIXTURES / "digits_cnn.onnx", "-o", tmp_path / "a.onnx", *words)
    assert done.code == 0, done.err
    said = {"sparsity": 0.8, "samples": 64, "data": data}
    model, target = FIXTURES / "digits_cnn.onnx", tmp_path / "b.onnx"
    prunectl.prune(model, target, strategy="activation-magnitude", **said)
    assert (tmp_path / "a.onnx").read_bytes() == target.read_bytes()
    assert any("anew to 64 examples" in note for note in prunectl.prune(model, None, repair=True, **said).notes)


def test_a_host_program_gets_its_log_levels_and_environment_back(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("tensorflow")
    level = logger.level
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    try:
        logger.setLevel(logging.INFO)
        with quiet.host_settings():
            quiet.raise_log_levels()
            assert logger.level == logging.ERROR
            assert os.environ["GRPC_VERBOSITY"] == "ERROR"
        assert logger.level == logging.INFO
        assert "GRPC_VERBOSITY" not in os.environ
    finally:
        logger.setLevel(level)
    assert all(hasattr(function, "__wrapped__") for function in (prunectl.prune, prunectl.finetune, prunectl.export))
