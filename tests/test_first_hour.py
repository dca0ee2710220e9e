"""The first hour of a new user: what went wrong for one who tried every command, and what is seen there now.

The details of each are tested where they belong; this is the walk.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from prunectl.reporting.finetune import TrainingProgress
from prunectl.reporting.report import Settings
from prunectl.training.logger import LogEntry, ProgressEvent
from tests.reporting.test_progress import at_terminal as terminal_of
from tests.running import FIXTURES, Outcome, at_terminal, here, without_colors
from tests.test_mistakes import NET, save_whole

pytestmark = pytest.mark.filterwarnings("ignore")
TORCH, ONNX, KERAS = (FIXTURES / f"digits_cnn.{suffix}" for suffix in ("pt", "onnx", "h5"))
BUILDER = ("--builder", f"{FIXTURES / 'digits_torch.py'}:DigitsCNN")
DIGITS = f"{FIXTURES / 'digits.npz'}?norm=/16&limit=64"


def people(*words: str | Path, columns: int = 80, cwd: Path | None = None) -> str:
    """What somebody at a terminal of that width sees, without colours."""
    done = here(*words, "--format", "human", cwd=cwd, COLUMNS=str(columns))
    return without_colors(done.out + done.err)


def names_in(path: Path) -> list[str]:
    return [row["name"] for row in here("inspect", path, "--json").json["models"][0]["layers"]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve blocks with long names, in the order of their text, with statistics of batch normalisation."""
    tensors = {}
    for block in range(12):
        prefix = f"model.decoder.layers.{block}"
        tensors[f"{prefix}.mlp.down_projection.weight"] = np.ones((8, 8), np.float32)
        tensors[f"{prefix}.bn.weight"] = np.ones(8, np.float32)
        for name in ("running_mean", "running_var"):
            tensors[f"{prefix}.bn.{name}"] = np.ones(8, np.float32)
        tensors[f"{prefix}.bn.num_batches_tracked"] = np.array(3, np.int64)
    path = tmp_path_factory.mktemp("llama") / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """Weights and the file with their class, in a folder of their own."""
    (tmp_path / "first_net.py").write_text(NET)
    save_whole("first_net", tmp_path)
    lines = {"0.line": torch.nn.Linear(4, 8), "1.line": torch.nn.Linear(8, 2)}
    state = {f"{name}.{leaf}": value for name, line in lines.items() for leaf, value in line.state_dict().items()}
    torch.save(state, tmp_path / "net.pt")
    return tmp_path


def is_theirs(done: Outcome, code: int = 2) -> bool:
    """Whether a failure is told as the user's to mend, in sentences."""
    return done.code == code and "a bug in prunectl" not in done.err and "Traceback" not in done.err


def test_an_onnx_made_from_pytorch_keeps_the_names_that_options_and_diff_go_by(tmp_path: Path) -> None:
    made = tmp_path / "made.onnx"
    done = here("export", TORCH, "-o", made, *BUILDER, "--input", "1,1,8,8")
    assert done.code == 0, done.err
    assert {"conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"} <= set(names_in(made))
    pruned = here("prune", made, "-o", tmp_path / "small.onnx", "-s", "50%", "--exclude", "fc2", "--layer", "fc1=90%")
    assert pruned.code == 0, pruned.err
    states = {row[0]: row[3] for row in here("diff", made, TORCH).rows}
    assert {states[name] for name in names_in(TORCH)} == {"same"}
    assert set(states.values()) <= {"same", "added"}


@pytest.mark.parametrize("builder", ["first_net.py:Block", "first_net.py:unset"])
def test_a_builder_that_raises_is_told_as_the_users_own(builder: str, net: Path) -> None:
    done = here("export", "net.pt", "-o", "out.onnx", "--input", "1,4", "--builder", builder, cwd=net)
    assert is_theirs(done)
    assert builder in done.err


