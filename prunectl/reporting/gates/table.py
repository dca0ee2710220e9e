"""The reports that there are."""

from __future__ import annotations

from collections.abc import Callable

from prunectl.gating.finding import Findings
from prunectl.reporting.gates.as_html import as_html
from prunectl.reporting.gates.as_json import as_json
from prunectl.reporting.gates.github import github
from prunectl.reporting.gates.gitlab import gitlab
from prunectl.reporting.gates.human import human
from prunectl.reporting.gates.junit import junit
from prunectl.reporting.gates.markdown import markdown
from prunectl.reporting.gates.openmetrics import openmetrics
from prunectl.reporting.gates.plain import plain
from prunectl.reporting.gates.sarif import sarif

FORMATS: dict[str, Callable[[Findings], str]] = {
    "human": human,
    "plain": plain,
    "json": as_json,
    "markdown": markdown,
    "junit": junit,
    "sarif": sarif,
    "github": github,
    "gitlab": gitlab,
    "openmetrics": openmetrics,
    "html": as_html,
}
