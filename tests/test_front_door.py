"""The habits of the command line: exit codes, streams, JSON, terminals, signals."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prunectl import cli
from prunectl.commands.app import COMMANDS
from tests.running import COMMAND, FIXTURES, HANG_SECONDS, ROOT, at_terminal, clean, here, prunectl, without_colors

MODEL = FIXTURES / "digits_cnn.h5"
HEAVY = {"tensorflow", "keras", "tf_keras", "torch", "onnx", "onnxruntime", "pydantic", "scipy", "pandas"}


def modules_after(*lines: tuple[str, ...]) -> set[str]:
    """Return what is imported once commands are done, one after the other."""
    code = "import sys\nfrom prunectl.cli import main\n"
    code += "".join(f"sys.argv = {['prunectl', *words]!r}\nmain()\n" for words in lines)
    code += "print('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean())
    return {line.split(".")[0] for line in done.stderr.splitlines()}


def test_the_version_is_told_without_importing_anything() -> None:
    assert prunectl("--version").out == f"prunectl {cli.__version__}\n"
    assert not {"typer", "rich", "numpy", "dataclasses", "typing"} & modules_after(("--version",))


def test_a_small_dense_model_is_measured_without_what_others_need() -> None:
    models = [str(FIXTURES / f"digits_cnn{suffix}") for suffix in (".pt", ".safetensors")]
    loaded = modules_after(*((command, model) for command in ("size", "inspect") for model in models))
    assert not {"ml_dtypes", "concurrent", "logging", "tarfile", "secrets", "csv", "rich", "h5py"} & loaded


def test_help_loads_no_command_and_no_framework() -> None:
    assert not (HEAVY | {"numpy", "h5py"}) & modules_after(("--help",))


def test_no_command_on_bytes_loads_a_framework() -> None:
    models = [str(FIXTURES / f"digits_cnn{suffix}") for suffix in (".h5", ".keras", ".pt", ".onnx")]
    # All that bench needs is a model, which it runs.
    commands = [command for command in COMMANDS if command != "bench"]
    assert not HEAVY & modules_after(*((command, "--json", model) for command in commands for model in models))


def test_what_is_not_there_is_told_before_a_framework_is_loaded(tmp_path: Path) -> None:
    net, out, data = str(FIXTURES / "digits_cnn.pt"), str(tmp_path / "out"), str(FIXTURES / "digits.npz")
    lines = (
        ("finetune", str(MODEL), "-o", f"{out}.h5", "--data", "nope.npz"),
        ("finetune", net, "-o", f"{out}.pt", "--data", data),
        ("eval", str(MODEL), "--data", "nope.npz"),
        ("bench", str(MODEL), "--data", "nope.npz"),
        ("bench", net),
        ("inspect", str(MODEL), "--sensitivity", "--data", "nope.csv"),
        ("prune", str(MODEL), "-o", f"{out}.h5", "-s", "80%", "--repair", "--data", "x.npy,y.npy"),
        ("prune", net, "-o", f"{out}.pt", "-s", "50%", "--pattern", "channel"),
    )
    assert not HEAVY & modules_after(*lines)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help_with_examples_before_its_options(command: str, flag: str) -> None:
    shown = here(command, flag)
    assert shown.code == 0
    assert 0 < shown.out.index(f"$ prunectl {command}") < shown.out.rindex("ptions")


def test_no_command_at_all_shows_help() -> None:
    assert "Commands" in here().out


def test_exit_0_when_all_is_done() -> None:
    assert prunectl("inspect", MODEL).code == 0


def test_exit_1_only_when_a_gate_says_no() -> None:
    assert prunectl("size", MODEL, "--max-raw", "1KB").code == 1
    assert prunectl("size", MODEL, "--max-raw", "1MB").code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("inspect",),
        ("inspekt", "m.h5"),
        ("inspect", str(MODEL), "--sideways"),
        ("inspect", str(MODEL), "--layers", "nothing*"),
        ("inspect", str(MODEL), "--pattern", "4:2"),
        ("size", str(MODEL), "--max-raw", "big"),
        ("size", str(MODEL), "--min-sparsity", "80"),
        ("size", str(MODEL), "--max-growth", "5%"),
    ],
    ids=" ".join,
)
def test_exit_2_for_what_cannot_be_meant(words: tuple[str, ...]) -> None:
    found = here(*words)
    assert (found.code, found.out) == (2, "")


def test_exit_3_for_what_is_no_model(tmp_path: Path) -> None:
    assert prunectl("inspect", tmp_path / "missing.h5").code == 3


def test_exit_4_when_a_package_is_missing_with_the_line_that_brings_it() -> None:
    code = "import sys; sys.modules['zstandard'] = None\nfrom prunectl.cli import main\nsys.exit(main())"
    words = [sys.executable, "-c", code, "size", str(MODEL), "--codec", "zstd"]
    found = subprocess.run(words, capture_output=True, text=True, env=clean(), check=False)
    assert found.returncode == 4
    assert "pip install zstandard" in found.stderr


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (
            "torch",
            ("finetune", FIXTURES / "digits_cnn.pt", "-o", "out.pt", "--data", "random:8", "--builder", "os:open"),
        ),
        ("tf_keras", ("finetune", FIXTURES / "digits_cnn.h5", "-o", "out.h5", "--data", "random:8")),
        ("onnx", ("prune", FIXTURES / "digits_cnn.onnx", "-o", "out.onnx", "--pattern", "channel", "-s", "50%")),
        ("onnx", ("inspect", FIXTURES / "digits_cnn.onnx", "--groups")),
    ],
)
def test_exit_4_when_a_framework_is_missing(missing: str, words: tuple[str | Path, ...], tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom prunectl.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, words)]
    environment = clean(PYTHONPATH=str(ROOT))
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert found.returncode == 4, found.stderr
    assert f"pip install {missing.replace('_', '-')}" in found.stderr


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (MemoryError(), 5, "error: prunectl ran out of memory"),
        (OSError(28, "No space left on device", "/data"), 5, "error: no space left on the disk"),
        (ZeroDivisionError("division by zero"), 70, "error: this is a bug in prunectl: ZeroDivisionError"),
    ],
)
def test_exit_5_when_the_work_fails_and_70_when_prunectl_does(
    error: Exception, code: int, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("prunectl.commands.inspect.inspect_model", fail)
    monkeypatch.setattr("sys.argv", ["prunectl", "inspect", str(MODEL)])
    assert cli.main() == code
    assert capsys.readouterr().err.startswith(sentence)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("prunectl.commands.inspect.inspect_model", lambda *_: 1 / 0)
    monkeypatch.setattr("sys.argv", ["prunectl", "inspect", str(MODEL), "--debug"])
    assert cli.main() == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_its_code_and_leaves_nothing(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "inspect", "-", "-v"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean(TMPDIR=str(tmp_path), PYTHONUNBUFFERED="1"),
    ) as waiting:
        try:
            # It has begun to keep its input, and sleeps: a signal just before it asks for more would be heard after it.
            while not any(tmp_path.rglob("standard-input")) or not is_asleep(waiting.pid):
                assert waiting.poll() is None
            waiting.send_signal(sent)
            assert waiting.wait(HANG_SECONDS) == code
            assert list(tmp_path.iterdir()) == []
        finally:
            waiting.kill()


def is_asleep(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_a_closed_pipe_is_141_and_silent() -> None:
    process = subprocess.Popen(
        [*COMMAND, "inspect", MODEL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean()
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(HANG_SECONDS) == 141


def test_several_inputs_are_all_tried_and_the_worst_code_wins(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    found = here("size", tmp_path / "text.pt", MODEL, "--max-raw", "1KB")
    assert found.code == 3
    assert [row[0] for row in found.rows] == [str(MODEL)]
    assert found.err.count("error: ") == 1


def test_stdout_carries_data_only() -> None:
    found = here("size", FIXTURES / "two_of_four_zero.safetensors", "--max-raw", "1MB")
    assert len(found.rows) == 1
    assert "max-raw" in found.err


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (("inspect", "missing.h5"), 3, "input"),
        (("inspect", str(MODEL), "--sideways"), 2, "usage"),
        (("size", str(MODEL), "--max-raw", "big"), 2, "usage"),
        (("inspect", str(MODEL), "--layers", "con9*"), 2, "usage"),
    ],
)
@pytest.mark.parametrize("how", [("--json",), ("--format", "json"), ("--format=json",)])
def test_json_is_one_object_even_when_it_fails(
    words: tuple[str, ...], code: int, kind: str, how: tuple[str, ...]
) -> None:
    found = here(*words, *how)
    assert found.code == found.json["exit_code"] == found.json["error"]["code"] == code
    assert found.json["error"]["kind"] == kind
    assert not found.json["ok"]


def test_json_names_its_schema_its_tool_and_sorts_its_keys() -> None:
    found = here("inspect", MODEL, "--json")
    assert found.json["schema"] == "prunectl.report/1"
    assert found.json["tool"]["name"] == "prunectl"
    assert list(found.json) == sorted(found.json)
    assert found.json["ok"]
    assert found.json["error"] is None


def test_a_slip_is_answered_with_the_nearest_names() -> None:
    found = here("inspect", MODEL, "--layers", "con1*")
    assert "did you mean: conv1" in found.err
    assert f"list the layers: prunectl inspect {MODEL}" in found.err


def test_a_bare_percentage_is_answered_with_how_to_write_it() -> None:
    assert "write 80% or 0.8" in here("size", MODEL, "--min-sparsity", "80").err


def test_a_pipe_gets_tabs_and_no_colours_whatever_the_width() -> None:
    found = here("inspect", FIXTURES / "wrapped_by_tfmot.h5", COLUMNS="20")
    assert {len(row) for row in found.rows} == {9}
    assert "\x1b" not in found.out + found.err
    assert "…" not in found.out


def test_a_terminal_of_eighty_columns_gets_a_table_that_fits() -> None:
    found = at_terminal("inspect", FIXTURES / "every_variable_twice")
    # But for the command to paste, which is one line.
    lines = [line for line in without_colors(found.out).splitlines() if not line.startswith("Next: ")]
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("tensor") for line in lines)


@pytest.mark.parametrize(
    ("environment", "words", "is_colored"),
    [
        ({}, (), True),
        ({"NO_COLOR": "1"}, (), False),
        ({"TERM": "dumb"}, (), False),
        ({}, ("--color", "never"), False),
        ({"NO_COLOR": "1"}, ("--color", "always"), True),
    ],
)
def test_a_terminal_gets_colours_unless_somebody_objects(
    environment: dict[str, str], words: tuple[str, ...], is_colored: bool
) -> None:
    assert ("\x1b[" in at_terminal("inspect", MODEL, *words, **environment).out) == is_colored


def test_a_pipe_gets_colours_when_they_are_forced() -> None:
    assert "\x1b[" in prunectl("inspect", MODEL, "--format", "human", FORCE_COLOR="1").out
    assert "\x1b[" not in prunectl("inspect", MODEL, "--format", "human").out


def test_a_name_with_escape_sequences_is_shown_escaped(tmp_path: Path) -> None:
    evil = tmp_path / "m\x1b]0;owned\x07\n.h5"
    evil.write_text("no model")
    for found in (prunectl("inspect", evil), at_terminal("inspect", evil, "--color", "never")):
        assert found.code == 3
        assert "\x1b" not in found.out + found.err
        assert "\\x1b]0;owned\\x07\\n" in found.out + found.err


def test_standard_input_is_a_model_called_dash() -> None:
    found = prunectl("size", "-", "--json", stdin=(FIXTURES / "digits_cnn.safetensors").read_bytes())
    assert found.json["models"][0]["path"] == "-"
    assert found.json["models"][0]["format"] == "safetensors"


def test_an_output_that_cannot_show_a_letter_shows_it_escaped(tmp_path: Path) -> None:
    found = prunectl("inspect", tmp_path / "modèle.h5", PYTHONIOENCODING="ascii")
    assert found.code == 3
    assert "mod\\xe8le.h5" in found.err


def test_a_slip_in_a_command_line_points_to_the_help_that_there_is() -> None:
    assert here("inspct", "m.h5").err.endswith("see: prunectl -h\n")
    assert here("inspect").err.endswith("see: prunectl inspect -h\n")
    assert here("size", "m.h5", "--nope").err.endswith("see: prunectl size -h\n")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("inspekt m.h5", "inspect"),
        ("info m.h5", "inspect"),
        ("quantize m.h5", "export --int8"),
        ("prune m.h5 --amount 80%", "--sparsity"),
        ("prune m.h5 -s 80% -o out.h5 -f", "--force"),
        ("prune m.h5 --overwrite", "--force"),
        ("inspect m.h5 --only conv1", "--layers"),
        ("prune m.h5 --include conv1", "--layers"),
        ("prune m.h5 --sparsty 80%", "--sparsity"),
    ],
)
def test_what_is_called_otherwise_elsewhere_is_answered_with_our_name(words: str, meant: str) -> None:
    refused = here(*words.split())
    assert refused.code == 2
    assert f"did you mean: {meant}" in refused.err


def test_a_value_that_is_refused_is_named_with_its_option(tmp_path: Path) -> None:
    assert "error: --sparsity: '80' is not between 0 and 1" in here("prune", MODEL, "-s", "80", "--dry-run").err
    assert "write 1pp" in here("prune", MODEL, "--max-drop", "1%", "--data", "d.npz", "-o", tmp_path / "o.h5").err


def test_a_path_with_a_typing_error_is_answered_with_the_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"")
    assert "did you mean: model.pt?" in here("size", "modle.pt", cwd=tmp_path).err


def test_a_log_gets_the_outcome_in_a_sentence_and_no_next_step(tmp_path: Path) -> None:
    done = here("prune", MODEL, "-o", tmp_path / "small.h5", "-s", "80%")
    assert re.search(
        rf"^{tmp_path / 'small.h5'}: [\d.]+ kB -> [\d.]+ kB gzipped, 80\.0 % sparse$", done.err, re.MULTILINE
    )
    assert "Next:" not in done.out + done.err
    assert here("prune", MODEL, "-o", tmp_path / "quiet.h5", "-s", "80%", "-q").err == ""
    shown = here("prune", MODEL, "-o", tmp_path / "human.h5", "-s", "80%", "--format", "human").out
    assert "Accuracy was not measured." in shown
    assert f"Next: prunectl eval {tmp_path / 'human.h5'}" in shown


def test_an_empty_cell_of_plain_rows_is_a_dash(tmp_path: Path) -> None:
    rows = here("inspect", FIXTURES / "digits_cnn.safetensors").out.splitlines()
    assert all(cell for row in rows for cell in row.split("\t"))


def test_an_error_at_a_terminal_breaks_at_words_and_begins_in_red() -> None:
    shown = at_terminal("size", "long name of a file that is not there " * 3, columns=60).out
    assert shown.startswith("\x1b[1;31merror:\x1b[0m")
    assert all(len(line) <= 60 for line in without_colors(shown).splitlines())


@pytest.mark.parametrize("words", [("--color", "never"), ("--color=never",), ("--color=never", "--no-such-option")])
def test_an_error_has_no_colour_where_none_is_wanted(words: tuple[str, ...], tmp_path: Path) -> None:
    assert at_terminal("size", tmp_path / "missing.h5", *words).out.startswith("error: ")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_shell_closed_change_no_exit_code(closed: str) -> None:
    for words, code in ((f"inspect {FIXTURES / 'digits_cnn.pt'}", 0), ("inspect missing.h5", 3), ("--version", 0)):
        line = f"{shlex.join(COMMAND)} {words} {closed}"
        assert subprocess.run(line, shell=True, capture_output=True, env=clean(), check=False).returncode == code


@pytest.mark.parametrize("words", ["inspect --json", "inspect", "size", "size -q", "--version", "--help"])
@pytest.mark.parametrize("full", [">/dev/full", ">/dev/full 2>&1"])
def test_an_output_that_cannot_be_written_is_a_failure_and_not_a_no(words: str, full: str) -> None:
    model = "" if words.startswith("--") else str(FIXTURES / "digits_cnn.pt")
    line = f"{shlex.join(COMMAND)} {words} {model} {full}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=clean(), check=False)
    assert done.returncode == 5
    assert "Traceback" not in done.stderr


def test_what_stands_in_square_brackets_is_no_markup() -> None:
    assert "plugins [KIND] [FILE.svg] [OPTIONS]" in here("plugins", "--help").out
    assert "strategies, schedules, policies, formats, channels" in here("plugins", "--help").out


@pytest.mark.parametrize("name", ["export", "finetune", "prune", "sweep"])
def test_help_shows_every_default_that_a_text_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = here(name, "--help").out
    help_texts = [getattr(param, "help", "") for param in importlib.import_module(COMMANDS[name][0]).command.params]
    defaults = re.findall(r"\[default: .*?\]", " ".join(help_texts))
    assert defaults
    assert all(default in shown for default in defaults)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", [60, 80])
def test_lines_of_help_break_where_the_terminal_ends(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = here(name, "--help").out.splitlines()
    assert all(len(line) <= columns for line in lines if not line.startswith("  $ prunectl"))
    description = lines[2 : lines.index("Examples:")]
    for line, following in itertools.pairwise(description):
        assert not line or not following or len(line) + 1 + len(following.split()[0]) > columns


@pytest.mark.parametrize("name", COMMANDS)
def test_short_help_fits_on_a_screen_and_names_the_way_to_the_rest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = here(name, "-h").out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if line.startswith("  $ prunectl")]) in {2, 3}
    assert lines[-1].endswith(f"prunectl {name} --help")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_in_the_whole_help(name: str) -> None:
    shown = here(name, "--help").out.partition("Examples:")[2]
    for param in importlib.import_module(COMMANDS[name][0]).command.params:
        if param.param_type_name == "option" and not param.hidden:
            assert (
                len(re.findall(rf"(?m)^ +(?:--?[\w-]+, )?{param.opts[-1]}\b|(?:, | ){param.opts[-1]}(?:,|$)", shown))
                >= 1
            )


def test_an_interrupt_that_a_framework_turns_into_an_error_of_its_own_is_still_an_interrupt() -> None:
    code = """
import signal, sys
from prunectl import cli
from prunectl.commands import app
def interrupted(arguments):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ImportError("a library was not loaded")
app.run = interrupted
sys.argv = ["prunectl", "size", "m.h5"]
sys.exit(cli.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean(), check=False)
    assert (done.returncode, done.stderr) == (cli.CANCELLED, "")