def test_a_framework_that_is_not_installed_is_told_with_what_brings_it_on_any_path(
    net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    cut = ("--pattern", "channel", "-s", "50%")
    for words in (("prune", "net.pt", "-o", "out.pt", *cut), ("inspect", "net.pt", "--groups")):
        done = here(*words, "--builder", "first_net.py:Net", "--input", "1,4", cwd=net)
        assert is_theirs(done, 4)
        assert "pip install torch" in done.err


def test_a_module_may_be_imported_by_its_file_and_the_root_is_no_output(net: Path) -> None:
    done = here(
        "export", "whole.pt", "-o", "w.onnx", "--input", "1,4", "--trust", "--import", "./first_net.py", cwd=net
    )
    assert done.code == 0, done.err
    assert is_theirs(here("prune", "net.pt", "-o", "/", "-s", "50%", cwd=net))


def test_a_run_that_cannot_be_resumed_names_the_option_that_differs(tmp_path: Path) -> None:
    words = ("finetune", TORCH, *BUILDER, "--data", DIGITS, "--epochs", "1", "--checkpoint-dir", "ck")
    first = here(*words, "-o", "a.pt", "--lr", "1e-4", cwd=tmp_path)
    assert first.code == 0, first.err
    refused = here(*words, "-o", "b.pt", "--lr", "1e-3", "--resume", cwd=tmp_path)
    assert is_theirs(refused)
    assert "the run in ck had --lr 0.0001, not 0.001" in refused.err
    assert "{" not in refused.err


def test_tables_at_eighty_columns_break_no_name_and_say_what_is_not_shown(llama: Path) -> None:
    shown = people("inspect", llama)
    # But for the command to paste, which is one line.
    assert max(len(line) for line in shown.splitlines() if not line.startswith("Next: ")) <= 80
    assert "Not shown at 80 columns: " in shown
    rows = [line.split()[0] for line in shown.splitlines() if ".mlp." in line or "projection" in line]
    assert len(rows) == 12
    assert all(row.endswith(".weight") for row in rows)
    assert people("inspect", llama, "--groups") == people("inspect", llama, "--groups", columns=80)


def test_inspect_shows_kernels_a_row_each_in_natural_order_and_folds_the_rest(llama: Path) -> None:
    shown = people("inspect", llama, columns=120)
    places = [int(place) for place in re.findall(r"^model\.decoder\.layers\.(\d+)\.mlp", shown, re.MULTILINE)]
    assert places == list(range(12))
    assert "running_mean" not in shown
    folded = re.findall(r"^(\d+) [a-z -]+ +[\d.]+ k?B +[\d.]+ %$", shown, re.MULTILINE)
    assert sum(map(int, folded)) == 4 * 12
    assert "--tensors lists each of them" in shown
    assert shown.count("running_mean") < people("inspect", llama, "--tensors", columns=120).count("running_mean")
    optimizer = people("inspect", FIXTURES / "checkpoint_with_optimizer.pt")
    assert re.search(r"^24 optimizer slots +78\.4 kB +61\.3 %$", optimizer, re.MULTILINE)


def test_a_file_has_one_sparsity_that_of_its_prunable_weights(tmp_path: Path) -> None:
    small = tmp_path / "small.onnx"
    pruned = people("prune", ONNX, "-o", small, "--pattern", "2:4", "--exclude", "fc2")
    (told,) = re.findall(r"^after +([\d.]+ %)", pruned, re.MULTILINE)
    assert re.search(rf"small\.onnx .* {re.escape(told)}$", people("size", small, columns=200), re.MULTILINE)
    assert f"{told} of prunable weights" in people("inspect", small)
    assert "of all parameters" in people("inspect", small)


def test_a_gate_that_fails_says_once_what_grew_and_how_to_go_on(tmp_path: Path) -> None:
    assert here("prune", KERAS, "-o", tmp_path / "m.h5", "-s", "80%").code == 0
    assert here("init", cwd=tmp_path).code == 0
    here("prune", KERAS, "-o", tmp_path / "m.h5", "-s", "10%", "--force")
    failed = here("check", cwd=tmp_path)
    assert failed.code == 1
    for channel in (people("check", cwd=tmp_path), here("check", "--report", "markdown:-", cwd=tmp_path).out):
        flat = " ".join(channel.split())
        assert "prunectl check --update-baseline --reason" in flat
        assert "raise max-gzip (prunectl.toml:" in flat
        assert "fc1/kernel:0" in flat
    shown = people("check", cwd=tmp_path, columns=120)
    assert len(re.findall(r"^FAIL +max-gzip", shown, re.MULTILINE)) == 1
    assert "before" in shown
    assert "--update-baseline" in here("check", "--report", "github:-", cwd=tmp_path).out
    assert "\x1b[" in at_terminal("check", "--config", tmp_path / "prunectl.toml").out


def test_what_init_writes_is_green_at_once_in_units_that_people_write(tmp_path: Path) -> None:
    assert here("prune", KERAS, "-o", tmp_path / "m.h5", "-s", "80%").code == 0
    assert here("init", cwd=tmp_path).code == 0
    checked = here("check", cwd=tmp_path)
    assert checked.code == 0
    assert {row[0] for row in checked.rows} == {"pass"}
    assert "0 failed, 0 warned" in checked.err
    assert (tmp_path / "prunectl-baseline.json").is_file()
    written = (tmp_path / "prunectl.toml").read_text()
    assert re.search(r'max-raw = "[\d.]+KB"', written)
    assert re.search(r'min-sparsity = "\d+%"', written)


def test_a_training_shows_its_bar_count_and_time_at_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setenv("COLUMNS", "80")
    metrics = {"loss": 0.49712, "accuracy": 0.8156}
    with TrainingProgress(Settings(), None, "accuracy") as progress:
        progress.watch(ProgressEvent(210, 420, 2, 3, 0.8, LogEntry(1, 140, 0.8, metrics, metrics)))
    assert re.search(r"epoch 2/3 [━╸╺ ]+ 210/420 +-:--:-- +val accuracy 0\.8156", without_colors(terminal.getvalue()))


def test_what_is_wrong_with_options_is_told_before_a_framework_is_loaded(
    net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    train = ("finetune", "net.pt", "-o", "out.pt", "--data", "random:8")
    cut = ("prune", "net.pt", "-o", "out.pt", "--pattern", "channel", "-s", "50%", "--input", "1,4")
    for words in (train, cut, ("export", "net.pt", "-o", "out.onnx", "--input", "1,4")):
        assert is_theirs(here(*words, "--builder", "no_net.py:Net", cwd=net)), words
    assert is_theirs(here(*train, "--builder", "first_net.py:Net", "--resume", cwd=net))


def test_code_in_the_current_folder_is_found_only_with_trust(net: Path) -> None:
    words = ("export", "whole.pt", "-o", "w.onnx", "--input", "1,4")
    assert here(*words, cwd=net).code == 3
    done = here(*words, "--trust", cwd=net)
    assert done.code == 0, done.err


def test_a_limit_on_rows_leaves_the_sizes_before_and_after(tmp_path: Path) -> None:
    shown = people("prune", KERAS, "-o", tmp_path / "a.h5", "-s", "80%", "-n", "1")
    assert "more rows: -n 0 shows all" in shown
    assert re.search(r"^before .*\nafter ", shown, re.MULTILINE)
    parts = re.findall(r"^(?:weights|file) .*", people("inspect", KERAS, "-n", "1", "--hist"), re.MULTILINE)
    assert len(parts) == 2


def test_a_pattern_is_told_in_words_with_its_sparsity_and_whom_it_spares(tmp_path: Path) -> None:
    shown = people("prune", ONNX, "-o", tmp_path / "a.onnx", "--pattern", "1:4")
    assert "1:4: 1 zero in every 4 weights, 25.0 % sparse" in shown
    assert "conv1.weight has fewer than 4 inputs, so 1:4 prunes none of it." in shown


def test_one_name_means_one_thing_and_old_names_work_with_a_note(tmp_path: Path) -> None:
    for command in ("inspect", "prune", "finetune", "sweep"):
        assert re.search(r"--layers GLOB", here(command, "--help").out), command
    for command in ("prune", "finetune", "export", "sweep", "inspect", "eval"):
        page = here(command, "--help").out
        assert "--builder" in page
        assert not re.search(r"--model\b|--only GLOB|--params\b|--step\b|--baseline\b", page), command
    for words, old, new in (
        (("prune", KERAS, "--dry-run", "-s", "50%", "--only", "conv*"), "--only", "--layers"),
        (("prune", ONNX, "--dry-run", "--pattern", "channel", "--params", "-50%"), "--params", "--target-params"),
        (("size", KERAS, "--baseline", KERAS, "--max-growth", "0%"), "--baseline", "--against"),
    ):
        done = here(*words, cwd=tmp_path)
        assert done.code == 0, done.err
        assert f"{old} is now called {new}" in done.err


def test_help_keeps_what_stands_in_brackets_and_names_defaults() -> None:
    assert "in prunectl.toml, or in the tool.prunectl table of pyproject.toml." in here("check", "--help").out
    assert re.search(r"--epochs N.*\[default: 3\]", here("finetune", "--help", COLUMNS="200").out)
    assert "strategies, schedules, policies, formats" in " ".join(here("plugins", "--help").out.split())


def test_a_log_gets_a_sentence_for_each_result_and_cells_that_column_can_align(tmp_path: Path) -> None:
    small = tmp_path / "small.h5"
    done = here("prune", KERAS, "-o", small, "-s", "80%", CI="true")
    assert re.search(rf"(?m)^{small}: [\d.]+ kB -> [\d.]+ kB gzipped, 80\.0 % sparse$", done.err)
    assert "Next:" not in done.err + done.out
    assert all(all(row) for row in here("inspect", KERAS).rows)
    assert here("prune", KERAS, "-o", tmp_path / "quiet.h5", "-s", "80%", "-q").err == ""


@pytest.mark.parametrize("where", [("-o", "small.pt"), ("--in-place",)])
def test_a_private_model_stays_private(where: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "private.pt").write_bytes(TORCH.read_bytes())
    os.chmod(tmp_path / "private.pt", 0o600)
    assert here("prune", "private.pt", *where, "-s", "80%", cwd=tmp_path).code == 0
    assert stat.S_IMODE((tmp_path / where[-1].replace("--in-place", "private.pt")).stat().st_mode) == 0o600


def test_a_builder_without_its_function_lists_what_the_file_defines(net: Path) -> None:
    done = here("export", "net.pt", "-o", "out.onnx", "--input", "1,4", "--builder", "first_net.py", cwd=net)
    assert is_theirs(done)
    assert "the file has Block, Net, unset" in done.err


def test_errors_break_at_words_begin_in_red_and_guess_what_was_meant(tmp_path: Path) -> None:
    (tmp_path / "p.pt").write_bytes(TORCH.read_bytes())
    shown = at_terminal("size", tmp_path / "p.ptx", "--max-packed", "1KB", columns=60).out
    assert shown.startswith("\x1b[1;31merror:\x1b[0m")
    wrong = here("size", "p.ptx", cwd=tmp_path)
    assert "did you mean: p.pt?" in wrong.err
    assert here("size", "p.ptx", "--json", cwd=tmp_path).json["error"]["did_you_mean"] == ["p.pt"]
    lines = at_terminal("size", KERAS, "--report", "nothing:at all that is long enough to be broken", columns=40).out
    assert all(len(line) <= 40 or " " not in line.strip() for line in without_colors(lines).splitlines())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("prune", "m.h5", "-f"), "--force"),
        (("prune", "m.h5", "--overwrite"), "--force"),
        (("prune", "m.h5", "--amount", "0.8"), "--sparsity"),
        (("prune", "m.h5", "--global"), "--scope global"),
        (("prune", str(KERAS), "-o", "x.h5", "-s", "50%", "--strategy", "wanda"), "activation-magnitude?"),
        (("prune", str(KERAS), "-o", "x.h5", "-s", "50%", "--strategy", "SparseGPT"), "obs?"),
        (("quantize", "m.h5"), "export --int8"),
        (("info", "m.h5"), "inspect"),
        (("compress", "m.h5"), "prune"),
    ],
)
def test_what_other_tools_call_otherwise_leads_to_our_name(typed: tuple[str, ...], meant: str) -> None:
    done = here(*typed)
    assert is_theirs(done)
    assert f"did you mean: {meant}" in done.err


