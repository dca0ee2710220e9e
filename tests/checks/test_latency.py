"""`max-latency` and `min-speedup` in budgets: measured as `bench` does, judged by the interval."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from prunectl import api
from prunectl.analysis.timing import Interval, Latency
from prunectl.checks import running, schema
from prunectl.exporting.bench import BenchedModel, Benchmark, BenchRequest
from tests.checks.checking import gates, prunectl, put
from tests.checks.shapes import slips
from tests.running import FIXTURES

SPEEDUP = "min-speedup = {fail = 1.2, against = 'dense.onnx'}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with two models."""
    for name in ("dense.onnx", "small.onnx"):
        shutil.copy(FIXTURES / "digits_cnn.onnx", tmp_path / name)
    return tmp_path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], BenchRequest]]:
    """Let every run take 4.8 to 5.2 ms, 1.15 to 1.25 times as fast as the first, and return what is measured."""
    calls = []

    def bench(paths: list[Path], request: BenchRequest) -> Benchmark:
        calls.append(([path.name for path in paths], request))
        models = tuple(BenchedModel(str(path), "onnxruntime", 10, 0.0, None) for path in paths)
        one = Latency(Interval(5e-3, 4.8e-3, 5.2e-3), 4.7e-3, 100, Interval(1.2, 1.15, 1.25))
        return Benchmark(models, {1: (one,) * len(paths)}, request.threads)

    monkeypatch.setattr(running, "bench", bench)
    return calls


def budget(folder: Path, *limits: str) -> None:
    put(folder, "\n".join(["[[budget]]", "path = 'small.onnx'", *limits]))


@pytest.mark.parametrize(
    ("limit", "verdict", "code"),
    [
        ("max-latency = '6ms'", "pass", 0),
        ("max-latency = '4ms'", "FAIL", 1),
        ("max-latency = {warn = '4ms'}", "warn", 0),
        ("max-latency = {fail = '9ms', warn = '4ms'}", "warn", 0),
        ("min-speedup = {fail = 1.1, against = 'dense.onnx'}", "pass", 0),
        ("min-speedup = {fail = 2, against = 'dense.onnx'}", "FAIL", 1),
        ("min-speedup = {fail = 1, warn = 2, against = 'dense.onnx'}", "warn", 0),
    ],
)
def test_the_verdict_is_that_of_the_interval(
    limit: str, verdict: str, code: int, folder: Path, measured: list[tuple[list[str], BenchRequest]]
) -> None:
    budget(folder, limit)
    found = prunectl(folder, "check")
    assert found.code == code
    assert found.rows[0][:3] == [verdict, limit.split(" ", maxsplit=1)[0], "small.onnx"]
    assert [names for names, _ in measured] == [["dense.onnx"] * ("against" in limit) + ["small.onnx"]]


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("max-latency = '5.1ms'", "a run takes 4.80 ms to 5.20 ms, too near max-latency = 5.10 ms"),
        (SPEEDUP, "it is 1.15 to 1.25 times as fast, too near min-speedup = 1.2"),
    ],
)
@pytest.mark.usefixtures("measured")
def test_noise_that_is_larger_than_the_margin_is_no_verdict(limit: str, said: str, folder: Path) -> None:
    budget(folder, limit)
    found = prunectl(folder, "check")
    assert found.code == 5
    assert f"prunectl.toml:3: small.onnx cannot be judged: {said}" in found.err


