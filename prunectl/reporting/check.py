"""What `check` says, drawn from its findings."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from prunectl.analysis.sizes import LimitTexts, limit_sentence, percentage_points
from prunectl.checks.rules import Finding, Findings
from prunectl.checks.schema import MetricUnit
from prunectl.errors import abbreviated
from prunectl.reporting.report import Cell, Column, Failure, Report, Section, Table, Unit, report_json, tab_separated
from prunectl.units import Units, count, duration, nbytes, percent, printable


def number(value: float, unit: MetricUnit, units: Units = Units.SI) -> str:
    """Format a measured value, or its limit, in its unit."""
    if unit is MetricUnit.RATIO:
        return f"-{percent(-value)}" if value < 0 else percent(value)
    if unit is MetricUnit.BYTES:
        return f"-{nbytes(-int(value), units)}" if value < 0 else nbytes(int(value), units)
    if unit is MetricUnit.POINTS:
        return f"{100 * value:.3g} pp"
    if unit is MetricUnit.NUMBER:
        return f"{value:.4g}"
    if unit is MetricUnit.SECONDS:
        return duration(value)
    if unit is MetricUnit.FACTOR:
        return f"{value:.2f}x"
    return count(int(value))


def subject(finding: Finding) -> str:
    """The thing that the limit is about."""
    return f"{finding.model}: {finding.tensor}" if finding.tensor else finding.model


def actual_and_limit(finding: Finding, units: Units = Units.SI) -> tuple[str, str]:
    """Format a measured value and its limit, with more digits where rounding would make them equal."""
    actual, limit = number(finding.actual, finding.unit, units), number(finding.limit, finding.unit, units)
    if actual == limit and not finding.ok:
        if finding.unit is MetricUnit.BYTES:
            return f"{count(int(finding.actual))} B", f"{count(int(finding.limit))} B"
        if finding.unit is MetricUnit.POINTS:
            return f"{100 * finding.actual:.7g} pp", f"{100 * finding.limit:.7g} pp"
        if finding.unit in {MetricUnit.NUMBER, MetricUnit.FACTOR}:
            return f"{finding.actual:.9g}", f"{finding.limit:.9g}"
        if finding.unit is MetricUnit.SECONDS:
            return f"{1e3 * finding.actual:.7g} ms", f"{1e3 * finding.limit:.7g} ms"
        return f"{finding.actual:.6%}", f"{finding.limit:.6%}"
    return actual, limit


def verdict_sentence(finding: Finding, units: Units = Units.SI) -> str:
    """The measured value, and its distance from the limit, in a sentence."""
    if not finding.is_measured:
        return ""
    actual, limit = actual_and_limit(replace(finding, actual=abs(finding.actual)), units)
    distance = abs(finding.actual - finding.limit)
    texts = LimitTexts(
        actual,
        limit,
        percentage_points(distance) if finding.unit is MetricUnit.RATIO else number(distance, finding.unit, units),
    )
    if finding.unit is MetricUnit.FACTOR:
        texts = LimitTexts(f"{finding.actual:.2f} times", f"{finding.limit:g}", f"{distance:.2g}")
    is_told = finding.ok or finding.before is None or finding.id == GROWTH
    details = () if is_told else (f"{baseline_value(finding, units)} in the baseline",)
    # The actual value keeps its sign: growth is positive.
    about = f"{finding.tensor} in {finding.model}" if finding.tensor else finding.model
    return f"{limit_sentence(finding, about, texts, *details)}."


def describe(finding: Finding, units: Units = Units.SI) -> str:
    """A sentence on a finding: its limit, the measured value, and its notes."""
    return " ".join(filter(None, (verdict_sentence(finding, units), finding.note, finding.message)))


def baseline_value(finding: Finding, units: Units = Units.SI) -> str:
    """The value in the baseline, or a dash."""
    if finding.before is None:
        return "-"
    return number(finding.before, MetricUnit.COUNT if finding.id == "max-params" else MetricUnit.BYTES, units)


GROWTH = "max-growth"
_PRUNE_AGAIN = "Prune again"
_PRUNE_CHANNELS = "Prune channels (--pattern channel)"
_WAYS_OUT = {
    "max-params": (_PRUNE_CHANNELS, "raise"),
    "max-flops": (_PRUNE_CHANNELS, "raise"),
    "min-sparsity": (_PRUNE_AGAIN, "lower"),
    "max-sparsity": ("Prune less", "raise"),
    "min-nm": ("Prune with that pattern", "remove"),
    "keep-zeros": (_PRUNE_AGAIN, "remove"),
    "max-drop": ("Fine-tune", "raise"),
    "max-latency": (_PRUNE_CHANNELS, "raise"),
    "min-speedup": (_PRUNE_CHANNELS, "lower"),
}
"""Advice by gate: what to do about the model, and about the limit."""
_NAMED = 3


def remedies(findings: Findings) -> tuple[str, ...]:
    """Advice on the limits that failed or warn, in sentences for the whole report."""
    broken = [*findings.failed, *findings.warned]
    limits: dict[str, dict[str, dict[str, None]]] = {}
    for finding in broken:
        if finding.is_measured and finding.id != GROWTH:
            action, change = _WAYS_OUT.get(finding.id, (_PRUNE_AGAIN, "raise"))
            place = f"{finding.id} ({findings.file}:{finding.line})"
            limits.setdefault(action, {}).setdefault(change, {})[place] = None
    lines = []
    for action, changes in limits.items():
        *most, last = [action, *(f"{change} {_listed(list(places))}" for change, places in changes.items())]
        lines.append(f"{', '.join(most)}, or {last}.")
    has_grown = any(finding.is_measured and finding.id == GROWTH for finding in broken)
    unknown = {finding.model for finding in broken if not finding.is_measured}
    if has_grown and _PRUNE_AGAIN not in limits:
        lines.append(f"{_PRUNE_AGAIN}, or accept {'all' if unknown else 'it'}: {findings.accept_command}")
    elif has_grown:
        lines.append(f"Accept the {'new sizes' if unknown else 'growth'}: {findings.accept_command}")
    elif unknown:
        lines.append(f"Add {'it' if len(unknown) == 1 else 'them'}: {findings.accept_command}")
    return tuple(lines)


def unknown_models(findings: Findings) -> tuple[str, ...]:
    """A sentence on the models that have no entry in the baseline, if there are any."""
    broken = (*findings.failed, *findings.warned)
    unknown = dict.fromkeys(finding.model for finding in broken if not finding.is_measured)
    if not unknown:
        return ()
    verb, owner = ("is", "its") if len(unknown) == 1 else ("are", "their")
    return (f"{_listed(list(unknown))} {verb} not in {findings.baseline}, so {owner} growth was not checked.",)


def largest_tensors(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The largest tensors of each model that is too big, in a sentence."""
    lines: dict[str, str] = {}
    for finding in findings:
        if not finding.largest:
            continue
        tensors = _listed([f"{abbreviated(name)} ({nbytes(size)})" for name, size in finding.largest])
        if finding.grown:
            lines[finding.model] = f"{finding.model}: {finding.grown}"
        elif finding.id == GROWTH:
            lines[finding.model] = (
                f"The baseline has no sizes of single tensors; the largest of {finding.model} are {tensors}."
            )
        else:
            lines.setdefault(finding.model, f"The largest tensors of {finding.model} are {tensors}.")
    return tuple(lines.values())


