"""Topics are short and true, and the manual page is of the same table."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prunectl import cli, errors
from prunectl.analysis.sizes import CodecName
from prunectl.commands._topics import KEYS, MEANINGS, WIDTH
from prunectl.commands.app import COMMANDS, TOPICS
from prunectl.commands.help import man, roff, topic_lines
from prunectl.exporting.routes import TARGETS
from prunectl.formats.registry import FORMATS
from prunectl.pruning.plan import POLICIES
from prunectl.pruning.schedules import CURVES
from prunectl.pruning.strategies import STRATEGIES
from prunectl.reporting.ci import REPORT_FORMATS as REPORTS
from prunectl.training.data import spec
from tests.checks.checking import MODEL, prunectl
from tests.running import ROOT

PAGE = man()


def options_of(command: str) -> set[str]:
    """Return the words that a command takes."""
    params = importlib.import_module(COMMANDS[command][0]).command.params
    return {word for param in params for word in (*param.opts, *param.secondary_opts) if word.startswith("-")} | {
        "-h",
        "--help",
    }


@pytest.mark.parametrize("topic", TOPICS)
def test_a_topic_fits_on_a_screen_and_names_only_what_there_is(topic: str, tmp_path: Path) -> None:
    shown = prunectl(tmp_path, "help", topic)
    lines = shown.out.splitlines()
    assert (shown.code, shown.err, tuple(lines)) == (0, "", topic_lines(topic))
    assert len(lines) <= 40
    assert max(map(len, lines)) <= WIDTH
    assert shown.out.isascii()
    everything = {word for command in COMMANDS for word in options_of(command)} | {
        "--install-completion",
        "--show-completion",
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown.out)) <= everything


@pytest.mark.parametrize("topic", TOPICS)
def test_every_command_line_of_a_topic_is_one_that_the_command_takes(topic: str) -> None:
    for line in topic_lines(topic):
        if not re.match(r" +prunectl (?!-)[a-z]+ ", line) or "<Tab>" in line:
            continue
        _, command, *words = shlex.split(re.split(r" \| | {3,}", line.strip())[0])
        found = importlib.import_module(COMMANDS[command][0]).command
        # As a shell that completes does: everything is parsed, and nothing is run.
        context = found.make_context(command, [word.replace("$", "") for word in words])
        assert context.command is found


def test_the_topics_name_everything_that_the_tables_hold() -> None:
    held = {
        "exit-codes": [str(code) for code in MEANINGS],
        "selectors": [policy.name for policy in POLICIES],
        "strategies": [strategy.name for strategy in STRATEGIES],
        "schedules": list(CURVES),
        "formats": [*(row.title for row in FORMATS), *(target.name for target in TARGETS)],
        "sizes": list(map(str, CodecName)),
        "builds": list(REPORTS),
        "data": [*spec.GENERAL, *spec.TABLE_OPTIONS, *spec.IMAGE_OPTIONS, *spec.RECORD_OPTIONS],
        "json": list(KEYS),
    }
    for topic, names in held.items():
        text = "\n".join(topic_lines(topic))
        assert [name for name in names if name not in text] == []


def test_exit_codes_and_keys_are_those_in_use(tmp_path: Path) -> None:
    used = {kind.exit_code for kind in errors.PrunectlError.__subclasses__()}
    assert used <= set(MEANINGS)
    assert {cli.CANCELLED, cli.BROKEN_PIPE, cli.TERMINATED, cli.FAILED} <= set(MEANINGS)
    assert set(MEANINGS) == {0, 1, 2, 3, 4, 5, 70, 130, 141, 143}
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    assert prunectl(tmp_path, "size", "a.safetensors", "--json").json.keys() == set(KEYS)


def test_help_alone_lists_topics_and_commands(tmp_path: Path) -> None:
    out = prunectl(tmp_path, "help").out
    listed = re.findall(r"^  ([a-z-]+)  ", out, re.MULTILINE)
    assert listed == [*TOPICS, *COMMANDS]
    # A word must not mean two things.
    assert len(set(listed)) == len(listed)


def test_help_of_a_command_is_its_help(tmp_path: Path) -> None:
    assert prunectl(tmp_path, "help", "strip").out == prunectl(tmp_path, "strip", "--help").out
    assert prunectl(tmp_path, "help", "help").code == 0


def test_a_slip_is_answered_with_the_nearest_word(tmp_path: Path) -> None:
    for slip, meant in (("exit-code", "exit-codes"), ("pruen", "prune"), ("pattern", "patterns")):
        found = prunectl(tmp_path, "help", slip)
        assert (found.code, found.out) == (2, "")
        assert f"did you mean: {meant}" in found.err
    assert prunectl(tmp_path, "help", "prune", "--man").code == 2


def test_the_page_has_every_command_option_topic_and_code() -> None:
    bare = PAGE.replace("\\-", "-").replace("\\e", "\\")
    for name in COMMANDS:
        assert f".SS prunectl {name}\n" in bare
        assert [word for word in options_of(name) if f"\\fB{word}\\fR" not in bare] == []
    for topic in TOPICS:
        assert f".SH {topic_lines(topic)[0].upper()}\n" in bare or topic == "exit-codes"
    for code in MEANINGS:
        assert f".TP\n{code}\n" in bare


def test_the_page_is_the_same_every_time(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "prunectl", "help", "--man"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "COLUMNS": "40", "LC_ALL": "C"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert done.stdout.decode("ascii") == PAGE


def test_the_page_is_well_formed() -> None:
    opened = [line for line in PAGE.splitlines() if line in {".nf", ".fi", ".RS", ".RE"}]
    assert opened.count(".nf") == opened.count(".fi")
    assert opened.count(".RS") == opened.count(".RE")
    requests = {line.split()[0] for line in PAGE.splitlines() if line.startswith(".")}
    assert requests <= {".TH", ".SH", ".SS", ".PP", ".TP", ".B", ".I", ".nf", ".fi", ".RS", ".RE"}
    assert roff(".hidden 'a\\b-…") == "\\&.hidden 'a\\eb\\-..."


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_man_has_nothing_to_complain_about() -> None:
    words = ["groff", "-man", "-ww", "-Tascii", "-P-cbou"]
    done = subprocess.run(words, input=PAGE, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "--if-changed" in done.stdout
    assert "prunectl prune [OPTIONS] MODEL" in done.stdout
