"""`prunectl check`: do the models keep to their budgets?"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from prunectl.checks import baseline
from prunectl.checks import config as checks_config
from prunectl.checks.baseline import GIT, Baseline
from prunectl.checks.check import check as run
from prunectl.checks.check import with_limits
from prunectl.checks.parse import Budgets, read
from prunectl.checks.rules import Findings
from prunectl.commands._command import STDIN, make_command
from prunectl.errors import PrunectlError, UsageError, attempt, writing
from prunectl.formats import atomic
from prunectl.formats.base import close_matches
from prunectl.formats.registry import recognise
from prunectl.reporting.check import check_report
from prunectl.reporting.ci import REPORT_FORMATS
from prunectl.reporting.reporter import Reporter, print_error
from prunectl.reporting.stdout import data_stream
from prunectl.units import parse_duration

_ROOTS = ("GITHUB_WORKSPACE", "CI_PROJECT_DIR")
"""Variables in which CI services name the folder of the repository; annotations need paths relative to it."""


def load_budgets(
    config: Path | None, names: Sequence[str] = (), max_latency: str = "", min_speedup: float | None = None
) -> Budgets:
    """The budgets of the given file, or of the nearest one, with the limits of the command line."""
    seconds = parse_duration(max_latency) if max_latency else None
    file = checks_config.find_config(Path.cwd()) if config is None else checks_config.load_config(config)
    return with_limits(read(file), names, seconds, min_speedup)


def load_baseline(budgets: Budgets, location: str, *, is_new: bool, reason: str) -> Baseline:
    """The baseline to compare with, or a new one to write."""
    if is_new and location.startswith(GIT):
        raise UsageError("a baseline in git cannot be updated", hint="name a file with --baseline FILE, and commit it")
    if is_new != bool(reason.strip()):
        raise UsageError(
            "--update-baseline needs --reason, and --reason needs --update-baseline",
            hint="write --update-baseline --reason 'a better tokenizer'",
        )
    default = budgets.folder / budgets.baseline
    return baseline.read(location, default if not location or location.startswith(GIT) else Path(location))


def ci_path(path: Path) -> str:
    """A path relative to the repository of a CI service, else relative to the current folder."""
    for name in _ROOTS:
        root = os.environ.get(name, "")
        if root and path.absolute().is_relative_to(root):
            return path.absolute().relative_to(root).as_posix()
    return os.path.relpath(path)


STDOUT = STDIN
_STDOUT_PATHS = frozenset({"/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"})
_SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable that names the file of the job summary on GitHub."""


@dataclass(frozen=True, slots=True)
class Reports:
    """Which reports go where."""

    targets: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, options: list[str], *, is_json: bool) -> Reports:
        """Parse and check the options before any work begins."""
        targets = tuple(map(_split, options))
        paths = [path for _, path in targets]
        for path in paths:
            if paths.count(path) > 1:
                raise UsageError(f"two reports would be written to {path}")
            if path == STDOUT:
                continue
            atomic.check_parent(Path(path))
            if _is_user_file(Path(path)):
                raise UsageError(
                    f"{path} cannot hold a report: it is not a file",
                    hint="name a file, such as --report junit:check.xml",
                )
        if is_json and STDOUT in paths:
            raise UsageError(
                "--json and a report on standard output cannot be used together",
                hint="use --report json:FILE, or leave out --json",
            )
        return cls(targets)

    def protect(self, *paths: Path | None) -> None:
        """Refuse a report that would replace an input."""
        inputs = {path.resolve() for path in paths if path is not None}
        for _, target in self.targets:
            if target != STDOUT and Path(target).resolve() in inputs:
                raise UsageError(
                    f"{target} cannot hold a report: it is not a file",
                    hint="name a file, such as --report json:check.json",
                )

    def emit(self, findings: Findings, reporter: Reporter) -> int:
        """Write all reports; the usual output is not printed if one of them goes to standard output."""
        stdout_text = ""
        for name, target in self.targets:
            text = REPORT_FORMATS[name](findings)
            if target == STDOUT:
                stdout_text = text
            else:
                _write(Path(target), text)
            if name == "github" and os.environ.get(_SUMMARY):
                summary_path = Path(os.environ[_SUMMARY])
                with writing(summary_path), summary_path.open("a", encoding="utf-8") as summary:
                    summary.write(REPORT_FORMATS["markdown"](findings))
        report = check_report(findings, has_gates=reporter.is_json)
        if STDOUT not in {target for _, target in self.targets}:
            return reporter.show(report)
        data_stream().write(stdout_text)
        data_stream().flush()
        for failure in report.failures:
            print_error(failure.error, reporter.settings.color)
        return report.exit_code