@pytest.mark.parametrize(
    ("words", "following"),
    [
        (("prune", KERAS, "-o", "my small.h5", "-s", "20%"), "prunectl finetune 'my small.h5' -o 'my small-tuned.h5'"),
        (
            ("prune", TORCH, "-o", "thin.pt", "-s", "95%"),
            f"prunectl eval thin.pt --data test.npz --against {TORCH} --builder net.py:Net",
        ),
        (
            ("prune", ONNX, "-o", "thin.onnx", "--pattern", "channel", "-s", "50%"),
            f"prunectl eval thin.onnx --data test.npz --against {ONNX}",
        ),
        (
            ("prune", TORCH, "-o", "thin.pt", "--pattern", "channel", "-s", "50%", *BUILDER, "--input", "1,1,8,8"),
            "prunectl finetune thin.pt -o thin-tuned.pt --data train.npz --val test.npz --builder thin.py:DigitsCNN",
        ),
        (("strip", KERAS, "-o", "bare.h5"), f"prunectl size {KERAS} bare.h5"),
    ],
    ids=["few zeros", "many zeros", "channels of ONNX", "channels of PyTorch", "strip"],
)
def test_the_next_step_is_to_look_at_accuracy_by_a_line_that_can_be_pasted(
    words: tuple[str | Path, ...], following: str, tmp_path: Path
) -> None:
    shown = people(*words, cwd=tmp_path)
    assert f"Next: {following}" in shown
    if words[0] == "prune":
        assert "size" not in shown.partition("Next: ")[2]


def test_the_next_step_after_a_look_is_a_command_that_runs(tmp_path: Path) -> None:
    dense, small = tmp_path / "dense.onnx", tmp_path / "small.onnx"
    shutil.copy(FIXTURES / "digits_cnn.onnx", dense)
    assert here("prune", dense, "-o", small, "-s", "80%").code == 0
    data = ("--data", f"{FIXTURES / 'digits.npz'}?norm=/16&limit=64")
    looks: dict[str, tuple[str | Path, ...]] = {
        f"prune {dense}": ("size", dense),
        f"diff {small} {dense}": ("size", dense, small),
        f"verify {small} --against {dense}": ("diff", small, dense),
        f"size {dense} {small}": ("eval", small, *data, "--against", dense),
    }
    for expected, words in looks.items():
        shown = here(*words, "--format", "human").out
        (line,) = (line for line in shown.splitlines() if line.startswith("Next: "))
        assert line.startswith(f"Next: prunectl {expected}")
        assert here(*shlex.split(line.removeprefix("Next: prunectl "))).code == 0