def _listed(items: Sequence[str]) -> str:
    rest = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {count(rest)} more" if rest > 0 else "")


def summary(findings: Findings) -> str:
    """The counts of a check in a line."""
    passed = len(findings.findings) - len(findings.failed) - len(findings.warned)
    parts = [
        f"{count(len(findings.failed))} failed",
        f"{count(len(findings.warned))} warned",
        f"{count(passed)} passed",
        *([f"{count(len(findings.errors))} could not be checked"] if findings.errors else []),
    ]
    return f"{', '.join(parts)}; {count(findings.models)} {'model' if findings.models == 1 else 'models'} measured"


_PLAIN = (
    Column("verdict"),
    Column("gate"),
    Column("model"),
    Column("tensor"),
    Column("actual"),
    Column("limit"),
    Column("unit"),
    Column("budget"),
)
_HUMAN = (
    Column("verdict"),
    Column("gate"),
    Column("model"),
    Column("before", Unit.NUMBER, is_optional=True),
    Column("actual", Unit.NUMBER),
    Column("limit", Unit.NUMBER),
    Column("budget", is_optional=True),
)
_BEFORE, _BUDGET = 3, 6


def rows(findings: tuple[Finding, ...]) -> Table:
    """The findings as programs read them."""
    return Table("gates", _PLAIN, tuple(_row(finding) for finding in findings))


def table(findings: tuple[Finding, ...]) -> Table:
    """The findings as people read them."""
    lines = [(finding.verdict, finding.id, subject(finding), *numbers(finding), finding.budget) for finding in findings]
    # Most budgets cover one model, and have its name.
    is_named = any(finding.budget not in {"", finding.model} for finding in findings)
    empty = {
        *([] if any(finding.before is not None for finding in findings) else [_BEFORE]),
        *([] if is_named else [_BUDGET]),
    }
    kept = [place for place in range(len(_HUMAN)) if place not in empty]
    return Table(
        "gates", tuple(_HUMAN[place] for place in kept), tuple(tuple(line[place] for place in kept) for line in lines)
    )


def numbers(finding: Finding) -> tuple[str, str, str]:
    """The cells before, actual and limit; dashes where there was nothing to compare with."""
    return (baseline_value(finding), *(actual_and_limit(finding) if finding.is_measured else ("-", "-")))


