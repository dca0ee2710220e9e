"""What there is a way to, and what is said where there is none."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prunectl.errors import SCRATCH, MissingExtraError, UntrustedError, UsageError
from prunectl.exporting import routes
from prunectl.exporting.export import export as run
from prunectl.exporting.export import naming_original
from prunectl.exporting.request import parse_request
from prunectl.exporting.routes import ROUTES, TARGETS, target_of
from prunectl.formats.registry import FORMATS
from prunectl.pruning.destination import Destination
from tests.exporting.exporting import NET, export
from tests.running import FIXTURES, ROOT, here


def test_every_pair_is_of_formats_that_there_are_and_names_things_that_exist() -> None:
    for pair in ROUTES:
        assert set(pair.sources) <= {row.name for row in FORMATS}
        assert pair.target in {target.name for target in TARGETS}
        for reference in filter(None, (pair.writer, pair.opener, pair.runner)):
            module, _, name = reference.partition(":")
            assert f"\ndef {name}(" in (Path(routes.__file__).parent / f"{module}.py").read_text()


def test_the_table_loads_no_converter() -> None:
    code = (
        "import sys, prunectl.exporting.export;"
        "converters = {'keras', 'onnx', 'tensorflow', 'torch', 'torch_code'};"
        "sys.exit(any(f'prunectl.exporting.{name}' in sys.modules for name in converters))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("source", "output", "message", "hint"),
    [
        (
            "digits_cnn.pt",
            "m.tflite",
            "cannot export PyTorch to TensorFlow Lite",
            "TensorFlow Lite can be exported from Keras archive, Keras HDF5",
        ),
        ("digits_cnn.tflite", "m.onnx", "cannot export TensorFlow Lite to ONNX", "safetensors, npz"),
        ("digits_cnn.onnx", "m.keras", "cannot export ONNX to Keras archive", "onnx, safetensors, npz"),
        ("digits_cnn.h5", "m.h5", "already has the format Keras HDF5", "prunectl strip"),
        ("digits_cnn.pt", "m.pt", "already has the format PyTorch state dict", "prunectl strip"),
        ("digits_cnn.h5", "m.foo", "is not that of a format", "add to=FORMAT: onnx, "),
    ],
)
def test_what_cannot_be_is_told_with_what_can(
    source: str, output: str, message: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        export(source, tmp_path / output)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("output", "words", "option"),
    [
        ("w.npz", {"data": "x.npz"}, "data"),
        ("w.npz", {"builder": NET}, "builder"),
        ("w.npz", {"seed": 3}, "seed"),
        ("m.keras", {"half": True}, "half"),
        ("m.tflite", {"opset": 18}, "opset"),
        ("m.tflite", {"pack": True}, "pack"),
        ("m.tflite", {"metadata": ["a=b"]}, "metadata"),
        ("w.safetensors", {"int8": True}, "int8"),
        ("m.h5", {"sparse": True}, "sparse"),
    ],
)
def test_an_option_that_does_not_fit_is_named(
    output: str, words: dict[str, object], option: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"^{option} cannot be used with"):
        export("digits_cnn.keras", tmp_path / output, **words)


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for words, message in (
        ({"half": True, "int8": True}, "cannot be used together"),
        ({"atol": -1.0}, "^atol cannot be negative, but is -1"),
        ({"opset": 5}, "opset 5 is older"),
        ({"to": "onxx"}, "cannot write the format --to onxx"),
        ({"metadata": ["a"]}, "is not KEY=VALUE"),
        ({"inputs": 3}, "export has no option inputs"),
        ({"card": tmp_path / "m.onnx"}, "name the same file"),
    ):
        with pytest.raises(UsageError, match=message):
            export("digits_cnn.keras", tmp_path / "m.onnx", **words)


def test_suffixes_and_names_mean_the_same() -> None:
    for target in TARGETS:
        assert target_of("", Path(f"m{target.suffix}")) is target
        assert target_of(target.name, Path("anything.at.all")) is target


def test_an_output_that_exists_is_kept_unless_force_is_said(tmp_path: Path) -> None:
    place = tmp_path / "w.npz"
    place.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        export("digits_cnn.pt", place)
    assert place.read_text() == "mine"
    export("digits_cnn.pt", place, force=True)
    assert place.read_bytes()[:2] == b"PK"


def test_the_input_is_not_replaced(tmp_path: Path) -> None:
    place = tmp_path / "m.onnx"
    place.write_bytes((FIXTURES / "digits_cnn.onnx").read_bytes())
    with pytest.raises(UsageError, match="is part of the input"):
        export(place, place, force=True)


def test_a_package_that_is_missing_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, *more: object) -> object:
        if name == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *more)

    monkeypatch.setattr("prunectl.formats.safe_json.importlib.import_module", without)
    with pytest.raises(MissingExtraError, match="onnxruntime is not installed") as caught:
        export("digits_cnn.onnx", tmp_path / "m.onnx")
    assert caught.value.exit_code == 4
    assert caught.value.hint.endswith("pip install onnxruntime")


def test_code_in_a_file_does_not_run_unless_it_is_trusted(tmp_path: Path) -> None:
    with pytest.raises(UntrustedError, match="whole Python module"):
        export("whole_module.pt", tmp_path / "m.onnx", input=["?,4"])


def test_weights_alone_ask_for_what_builds_the_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds only weights") as caught:
        export("digits_cnn.pt", tmp_path / "m.onnx", input=["?,1,8,8"])
    assert "builder=" in caught.value.hint


def test_the_command_reports_as_json_and_writes_a_card(tmp_path: Path) -> None:
    model = FIXTURES / "digits_cnn.onnx"
    found = here("export", model, "-o", tmp_path / "w.npz", "--json", "--card", tmp_path / "card.md")
    assert found.code == 0
    assert found.err == ""
    assert found.json["command"] == "export"
    assert found.json["parity"] == {"kind": "bits", "equal": True}
    assert [one["format"] for one in found.json["models"]] == ["onnx", "npz"]
    assert found.json["artifacts"] == [{"path": str(tmp_path / "w.npz"), "bytes": (tmp_path / "w.npz").stat().st_size}]
    card = (tmp_path / "card.md").read_text()
    assert found.json["models"][1]["sha256"] in card
    assert "identical, bit for bit" in card


def test_what_goes_wrong_with_a_copy_is_told_of_the_file_that_the_user_knows() -> None:
    with (
        pytest.raises(UsageError, match=r"^mine\.h5 is odd$") as caught,
        naming_original(Path("mine.h5"), Path("/copy/of.h5")),
    ):
        raise UsageError("/copy/of.h5 is odd", hint="prunectl strip /copy/of.h5")
    assert caught.value.hint == "prunectl strip mine.h5"


def test_options_that_leave_fewer_bits_exclude_each_other_and_two_files_need_a_name(tmp_path: Path) -> None:
    for words, message in (
        ({"half": True, "bf16": True}, "^half and bf16 cannot be used together"),
        ({"bf16": True, "int8": True}, "^bf16 and int8 cannot be used together"),
    ):
        with pytest.raises(UsageError, match=message):
            export("digits_cnn.onnx", tmp_path / "m.onnx", **words)
    with pytest.raises(UsageError, match="--code writes a second file"):
        run(
            FIXTURES / "digits_cnn.pt2",
            parse_request({"to": "torch", "code": True}),
            Destination(tmp_path / "standard-output", to_stdout=True),
        )


def test_standard_output_takes_a_file_and_asks_for_its_format(tmp_path: Path) -> None:
    model = FIXTURES / "digits_cnn.onnx"
    with pytest.raises(UsageError, match="the format of the output is not given"):
        run(model, parse_request({}), Destination(tmp_path / "standard-output", to_stdout=True))
    with pytest.raises(UsageError, match="SavedModel is a folder"):
        run(
            FIXTURES / "digits_cnn.h5",
            parse_request({"to": "saved-model"}),
            Destination(tmp_path / "s", to_stdout=True),
        )
    run(model, parse_request({"to": "npz"}), Destination(tmp_path / "standard-output", to_stdout=True))
    export(model, tmp_path / "w.npz")
    assert (tmp_path / "standard-output").read_bytes() == (tmp_path / "w.npz").read_bytes()


@pytest.mark.parametrize("source", ["digits_cnn.onnx", "digits_cnn_savedmodel"])
def test_folders_may_have_names_that_are_no_utf_8(source: str, tmp_path: Path) -> None:
    # By its bytes: onnxruntime, onnx and TensorFlow take text alone.
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    copy = shutil.copytree if (FIXTURES / source).is_dir() else shutil.copyfile
    folder.mkdir()
    copy(FIXTURES / source, folder / source)
    result = export(folder / source, folder / "new.onnx")
    assert result.after.path == str(folder / "new.onnx")
    assert result.before.path == str(folder / source)
    export(FIXTURES / source, tmp_path / "plain.onnx")
    assert (folder / "new.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()
    assert sorted(os.listdir(folder)) == sorted([source, "new.onnx"])


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_weights_of_a_checkpoint_have_the_names_that_the_class_loads(suffix: str, tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.model = torch.nn.Parameter(torch.ones(3)), torch.nn.Linear(3, 2)

    def note(state: object, name: str) -> str:
        torch.save(state, tmp_path / f"{name}.ckpt")
        out = tmp_path / f"{name}.{suffix}"
        done = here("export", tmp_path / f"{name}.ckpt", "-o", out)
        values = load_file(out) if suffix == "safetensors" else {k: torch.tensor(v) for k, v in np.load(out).items()}
        Net().load_state_dict(values)
        return done.err

    state = Net().state_dict()
    for entry in ("state_dict", "model"):
        assert f"named without {entry}" in note({entry: state, "epoch": 1}, entry)
    assert "named without" not in note(state, "plain")


def test_a_part_of_the_network_that_is_called_as_such_an_entry_keeps_its_name(tmp_path: Path) -> None:
    state = {f"model.{name}": value for name, value in torch.nn.Linear(3, 2).state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    here("export", tmp_path / "m.pt", "-o", tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == state.keys()


def test_what_frameworks_write_for_a_while_goes_into_the_scratch_folder_of_the_export(tmp_path: Path) -> None:
    before = tempfile.gettempdir()
    code = tmp_path / "net.py"
    code.write_text(
        "import pathlib, tempfile\nfrom prunectl.plugins import attribute\n"
        "def build():\n"
        f"    pathlib.Path({str(tmp_path / 'seen')!r}).write_text(tempfile.gettempdir())\n"
        f"    return attribute({str(FIXTURES / 'digits_torch.py')!r}, 'DigitsCNN')()\n"
    )
    names = (FIXTURES / "digits_cnn.pt", "-o", tmp_path / "m.torchscript")
    assert here("export", *names, "--builder", f"{code}:build", "--input", "1,1,8,8").code == 0
    scratch = Path((tmp_path / "seen").read_text())
    assert scratch.is_relative_to(before)
    assert SCRATCH.fullmatch(scratch.parent.name)
    assert not scratch.exists()
    assert tempfile.gettempdir() == before
