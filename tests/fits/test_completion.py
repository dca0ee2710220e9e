"""A shell that asks gets the words that fit, through the variables that its script sets."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from pathlib import Path

import pytest

from prunectl import cli
from prunectl.analysis import patterns
from prunectl.commands.app import COMMANDS
from prunectl.commands.completion import PATTERNS
from prunectl.exporting.routes import TARGETS
from prunectl.pruning.plan import POLICIES
from prunectl.pruning.request import PruneRequest, parse_pattern
from prunectl.pruning.schedules import CURVES
from prunectl.pruning.strategies import STRATEGIES
from tests.running import FIXTURES, clean, prunectl

LAYERS = {"conv1", "conv2", "fc1", "fc2"}


@pytest.fixture(autouse=True)
def _at_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)


def offered(line: str, monkeypatch: pytest.MonkeyPatch, shell: str = "bash") -> list[str]:
    """Return what is offered at the end of a line."""
    words = line.split(" ")
    monkeypatch.setenv("_PRUNECTL_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", f"prunectl {line}")
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"prunectl {line}")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert (cli._run([]), err.getvalue()) == (0, "")
    return out.getvalue().splitlines()


@pytest.mark.parametrize(
    "line",
    [
        "prune {} --layer ",
        "prune {} -o x.h5 --layer fc1=0.5 --layers ",
        "prune -s 0.8 {} --exclude ",
        "inspect {} --layers ",
        "finetune {} --freeze ",
        "sweep {} --layers ",
    ],
)
@pytest.mark.parametrize("model", ["digits_cnn.h5", "digits_cnn.pt", "digits_cnn.onnx"])
def test_layers_and_tensors_are_those_of_the_model(line: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = offered(line.format(model), monkeypatch)
    assert set(found) >= LAYERS
    assert any(name.startswith(("conv1/", "conv1.", "conv1_")) for name in found)
    begun = [name for name in found if name.startswith("conv1")]
    assert offered(line.format(model) + "conv1", monkeypatch) == begun


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prune --strategy ", {strategy.name for strategy in STRATEGIES}),
        ("finetune --schedule ", set(CURVES)),
        ("prune --policy ", {policy.name for policy in POLICIES}),
        ("prune --scope ", {"layer", "global"}),
        ("prune --pattern ", {"2:4", "channel"}),
        ("size --format ", {"json", "markdown"}),
        ("size --codec ", {"gzip", "zstd", "xz", "none"}),
        ("export --to ", {target.name for target in TARGETS}),
        ("check --report ", {"junit:", "sarif:"}),
        ("strip --only masks,", {"masks,optimizer"}),
        ("sweep x.h5 --scopes layer,", {"layer,global"}),
        ("sweep x.h5 --patterns 2:4,", {"2:4,channel", "2:4,unstructured"}),
        ("sweep x.h5 --on ", {"ray", "ray:"}),
        ("", set(COMMANDS)),
        ("plugins ", {"strategies", "schedules"}),
    ],
)
def test_values_are_those_that_prunectl_knows(line: str, words: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words <= set(offered(line, monkeypatch))


def test_no_pattern_is_offered_that_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"channel", "layers"}
    assert all(parse_pattern(PruneRequest(pattern=pattern)) for pattern in PATTERNS if pattern not in others)
    assert patterns.parse("channel")
    assert not others & set(offered("finetune --pattern ", monkeypatch))


@pytest.mark.parametrize("line", ["prune README.md --layer ", "prune nothing.h5 --layer ", "prune --layer "])
def test_without_a_model_nothing_is_offered_and_nothing_said(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert offered(line, monkeypatch) in ([], [""])


def test_zsh_and_fish_say_what_each_word_means(monkeypatch: pytest.MonkeyPatch) -> None:
    assert offered("prune --policy skip-f", monkeypatch, "zsh") == [
        """_arguments '*: :(("skip-first-last":"kernels, except in the first and the last layer"))'"""
    ]
    assert offered("prune digits_cnn.h5 --layer conv1/k", monkeypatch, "fish") == ["conv1/kernel:0\t3x3x1x8 kernel"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        # As bash breaks each line, and with what it puts behind what it has.
        (["--layer", "="], ["conv1", "fc2/bias:0"]),
        (["--layer", "=", "fc1/k"], ["fc1/kernel:0"]),
        (["--layer", "fc1/kernel", ":"], ["0"]),
        (["--layer", "fc1/kernel", ":", "0"], ["0"]),
        (["--layer", "=", "fc1/kernel", ":"], ["0"]),
        (["--layer", "'fc1/kernel:"], ["fc1/kernel:0"]),
        (["--pattern", "block", ":", "4x4", ":"], ["max"]),
        (["--pattern", "2", ":", "4", "--layer", "=", "fc1", "=", "0.5", "--layer", "fc1/b"], ["fc1/bias:0"]),
        (["--pattern", "2", ":", "4", "--policy", ""], ["skip-first-last"]),
    ],
)
def test_bash_goes_on_after_what_it_breaks_words_at(
    words: list[str], found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(found) <= set(offered(" ".join(["prune", "digits_cnn.h5", *words]), monkeypatch))


@pytest.mark.parametrize("asking", ["bash", "complete_csh", "complete", "show_bash"])
def test_what_no_shell_asks_is_refused(asking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_PRUNECTL_COMPLETE", asking)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert cli._run([]) == 2
    refusal = f"error: _PRUNECTL_COMPLETE is {asking!r}, which is not a completion request of any shell\n"
    assert err.getvalue().startswith(refusal)


def test_the_shell_that_is_named_gets_its_script_whatever_has_started_the_command() -> None:
    scripts = {shell: prunectl("--show-completion", shell) for shell in ("bash", "zsh", "fish")}
    assert {shell: script.code for shell, script in scripts.items()} == dict.fromkeys(scripts, 0)
    assert "COMP_WORDS" in scripts["bash"].out
    assert "compdef" in scripts["zsh"].out
    assert "complete --command prunectl" in scripts["fish"].out


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_script_for_bash_asks_the_command(tmp_path: Path) -> None:
    script = prunectl("--show-completion", "bash")
    assert script.code == 0
    (tmp_path / "script").write_text(script.out)
    words = "COMP_WORDS=(prunectl prune digits_cnn.h5 --layer fc1); COMP_CWORD=4; _prunectl_completion prunectl"
    path = f"{Path(cli.sys.executable).parent}:{cli.os.environ['PATH']}"
    line = f'source {tmp_path}/script; {words}; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", line], env=clean(PATH=path), capture_output=True, text=True, check=True, cwd=FIXTURES
    )
    assert done.stdout == "fc1 fc1/kernel:0 fc1/bias:0\n"