def check_report(findings: Findings, *, has_gates: bool) -> Report:
    """The report on a check; only scripts get the gates as a list, since people see them in the table."""
    broken = (*findings.failed, *findings.warned)
    if has_gates:
        # Scripts find the failures among the gates.
        notes = tuple(f"{finding.verdict}: {describe(finding)}" for finding in findings.warned)
    else:
        remarks = [f"{subject(finding)}: {finding.note}" for finding in broken if finding.is_measured and finding.note]
        messages = [f"{finding.budget}: {finding.message}" for finding in broken if finding.message]
        notes = (
            *dict.fromkeys((*remarks, *messages)),
            *largest_tensors(broken),
            *unknown_models(findings),
            *remedies(findings),
        )
    # A terminal shows only the first rows, so the failures come first.
    ordered = (*findings.failed, *findings.warned, *(finding for finding in findings.findings if finding.ok))
    title = f"{findings.file}: {summary(findings)}"
    return Report(
        notes=(*notes, *findings.notes),
        log_lines=tuple(
            f"{finding.verdict}: {sentence}" for finding in broken if (sentence := verdict_sentence(finding))
        ),
        models=(),
        table=rows(findings.findings),
        sections=(Section(title, tables=(table(ordered),) if ordered else ()),),
        summary=title,
        gates=findings.findings if has_gates else (),
        failures=tuple(Failure(finding.path, finding.error) for finding in findings.errors),
        quiet_lines=tuple(describe(finding) for finding in findings.failed),
        exit_code_override=findings.exit_code,
        extra_json={"budgets": {"file": findings.file, "models": findings.models, "notes": list(findings.notes)}},
    )


def _row(finding: Finding) -> tuple[Cell, ...]:
    return (
        finding.verdict,
        finding.id,
        finding.model,
        finding.tensor,
        finding.actual,
        finding.limit,
        str(finding.unit),
        finding.budget,
    )


def human(findings: Findings) -> str:
    """A line for each finding and each error, and a summary."""
    lines = [f"{item.verdict:<5}  {describe(item)}" for item in findings.findings]
    lines += [f"error  {item.error.message}" for item in findings.errors]
    broken = (*findings.failed, *findings.warned)
    lines += [f"note   {note}" for note in (*largest_tensors(broken), *remedies(findings), *findings.notes)]
    return "".join(printable(line) + "\n" for line in (*lines, f"{findings.file}: {summary(findings)}"))


def plain(findings: Findings) -> str:
    """Tab-separated rows with raw numbers: verdict, gate, model, tensor, actual, limit, unit, budget."""
    return tab_separated(rows(findings.findings))


_COMMAND = "check"


def as_json(findings: Findings) -> str:
    """The findings as the JSON of `check --json`."""
    return report_json(check_report(findings, has_gates=True), _COMMAND)


def as_html(findings: Findings) -> str:
    """The findings as an HTML page."""
    # Most reports are for scripts, and do not need the module that draws pages.
    text: str = importlib.import_module("prunectl.reporting.html").page(
        check_report(findings, has_gates=False), "check", Units.SI, findings.command_line
    )
    return text


MARKER = "<!-- prunectl check -->"
"""A bot finds its own comment by this line, to replace it."""
_SIGNS = {"pass": "✅ pass", "warn": "⚠️ warn", "FAIL": "❌ fail"}
_SPECIAL = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_{}[]<>|#~"})


def markdown(findings: Findings) -> str:
    """A heading, the findings that need attention, and the others in a collapsed section."""
    broken = (*findings.failed, *findings.warned)
    passed = tuple(item for item in findings.findings if item.ok)
    sign = "❌" if findings.exit_code else "⚠️" if findings.warned else "✅"
    parts = [f"{MARKER}\n## {sign} Model budgets: {escaped(summary(findings))}\n"]
    if broken:
        parts.append(_table(broken))
        comments = (f"- **{item.id}** {escaped(subject(item))}: {escaped(text)}\n" for item, text in _comments(broken))
        lines = (*largest_tensors(broken), *unknown_models(findings), *remedies(findings))
        parts += [*comments, *(f"- {escaped(line)}\n" for line in lines)]
    if findings.errors:
        parts.append("### Could not be checked\n")
        parts.append("".join(f"- {escaped(item.path)}: {escaped(item.error.message)}\n" for item in findings.errors))
    if passed:
        parts.append(f"<details><summary>{len(passed)} passed</summary>\n\n{_table(passed)}\n</details>\n")
    parts += [f"{escaped(note)}\n" for note in findings.notes]
    return "\n".join(parts)


def escaped(text: str) -> str:
    """Text escaped for Markdown and HTML."""
    return printable(text).translate(_SPECIAL).replace("&", "&amp;").replace("\\<", "&lt;").replace("\\>", "&gt;")


def _table(findings: Sequence[Finding]) -> str:
    has_before = any(finding.before is not None for finding in findings)
    heads = ["", "gate", "model", *(["before"] if has_before else []), "actual", "limit"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * 3 + ['---:'] * (len(heads) - 3))} |"]
    for finding in findings:
        values = numbers(finding) if has_before else numbers(finding)[1:]
        cells = (_SIGNS[finding.verdict], finding.id, escaped(subject(finding)), *values)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _comments(findings: Iterable[Finding]) -> Iterable[tuple[Finding, str]]:
    """Notes on single findings that are not in the table; models that the baseline lacks have their own sentence."""
    for finding in findings:
        comment = " ".join(filter(None, (finding.note if finding.is_measured else "", finding.message)))
        if comment:
            yield finding, comment
