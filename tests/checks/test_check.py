"""`prunectl check`: forty gates, at their limits and around them."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from prunectl.checks.rules import is_within
from prunectl.units import parse_ratio
from tests.checks.checking import BIAS, GZIP, MODEL, PARAMS, RAW, WEIGHT, baseline, gates, prunectl, put
from tests.running import FIXTURES, ROOT, at_terminal, clean, without_colors
from tests.running import prunectl as in_its_own_process

FLOPS = 2 * (6 * 6 * 72 + 4 * 4 * 1152 + 256 * 32 + 32 * 10)
"""Of the digits network, by hand: two convolutions to 6x6 and 4x4 pixels, two dense layers."""
HALF_REGULAR = save({"fc.weight": WEIGHT, "out.weight": np.ones_like(WEIGHT)})
DENSE = save({"fc.weight": np.ones_like(WEIGHT), "fc.bias": BIAS})
RENAMED = save({"other.weight": WEIGHT})


@dataclass(frozen=True)
class Case:
    """Budgets of one model, and what they say."""

    name: str
    keys: str
    verdicts: tuple[str, ...]
    code: int
    past: dict[str, int] = field(default_factory=dict)
    top: str = ""


def one(name: str, keys: str, verdict: str, **more: object) -> Case:
    return Case(name, keys, (verdict,), 1 if verdict == "FAIL" else 0, **more)  # type: ignore[arg-type]


def growing(name: str, limit: str, past: int, verdict: str) -> Case:
    return one(name, f"max-growth = {limit}", verdict, past={"a": past})


CASES = [
    one("raw just under", f"max-raw = {RAW + 1}", "pass"),
    one("raw equal", f"max-raw = {RAW}", "pass"),
    one("raw just over", f"max-raw = {RAW - 1}", "FAIL"),
    one("raw as a text", "max-raw = '1KB'", "pass"),
    one("raw of nothing", "max-raw = 0", "FAIL"),
    one("gzip just under", f"max-gzip = {GZIP + 1}", "pass"),
    one("gzip equal", f"max-gzip = {GZIP}", "pass"),
    one("gzip just over", f"max-gzip = {GZIP - 1}", "FAIL"),
    one("packed equal", f"max-packed = {RAW}", "pass"),
    one("packed just over", f"max-packed = {RAW - 1}", "FAIL"),
    one("params equal", f"max-params = {PARAMS}", "pass"),
    one("params just over", f"max-params = {PARAMS - 1}", "FAIL"),
    one("params in thousands", "max-params = '0.036k'", "pass"),
    one("sparsity a weight under", "min-sparsity = 0.53", "FAIL"),
    one("sparsity as pruning rounds it", "min-sparsity = 0.51", "pass"),
    one("sparsity equal", "min-sparsity = '50%'", "pass"),
    one("sparsity just over", "min-sparsity = 0.49", "pass"),
    one("two of four", "min-nm = '2:4'", "pass"),
    one("three of four", "min-nm = '3:4'", "FAIL"),
    one("groups that no input divides into", "min-nm = '2:3'", "FAIL"),
    one("zeros kept", "keep-zeros = 'a.safetensors'", "pass"),
    one("zeros of a dense model", "keep-zeros = 'dense.safetensors'", "pass"),
    one("zeros of a tensor that is not there", "keep-zeros = 'renamed.safetensors'", "FAIL"),
    one("warn only, kept", f"max-raw = {{warn = {RAW}}}", "pass"),
    one("warn only, broken", f"max-raw = {{warn = {RAW - 1}}}", "warn"),
    one("between warn and fail", f"max-raw = {{fail = {RAW}, warn = {RAW - 1}}}", "warn"),
    one("over both", f"max-raw = {{fail = {RAW - 1}, warn = {RAW - 2}}}", "FAIL"),
    one("a floor that warns", "min-sparsity = {fail = 0.4, warn = 0.6}", "warn"),
    one("a floor that fails", "min-sparsity = {fail = 0.6, warn = 0.7}", "FAIL"),
    growing("grown by nothing", "'0%'", GZIP, "pass"),
    growing("grown by one byte", "'0%'", GZIP - 1, "FAIL"),
    growing("grown by as many bytes as it may", "'1B'", GZIP - 1, "pass"),
    growing("grown by a byte more than it may", "'1B'", GZIP - 2, "FAIL"),
    growing("shrunk", "'0%'", GZIP + 1, "pass"),
    growing("grown to twice the size", "'100%'", GZIP // 2 + GZIP % 2, "pass"),
    growing("grown from zero", "'100%'", 0, "FAIL"),
    growing("grown between warn and fail", "{fail = '50%', warn = '0.5%'}", GZIP - 2, "warn"),
    growing("grown with levels in different values, too many", "{fail = '10KB', warn = '0.5%'}", GZIP - 2, "pass"),
    one("missing baseline", "max-growth = '2%'", "warn"),
    one("missing baseline that fails", "max-growth = '2%'", "FAIL", top="on-missing = 'fail'"),
    one("missing baseline that is made", "max-growth = '2%'", "pass", top="on-missing = 'create'"),
    Case("several", f"max-raw = {RAW}\nmax-gzip = 1\nmin-sparsity = {{warn = 1.0}}", ("pass", "FAIL", "warn"), 1),
    one("a layer within its limit", "[[budget.layer]]\nname = 'fc*'\nmin-sparsity = 0.5", "pass"),
    one("a layer beyond it", "[[budget.layer]]\nname = 'fc*'\nmax-sparsity = 0.4", "FAIL"),
    one("a layer's pattern", "[[budget.layer]]\nname = 're:weight$'\nmin-nm = '2:4'", "pass"),
    one("a layer's parameters", "[[budget.layer]]\nname = 'fc.weight'\nmax-params = 31", "FAIL"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_gate_says_what_its_limit_means(case: Case, tmp_path: Path) -> None:
    toml = f"{case.top}\n[[budget]]\npath = 'a.*'\n{case.keys}\n"
    put(tmp_path, toml, a=MODEL, dense=DENSE, renamed=RENAMED)
    if case.past:
        baseline(tmp_path, **case.past)
    found = prunectl(tmp_path, "check")
    words = tuple(row[0] for row in found.rows)
    if "different values, too many" in case.name:
        assert sorted(words) == ["pass", "warn"]
    else:
        assert words == case.verdicts
    assert found.code == case.code, found.err


def test_a_share_holds_at_its_limit_and_not_a_billionth_beyond() -> None:
    for tenths in range(1, 1000):
        limit, exact = parse_ratio(f"{tenths / 10}%"), tenths * 10**6
        for name, beyond in (("max-growth", exact + 1), ("min-sparsity", exact - 1)):
            assert is_within(name, exact / 10**9, limit), tenths
            assert not is_within(name, beyond / 10**9, limit), tenths


def test_every_tensor_must_follow_the_pattern(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = 'a.*'\nmin-nm = '2:4'\n", a=HALF_REGULAR)
    (gate,) = gates(prunectl(tmp_path, "check", "--json"))
    assert (gate["ok"], gate["actual"], gate["note"]) == (False, 0, "out.weight follows 2:4 least.")


def test_zeros_that_grew_back_are_counted(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = 'dense.*'\nkeep-zeros = 'a.safetensors'\n", a=MODEL, dense=DENSE)
    found = prunectl(tmp_path, "check", "--json")
    (gate,) = gates(found)
    assert (found.code, gate["actual"], gate["limit"]) == (1, np.count_nonzero(WEIGHT == 0), 0)
    assert "fc.weight" in gate["note"]


def test_flops_are_those_of_the_graph(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "digits_cnn.onnx", tmp_path)
    for limit, code in ((FLOPS, 0), (FLOPS - 1, 1)):
        put(tmp_path, f"[[budget]]\npath = '*.onnx'\nmax-flops = {limit}\n")
        assert prunectl(tmp_path, "check").code == code


def test_flops_of_a_layer_are_those_of_the_graph(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "digits_cnn.onnx", tmp_path)
    for limit, code in ((2 * 8192, 0), (2 * 8192 - 1, 1)):
        put(tmp_path, f"[[budget]]\npath = '*.onnx'\n[[budget.layer]]\nname = 'fc1'\nmax-flops = {limit}\n")
        assert prunectl(tmp_path, "check").code == code


def test_flops_of_a_file_without_a_graph_are_no_pass(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = 'a.*'\nmax-flops = '1G'\n", a=MODEL)
    found = prunectl(tmp_path, "check")
    assert (found.code, found.out) == (3, "")
    assert "no graph" in found.err


def test_flops_that_are_partly_unknown_are_no_pass_but_may_fail(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "weights_in_branches.onnx", tmp_path)
    put(tmp_path, "[[budget]]\npath = '*.onnx'\nmax-flops = '1G'\n")
    found = prunectl(tmp_path, "check")
    assert found.code == 3
    assert "operations of unknown shape" in found.err


def test_the_prefix_of_a_checkpoint_names_a_model(tmp_path: Path) -> None:
    for path in FIXTURES.glob("digits_cnn_checkpoint.*"):
        shutil.copy(path, tmp_path)
    put(tmp_path, "[[budget]]\npath = 'digits_cnn_checkpoint'\nmax-params = 9802\n")
    assert prunectl(tmp_path, "check").code == 0


def test_a_folder_is_a_model_as_well(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "digits_cnn_savedmodel", tmp_path / "models" / "net")
    put(tmp_path, f"[[budget]]\npath = 'models/*'\nmax-params = 9802\nmax-flops = {FLOPS}\n")
    assert prunectl(tmp_path, "check").code == 0


def test_one_unreadable_file_among_good_ones_is_told_and_the_others_are_judged(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = '*.safetensors'\nmax-raw = 1\n", a=MODEL, b=b"not a model", c=MODEL)
    found = prunectl(tmp_path, "check")
    assert found.code == 3
    assert [row[2] for row in found.rows] == ["a.safetensors", "c.safetensors"]
    assert "b.safetensors" in found.err


def test_a_glob_that_matches_nothing_is_a_slip_and_the_others_are_judged(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = 'b.*'\nmax-raw = 1\n[[budget]]\npath = 'a.*'\nmax-raw = 1\n", a=MODEL)
    found = prunectl(tmp_path, "check")
    assert (found.code, len(found.rows)) == (2, 1)
    assert "prunectl.toml:1: 'b.*' matches no file" in found.err


def test_a_layer_that_matches_nothing_is_a_slip(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = 'a.*'\n[[budget.layer]]\nname = 'fx*'\nmax-params = 1\n", a=MODEL)
    found = prunectl(tmp_path, "check")
    assert found.code == 2
    assert "matches 'fx*'" in found.err


def test_only_the_budgets_that_are_named_are_judged(tmp_path: Path) -> None:
    two = "[[budget]]\nname = '{0}'\npath = 'a.*'\nmax-raw = {1}\n"
    put(tmp_path, two.format("tight", 1) + two.format("wide", RAW), a=MODEL)
    assert prunectl(tmp_path, "check", "wide").code == 0
    assert prunectl(tmp_path, "check", "ti*").code == 1
    found = prunectl(tmp_path, "check", "wise")
    assert found.code == 2
    assert "did you mean: wide" in found.err


def test_the_json_has_raw_numbers_and_the_line_of_the_budget(tmp_path: Path) -> None:
    put(tmp_path, f"# sizes\n[[budget]]\npath = 'a.*'\nmessage = 'ask'\n\nmax-raw = {RAW - 1}\n", a=MODEL)
    found = prunectl(tmp_path, "check", "--json")
    (gate,) = gates(found)
    assert (gate["actual"], gate["limit"], gate["line"], gate["message"]) == (RAW, RAW - 1, 6, "ask")
    assert (gate["id"], gate["level"], gate["ok"], found.json["ok"]) == ("max-raw", "error", False, False)


def test_a_warning_is_no_reason_to_fail_in_json_either(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = 'a.*'\nmax-raw = {warn = 1}\n", a=MODEL)
    found = prunectl(tmp_path, "check", "--json")
    assert (found.code, found.json["ok"], gates(found)[0]["ok"]) == (0, True, False)


def test_the_baseline_is_written_with_a_reason_and_then_holds(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = '*.safetensors'\nmax-growth = '0%'\n", a=MODEL, b=DENSE)
    assert prunectl(tmp_path, "check", "--update-baseline", "--reason", "a new head").code == 0
    known = json.loads((tmp_path / "prunectl-baseline.json").read_text())["models"]
    assert known["a.safetensors"] == {
        "raw": RAW, "gzip": GZIP, "params": PARAMS, "prunable_zero": 16, "reason": "a new head",
        "tensors": {"fc.weight": [128, 16], "fc.bias": [16, 4]},
    }  # fmt: skip
    put(tmp_path, "[[budget]]\npath = '*.safetensors'\nmax-growth = '0%'\n", b=MODEL)
    assert prunectl(tmp_path, "check").code == int(known["b.safetensors"]["gzip"] < GZIP)
    assert prunectl(tmp_path, "check", "--update-baseline", "--reason", "again").code == 0
    again = json.loads((tmp_path / "prunectl-baseline.json").read_text())["models"]
    assert again["b.safetensors"]["gzip"] == GZIP


def test_a_baseline_that_is_made_keeps_what_it_knows(tmp_path: Path) -> None:
    put(tmp_path, "on-missing = 'create'\n[[budget]]\npath = '*.safetensors'\nmax-growth = '0%'\n", a=MODEL, b=MODEL)
    baseline(tmp_path, a=GZIP - 5)
    assert prunectl(tmp_path, "check").code == 1
    known = json.loads((tmp_path / "prunectl-baseline.json").read_text())["models"]
    assert [known[f"{name}.safetensors"]["gzip"] for name in "ab"] == [GZIP - 5, GZIP]


def git(folder: Path, *words: str) -> None:
    who = {f"GIT_{role}_{what}": "a@b.c" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, env=clean(**who))


def test_the_baseline_of_a_git_ref_is_that_of_its_commit(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    put(folder, "[[budget]]\npath = 'a.*'\nmax-growth = '0%'\n", a=MODEL)
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "before")
    git(tmp_path, "tag", "before")
    baseline(folder, a=GZIP - 1)
    git(tmp_path, "add", "models/prunectl-baseline.json")
    git(tmp_path, "commit", "-q", "-m", "sizes")
    baseline(folder, a=GZIP)
    assert prunectl(folder, "check").code == 0
    assert prunectl(folder, "check", "--baseline", "git:main").code == 1
    assert prunectl(folder, "check", "--baseline", "git:before").rows[0][0] == "warn"
    found = prunectl(folder, "check", "--baseline", "git:nowhere")
    assert found.code == 3
    assert "git does not know 'nowhere'" in found.err


@pytest.mark.parametrize(
    "words",
    [
        ("--update-baseline",),
        ("--reason", "why"),
        ("--update-baseline", "--reason", "why", "--baseline", "git:main"),
        ("--report", "junitt:x.xml"),
        ("--report", "junit"),
        ("--report", "junit:nowhere/x.xml"),
        ("--report", "json:a.safetensors"),
        ("--report", "json:-", "--report", "plain:-"),
        ("--json", "--report", "plain:-"),
        ("--config", "missing.toml"),
        ("--report", "json:prunectl-baseline.json"),
        ("--report", "json:prunectl.toml"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant_is_refused_before_any_work(words: tuple[str, ...], tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = 'a.*'\nmax-raw = 1\n", a=MODEL)
    baseline(tmp_path, a=1)
    assert prunectl(tmp_path, "check", *words).code == 2
    assert (tmp_path / "a.safetensors").read_bytes() == MODEL


def test_a_damaged_baseline_is_unreadable_input(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = 'a.*'\nmax-growth = '1%'\n", a=MODEL)
    for text in ("{", "[]", '{"models": {}}', '{"schema": "prunectl.baseline/1", "models": {"a": {"gzip": "x"}}}'):
        (tmp_path / "prunectl-baseline.json").write_text(text)
        assert prunectl(tmp_path, "check").code == 3


def test_a_terminal_shows_first_what_needs_a_look(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = 'a.*'\nmax-raw = '1MB'\nmax-gzip = 1\nmax-params = {warn = 1}\n", a=MODEL)
    shown = prunectl(tmp_path, "check", "--format", "human").out
    assert shown.startswith("prunectl.toml: 1 failed, 1 warned, 1 passed; 1 model measured")
    words = [line.split()[0] for line in shown.splitlines() if "a.safetensors" in line and line[0] not in "* "]
    assert words == ["FAIL", "warn", "pass"]


def grown(folder: Path, keys: str = "max-growth = '2%'\nmax-gzip = 100") -> Path:
    """Write a model that has grown since its baseline, and one that the baseline lacks."""
    budget = "[[budget]]\npath = '{}.safetensors'\n{}\n"
    numbers = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    big = save({"big": numbers, "bias": BIAS, "middle": numbers[:8], "small": numbers[:2]})
    put(folder, budget.format("a", keys) + budget.format("b", "max-growth = '1%'"), a=big, b=MODEL)
    baseline(folder, a=GZIP)
    return folder


def test_a_failure_is_told_once_with_what_was_before_and_what_can_be_done(tmp_path: Path) -> None:
    shown = prunectl(grown(tmp_path), "check", "--format", "human").out
    lines = [line.split() for line in shown.splitlines()]
    assert ["verdict", "gate", "model", "before", "actual", "limit"] in lines
    (row,) = (line for line in lines if line[:2] == ["FAIL", "max-gzip"])
    assert row[2:5] == ["a.safetensors", str(GZIP), "B"]
    assert shown.count("max-gzip") == 2, "in the table, and in what can be done"
    told = " ".join(shown.split())
    assert "* The baseline has no sizes of single tensors; the largest of a.safetensors are big (16.4 kB), " in told
    assert "middle (2.05 kB), small (512 B)." in told
    assert "* Prune again, or raise max-gzip (prunectl.toml:4)." in told
    assert told.count('prunectl check --update-baseline --reason "…"') == 1


def test_a_terminal_colours_verdicts(tmp_path: Path) -> None:
    shown = at_terminal("check", "--config", grown(tmp_path) / "prunectl.toml").out
    assert "\x1b[1;31mFAIL" in shown
    assert "\x1b[33mwarn" in shown
    assert all(len(line) <= 80 for line in without_colors(shown).splitlines()[1:] if str(tmp_path.name) not in line)


def test_a_narrow_terminal_keeps_what_was_measured_and_the_limit(tmp_path: Path) -> None:
    config = grown(tmp_path) / "prunectl.toml"
    shown = without_colors(at_terminal("check", "--config", config, columns=60).out)
    assert ["verdict", "gate", "model", "actual", "limit"] in [line.split() for line in shown.splitlines()]
    assert "--update-baseline" in shown, "no option is broken at a hyphen"


def test_a_log_has_a_sentence_for_each_failure(tmp_path: Path) -> None:
    said = prunectl(grown(tmp_path), "check").err
    (line,) = (line for line in said.splitlines() if "(max-gzip" in line and line.startswith("FAIL: "))
    assert line.startswith("FAIL: a.safetensors is 15.")
    assert f" kB over the limit of 100 B (max-gzip; {GZIP} B in the baseline)." in line
    assert "note: a.safetensors: It was 131 B gzipped in the baseline, and is 15." in said


def test_a_limit_on_a_tensor_names_it_and_its_model(tmp_path: Path) -> None:
    layer = "[[budget.layer]]\nname = 'fc*'\nmax-sparsity = 0.4\n[[budget.layer]]\nname = 'fc*'\nmin-sparsity = 0.6\n"
    put(tmp_path, f"[[budget]]\npath = 'a.*'\n{layer}", a=MODEL)
    said = prunectl(tmp_path, "check").err
    assert "FAIL: 50.0 % of fc.weight in a.safetensors is zero, 10 pp over the limit of 40.0 % (max-sparsity)." in said
    assert "FAIL: 50.0 % of fc.weight in a.safetensors is zero, 10 pp below the limit of 60.0 % (min-sparsity)." in said


def test_a_model_that_the_baseline_lacks_has_no_limit_of_nothing_on_the_screen(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = 'a.*'\nmax-growth = '1%'\n", a=MODEL)
    found = prunectl(tmp_path, "check", "--format", "human")
    assert found.code == 0
    assert "0 B" not in found.out
    told = " ".join(found.out.replace("\n  ", " ").split())
    assert "* a.safetensors is not in prunectl-baseline.json, so its growth was not checked. " in told
    assert '* Add it: prunectl check --update-baseline --reason "…"' in told
    (gate,) = gates(prunectl(tmp_path, "check", "--json"))
    assert (gate["actual"], gate["limit"], gate["unit"]) == (GZIP, 0, "bytes")
    assert set(gate) == {
        "id", "metric", "limit", "actual", "ok", "model", "level",
        "unit", "budget", "tensor", "line", "note", "message",
    }  # fmt: skip


def test_many_models_that_the_baseline_lacks_take_one_sentence(tmp_path: Path) -> None:
    models = {f"m{number}": MODEL for number in range(5)}
    put(tmp_path, "[[budget]]\npath = '*.safetensors'\nmax-growth = '1%'\n", **models)
    said = prunectl(tmp_path, "check").err
    assert "m0.safetensors, m1.safetensors, m2.safetensors and 2 more are not in prunectl-baseline.json" in said
    assert said.count("--update-baseline") == 1


@pytest.mark.parametrize("name", ["markdown", "github", "gitlab", "junit", "sarif", "human"])
def test_every_report_tells_what_can_be_done(name: str, tmp_path: Path) -> None:
    told = unescape(prunectl(grown(tmp_path), "check", "--report", f"{name}:-").out).replace("\\", "")
    assert "Prune again, or raise max-gzip (prunectl.toml:4)" in told
    assert "the largest of a.safetensors are big (16.4 kB), middle (2.05 kB), small (512 B)." in told
    assert "prunectl check --update-baseline --reason" in told
    assert "so its growth was not checked." in told
    assert "limit of 0 B" not in told
    if name == "markdown":
        assert "|  | gate | model | before | actual | limit |" in told
        assert f"| ❌ fail | max-gzip | a.safetensors | {GZIP} B | 15." in told


def test_the_way_out_names_the_file_and_the_budgets_that_were_checked(tmp_path: Path) -> None:
    grown(tmp_path)
    (tmp_path / "my sizes.json").write_bytes((tmp_path / "prunectl-baseline.json").read_bytes())
    words = ("check", "a.*", "--config", "prunectl.toml", "--baseline", "my sizes.json")
    command = "prunectl check 'a.*' --config prunectl.toml --baseline 'my sizes.json' --update-baseline --reason"
    assert command in prunectl(tmp_path, *words).err


def test_what_was_before_is_told_when_the_baseline_is_updated(tmp_path: Path) -> None:
    grown(tmp_path, "max-gzip = '1MB'")
    shown = prunectl(tmp_path, "check", "--update-baseline", "--reason", "why", "--format", "human").out
    (row,) = (line.split() for line in shown.splitlines() if "max-gzip" in line)
    assert row[3:5] == [str(GZIP), "B"]


def test_two_hundred_small_models_take_less_than_five_seconds_and_no_framework(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for number in range(50):
        for suffix in (".h5", ".keras", ".pt", ".onnx"):
            shutil.copy(FIXTURES / f"digits_cnn{suffix}", tmp_path / "models" / f"{number:02}{suffix}")
    keys = "max-raw = '1MB'\nmax-gzip = '1MB'\nmax-params = '1M'\nmin-sparsity = 0\nmax-growth = '2%'"
    put(tmp_path, f"[[budget]]\npath = 'models/*'\n{keys}\n")
    code = "import sys\nsys.argv = ['prunectl', 'check']\nfrom prunectl.cli import main\nmain()\n"
    code += "print(*sys.modules, file=sys.stderr)"
    words, began = [sys.executable, "-c", code], resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        words, cwd=tmp_path, env=clean(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=True
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor's time, that of its children with it, as other work may go on beside this.
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 5
    assert len(done.stdout.splitlines()) == 1000
    loaded = {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}
    assert not {"tensorflow", "keras", "tf_keras", "torch", "onnx", "onnxruntime", "scipy", "pandas"} & loaded


def test_the_same_in_a_process_of_its_own(tmp_path: Path) -> None:
    put(tmp_path, f"[[budget]]\npath = 'a.*'\nmax-raw = {RAW - 1}\n", a=MODEL)
    found = in_its_own_process("check", cwd=tmp_path)
    assert (found.code, found.rows[0][:3]) == (1, ["FAIL", "max-raw", "a.safetensors"])