def _split(option: str) -> tuple[str, str]:
    name, colon, path = option.partition(":")
    if name not in REPORT_FORMATS:
        raise UsageError(
            f"there is no report format {name!r}",
            did_you_mean=close_matches(name, list(REPORT_FORMATS)),
            hint=f"reports: {', '.join(REPORT_FORMATS)}",
        )
    if not colon or not path:
        raise UsageError(f"--report {name} names no file", hint=f"write --report {name}:PATH; - is standard output")
    return name, STDOUT if path in _STDOUT_PATHS else path


def _is_user_file(path: Path) -> bool:
    """Whether a path holds a file of the user that a report must not replace."""
    return (
        path.is_dir()
        or path.suffix == ".toml"
        or (path.is_file() and not isinstance(attempt(recognise, path), PrunectlError))
    )


def _write(path: Path, text: str) -> None:
    if atomic.is_device(path):
        # It has no place that could be taken. What it leads to may have lines already.
        with writing(path), path.open("a", encoding="utf-8") as device:
            device.write(text)
        return
    atomic.write_text(path, text, is_forced=True)


def check(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Budgets to check, by name or glob; else all.")
    ] = None,
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File with the budgets; else the nearest prunectl.toml or pyproject.toml upwards."
        ),
    ] = None,
    report: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT:PATH",
            help=f"Also write a report, e.g. junit:check.xml, or to standard output (-): {', '.join(REPORT_FORMATS)}.",
        ),
    ] = None,
    baseline: Annotated[
        str, typer.Option(metavar="FILE|git:REF", help="Earlier sizes to compare with: FILE, or git:main.")
    ] = "",
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Store the current sizes as the baseline.")
    ] = False,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why the baseline changes; stored with it.")] = "",
    max_latency: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="Longest median time of a run of each model, e.g. 5ms, as bench measures it."
        ),
    ] = "",
    min_speedup: Annotated[
        float | None,
        typer.Option(metavar="FACTOR", help="Lowest speed-up of budgets with min-speedup, e.g. 1.2.", min=0.0),
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Allow code in a model or in the budgets to run.")] = False,
) -> int:
    r"""Check models against their budgets: size, growth, sparsity, zeros, accuracy, latency.

    Budgets are in prunectl.toml, or in the tool.prunectl table of pyproject.toml. Exit code 1 if a model exceeds a
    limit; warnings alone are exit code 0.

    [dim]$[/] prunectl init

    [dim]$[/] prunectl check

    [dim]$[/] prunectl check --report junit:check.xml --report markdown:-

    [dim]$[/] prunectl check --update-baseline --reason 'new head'
    """
    reporter: Reporter = ctx.obj
    reports = Reports.of(report or [], is_json=reporter.is_json)
    budgets = load_budgets(config, names or (), max_latency, min_speedup)
    earlier = load_baseline(budgets, baseline, is_new=update_baseline, reason=reason)
    reports.protect(budgets.path, earlier.path)
    file, bar = ci_path(budgets.path), reporter.progress
    findings = run(budgets, names or [], earlier, file=file, reason=reason, is_trusted=trust, meter=bar)
    accept = _accept_command(names or [], config, baseline)
    return reports.emit(replace(findings, accept_command=accept, command_line=reporter.command_line), reporter)


def _accept_command(names: list[str], config: Path | None, location: str) -> str:
    """The command that makes the checked state the new baseline."""
    options = [] if config is None else ["--config", str(config)]
    # A baseline in a git commit is updated as a file, and then committed.
    options += ["--baseline", location] if location and not location.startswith(GIT) else []
    return f'{shlex.join(["prunectl", "check", *names, *options])} --update-baseline --reason "…"'


command = make_command(check)
