"""Reports, each held against the format that it claims to be."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from safetensors.numpy import save

from prunectl.checks.rules import ERROR, WARNING, CheckError, Finding, Findings
from prunectl.checks.schema import MetricUnit
from prunectl.errors import InputError
from prunectl.reporting.ci import REPORT_FORMATS
from tests.checks.checking import MODEL, RAW, prunectl, put
from tests.checks.shapes import slips
from tests.checks.specs import GITLAB, SARIF, junit_slips, openmetrics_samples

STRANGE = 'a "b" <c> & | %0A:,\\ \n\x1b[31m\x00 é 😀.h5'
"""A name that means something to every format."""
FAILED = Finding("max-gzip", "bytes.compressed", 1000, 1001, False, "m.h5", ERROR, MetricUnit.BYTES, "digits", "", 7)
WARNED = Finding(
    "max-growth", "bytes.compressed", 0.02, 0.5, False, STRANGE, WARNING, MetricUnit.RATIO, STRANGE, "", 9,
    "It was 10 bytes.", STRANGE,
)  # fmt: skip
PASSED = Finding("min-sparsity", "sparsity", 0.5, 0.75, True, "m.h5", ERROR, MetricUnit.RATIO, "digits", "fc.weight", 3)
BROKEN = CheckError("digits", STRANGE, 4, InputError(f"{STRANGE} is truncated", hint="<again>"))
FINDINGS = {
    "all kinds": Findings("models/a b.toml", (FAILED, WARNED, PASSED), (BROKEN,), (STRANGE,), 2),
    "all well": Findings("prunectl.toml", (PASSED,), models=1),
    "warnings": Findings("prunectl.toml", (PASSED, WARNED), models=1),
    "one tensor twice": Findings("prunectl.toml", (PASSED, FAILED, FAILED), models=1),
    "nothing": Findings("prunectl.toml", ()),
}
every = pytest.mark.parametrize("found", FINDINGS.values(), ids=FINDINGS)


@every
def test_sarif_is_that_of_the_specification(found: Findings) -> None:
    log = json.loads(REPORT_FORMATS["sarif"](found))
    assert slips(log, SARIF) == []
    (run,) = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(rules[result["ruleIndex"]] == result["ruleId"] for result in run["results"])
    assert len(run["results"]) == len(found.failed) + len(found.warned) + len(found.errors)
    places = [result["locations"][0]["physicalLocation"] for result in run["results"]]
    assert {unquote(place["artifactLocation"]["uri"]) for place in places} <= {found.file}


def test_sarif_has_the_line_of_the_budget_and_raw_numbers() -> None:
    first, second, third = json.loads(REPORT_FORMATS["sarif"](FINDINGS["all kinds"]))["runs"][0]["results"]
    assert [one["locations"][0]["physicalLocation"]["region"]["startLine"] for one in (first, second, third)] == [
        7,
        9,
        4,
    ]
    assert [one["level"] for one in (first, second, third)] == ["error", "warning", "error"]
    assert (first["properties"]["actual"], first["properties"]["limit"]) == (1001, 1000)


@every
def test_gitlab_code_quality_is_that_of_the_specification(found: Findings) -> None:
    issues = json.loads(REPORT_FORMATS["gitlab"](found))
    assert slips(issues, GITLAB) == []
    marks = [issue["fingerprint"] for issue in issues]
    assert len(set(marks)) == len(set(found.failed)) + len(set(found.warned)) + len(found.errors)


@every
def test_junit_is_that_of_the_specification(found: Findings) -> None:
    text = REPORT_FORMATS["junit"](found)
    assert junit_slips(text) == []
    assert len(list(ET.fromstring(text).iter("testcase"))) == len(found.findings) + len(found.errors)


def test_junit_keeps_names_as_far_as_xml_can() -> None:
    cases = list(ET.fromstring(REPORT_FORMATS["junit"](FINDINGS["all kinds"])).iter("testcase"))
    shown = STRANGE.replace("\x1b", "\ufffd").replace("\x00", "\ufffd")
    assert cases[1].get("name") == f"max-growth {shown}"
    assert cases[1].find("failure") is None
    assert cases[0].find("failure") is not None


@every
def test_openmetrics_is_that_of_the_grammar(found: Findings) -> None:
    samples = openmetrics_samples(REPORT_FORMATS["openmetrics"](found))
    assert samples["prunectl_check_exit_code", ""] == found.exit_code
    assert samples["prunectl_check_unusable", ""] == len(found.errors)
    verdicts = [value for (name, _), value in samples.items() if name == "prunectl_gate_ok"]
    assert 0.0 in verdicts if found.failed or found.warned else 0.0 not in verdicts


def test_openmetrics_tells_the_limit_that_says_no_where_two_are_alike() -> None:
    warned = replace(FAILED, level=WARNING, limit=900)
    samples = openmetrics_samples(REPORT_FORMATS["openmetrics"](Findings("f", (warned, FAILED))))
    assert [value for (name, _), value in samples.items() if name == "prunectl_gate_limit"] == [1000]


@every
def test_annotations_are_workflow_commands_one_a_line(found: Findings) -> None:
    lines = REPORT_FORMATS["github"](found).splitlines()
    assert len(lines) == len(found.failed) + len(found.warned) + len(found.errors)
    for line in lines:
        command = re.fullmatch(r"::(error|warning) file=([^:,]+),line=(\d+),title=([^:,]*)::(.+)", line)
        assert command
        assert command[2] == found.file
        # Every percent sign is part of an escape.
        assert re.fullmatch(r"(?:[^%]|%(?:25|0D|0A|3A|2C))*", line)


@every
def test_markdown_has_a_table_whose_cells_are_told_apart(found: Findings) -> None:
    text = REPORT_FORMATS["markdown"](found)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)
    assert "<c>" not in text
    assert "\x1b" not in text
    # A table needs an empty line before it.
    assert all(before == "" for before, line in zip(text.splitlines(), text.splitlines()[1:], strict=False)
               if line.startswith("|  |"))  # fmt: skip


@every
def test_the_json_is_the_envelope(found: Findings) -> None:
    said = json.loads(REPORT_FORMATS["json"](found))
    assert (said["schema"], said["command"]) == ("prunectl.report/1", "check")
    assert (said["exit_code"], len(said["gates"])) == (found.exit_code, len(found.findings))


@every
def test_plain_and_human_have_a_line_for_each(found: Findings) -> None:
    assert len(REPORT_FORMATS["plain"](found).splitlines()) == len(found.findings)
    assert all(len(line.split("\t")) == 8 for line in REPORT_FORMATS["plain"](found).splitlines())
    shown = REPORT_FORMATS["human"](found)
    lines = [line for line in shown.splitlines() if not line.startswith("note ")]
    assert len(lines) == len(found.findings) + len(found.errors) + 1
    assert all(f"note   {note[:4]}" in shown for note in found.notes)
    assert "\x1b" not in shown


def test_numbers_that_look_alike_are_told_to_the_byte() -> None:
    found = Finding("max-raw", "bytes.raw", 1_000_000, 1_000_001, False, "m.h5", ERROR, MetricUnit.BYTES)
    assert "is 1,000,001 B on disk, 1 B over the limit of 1,000,000 B" in REPORT_FORMATS["human"](
        Findings("f", (found,))
    )


def test_several_reports_are_written_at_once(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = 'a.*'\nmax-raw = 1\n", a=MODEL)
    words = [word for name in REPORT_FORMATS for word in ("--report", f"{name}:{name}.out")]
    found = prunectl(tmp_path, "check", *words)
    assert (found.code, len(found.rows)) == (1, 1)
    for name in REPORT_FORMATS:
        assert (tmp_path / f"{name}.out").read_text(), name
    again = prunectl(tmp_path, "check", *words)
    assert again.code == 1


def test_a_report_to_standard_output_is_one_by_each_of_its_names(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = 'a.*'\nmax-raw = 1\n", a=MODEL)
    under_dash = prunectl(tmp_path, "check", "--report", "sarif:-")
    assert prunectl(tmp_path, "check", "--report", "sarif:/dev/stdout").out == under_dash.out != ""


def test_a_report_to_standard_output_is_all_that_is_there(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = '*.safetensors'\nmax-raw = 1\n", a=MODEL, b=b"none")
    found = prunectl(tmp_path, "check", "--report", "sarif:-")
    assert slips(json.loads(found.out), SARIF) == []
    assert (found.code, "error: b.safetensors" in found.err) == (3, True)


def test_the_summary_of_a_github_step_is_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "[[budget]]\npath = 'a.*'\nmax-raw = 1\n", a=MODEL)
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    prunectl(tmp_path, "check")
    assert summary.read_text() == "before\n"
    found = prunectl(tmp_path, "check", "--report", "github:-")
    assert found.out.startswith("::error file=prunectl.toml,line=3,")
    assert summary.read_text().startswith("before\n<!-- prunectl check -->\n## ❌")


def test_annotations_name_the_file_as_the_repository_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "models"
    inner.mkdir()
    put(inner, "[[budget]]\npath = 'a.*'\nmax-raw = 1\n", a=MODEL)
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    assert prunectl(inner, "check", "--report", "github:-").out.startswith("::error file=models/prunectl.toml,line=3,")


def test_quiet_prints_what_failed_alone(tmp_path: Path) -> None:
    put(tmp_path, f"[[budget]]\npath = 'a.*'\nmax-raw = {RAW}\nmax-gzip = 1\n", a=MODEL)
    assert prunectl(tmp_path, "check", "-q").out.startswith(
        "a.safetensors is 131 B gzipped, 130 B over the limit of 1 B"
    )


@pytest.mark.parametrize("name", ["markdown", "github", "junit", "human"])
def test_a_baseline_tells_which_tensors_grew_most_or_lost_zeros(name: str, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    sparse = np.where(np.abs(numbers) < 1.5, 0, numbers).astype(np.float32)
    keys = "[[budget]]\npath = 'a.safetensors'\nmax-growth = '2%'\n"
    put(tmp_path, keys, a=save({"kept": numbers[:32], "thinned": sparse, "cut": numbers[:8]}))
    assert prunectl(tmp_path, "check", "--update-baseline", "--reason", "first").code == 0
    put(tmp_path, keys, a=save({"kept": numbers[:32], "thinned": numbers, "cut": numbers[:8]}))
    zeros = int((sparse == 0).sum())
    told = unescape(prunectl(tmp_path, "check", "--report", f"{name}:-").out).replace("\\", "")
    assert f"The tensors that lost most zeros: thinned ({zeros:,} fewer)." in told
    put(tmp_path, keys, a=save({"kept": numbers[:32], "thinned": sparse, "cut": numbers, "new": numbers[:16]}))
    told = unescape(prunectl(tmp_path, "check", "--report", f"{name}:-").out).replace("\\", "")
    assert "The tensors that grew most: cut (+14.3 kB), new (+4.10 kB)." in told


@pytest.mark.parametrize("tensors", ['"x"', '{"a": 1}', '{"a": [1]}', '{"a": [-1, 0]}', '{"a": [true, 0]}'])
def test_a_baseline_with_damaged_tensors_is_refused(tensors: str, tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = 'a.safetensors'\nmax-growth = '2%'\n", a=MODEL)
    numbers = '"gzip": 1, "params": 1, "prunable_zero": 0, "raw": 1, "reason": ""'
    text = f'{{"schema": "prunectl.baseline/1", "models": {{"a.safetensors": {{{numbers}, "tensors": {tensors}}}}}}}'
    (tmp_path / "prunectl-baseline.json").write_text(text)
    refused = prunectl(tmp_path, "check")
    assert refused.code == 3
    assert "its entry for a.safetensors has no valid numbers" in refused.err