@pytest.mark.usefixtures("measured")
def test_reports_for_services_say_what_was_measured(folder: Path) -> None:
    budget(folder, "max-latency = '4ms'", "min-speedup = {fail = 2, against = 'dense.onnx'}")
    found = prunectl(folder, "check", "--json", "--report", "junit:j.xml", "--report", "github:g.txt")
    slow, few = gates(found)
    assert (slow["id"], slow["unit"], slow["actual"], slow["limit"]) == ("max-latency", "seconds", 5e-3, 4e-3)
    assert (few["id"], few["unit"], few["actual"], few["limit"]) == ("min-speedup", "factor", 1.2, 2.0)
    cases = [case.get("message") for case in ET.parse(folder / "j.xml").getroot().iter("failure")]
    assert cases == [
        (
            "a run of small.onnx takes 5.00 ms, 1.00 ms over the limit of 4.00 ms (max-latency). "
            "The 95 % interval is 4.80 ms to 5.20 ms (onnxruntime, batch size 1, threads 1)."
        ),
        (
            "small.onnx is 1.20 times as fast, 0.8 below the limit of 2 (min-speedup). "
            "The 95 % interval is 1.15 to 1.25 (onnxruntime, batch size 1, threads 1)."
        ),
    ]
    assert "Prune channels (--pattern channel), or raise max-latency" in (folder / "g.txt").read_text()


def test_options_of_the_measurement_and_limits_of_the_command_line(
    folder: Path, measured: list[tuple[list[str], BenchRequest]]
) -> None:
    budget(folder, "max-latency = {fail = '1ms', batch-size = 16, threads = 2, seconds = 0.5, input = 'x:1,1,8,8'}")
    assert prunectl(folder, "check", "--max-latency", "6ms").code == 0
    ((_, request),) = measured
    assert (request.batch_size, request.threads, request.seconds) == ((16,), 2, 0.5)
    assert request.input[0].name == "x"
    budget(folder, "max-raw = '1GB'", "min-speedup = {fail = 2, against = 'dense.onnx'}")
    assert prunectl(folder, "check", "--max-latency", "4ms", "--min-speedup", "1.1").code == 1
    assert api.check(config=folder / "prunectl.toml", max_latency="6ms", min_speedup=1.1).is_ok
    budget(folder, "max-raw = '1GB'")
    found = prunectl(folder, "check", "--min-speedup", "1.1")
    assert found.code == 2
    assert "--min-speedup needs a budget that names the model to compare with" in found.err


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("max-latency = 5", "prunectl.toml:3: max-latency must be a table"),
        ("max-latency = '5'", "prunectl.toml:3: '5' is not a time"),
        ("max-latency = {threads = 2}", "a limit needs fail, warn or both"),
        ("max-latency = {fail = '1ms', warn = '2ms'}", "the fail limit is stricter than the warn limit"),
        ("max-latency = {fail = '1ms', threads = 0}", "threads must be at least 1"),
        ("min-speedup = {fail = 1.2}", "'against' is missing"),
        ("min-speedup = {fail = 'x', against = 'a'}", "'x' is not a number above 0"),
        ("max-latency = {fail = '9s', model = 'net.py:Net'}", "max-latency names code that prunectl would run"),
    ],
)
def test_slips_are_told_with_their_line(limit: str, said: str, folder: Path) -> None:
    budget(folder, limit)
    found = prunectl(folder, "check")
    assert found.code in {2, 3}
    assert said in found.err


def test_the_schema_knows_both() -> None:
    def of(limits: dict[str, object]) -> list[str]:
        return slips({"budget": [{"path": "a", **limits}]}, schema.schema())

    assert of({"max-latency": "5ms", "min-speedup": {"fail": 1.2, "against": "a.onnx"}}) == []
    assert of({"max-latency": {"fail": "5ms", "warn": "4ms", "batch-size": 16}}) == []
    assert of({"max-latency": 5}) != []
    assert of({"min-speedup": {"fail": 1.2}}) != []


def test_a_model_is_really_run(folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    budget(
        folder,
        "max-latency = {fail = '100s', seconds = 0.1}",
        "min-speedup = {fail = 1000, against = 'dense.onnx', seconds = 0.1}",
    )
    found = prunectl(folder, "check")
    assert found.code == 1
    assert [row[0] for row in found.rows] == ["pass", "FAIL"]
