"""Every command's page in a browser, where there is one: tables sort, nothing complains, nothing is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checks.checking import MODEL, prunectl, put
from tests.reporting.test_html_browser import CHROMIUM, Browser

TITLES = ("check", "report", "size", "diff", "prune", "strip", "verify", "inspect")
SORT = """
[...document.querySelectorAll('th button')].every(button => {
  const head = button.closest('th');
  button.click();
  return ['ascending', 'descending'].includes(head.ariaSort);
})
"""


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A folder with the page of each command that is about bytes alone, one of them of a gate that says no."""
    put(tmp_path, "[[budget]]\npath = '*.safetensors'\nmax-raw = 1\nmin-sparsity = '10%'\n", a=MODEL, b=b"none")
    lines = {
        "check": "check --html check.html --report html:report.html",
        "size": "size a.safetensors --max-raw 1KB --html size.html",
        "prune": "prune a.safetensors -o p.safetensors -s 75% --manifest m.json --html prune.html",
        "diff": "diff p.safetensors a.safetensors --html diff.html",
        "strip": "strip a.safetensors -o s.safetensors --html strip.html",
        "verify": "verify p.safetensors --manifest m.json --against a.safetensors --html verify.html",
        "inspect": "inspect a.safetensors --hist --html inspect.html",
    }
    codes = {name: prunectl(tmp_path, *line.split()).code for name, line in lines.items()}
    assert codes == {**dict.fromkeys(lines, 0), "check": 3}
    return tmp_path


def test_the_report_is_the_page_that_check_writes(tmp_path: Path) -> None:
    put(tmp_path, "[[budget]]\npath = '*.safetensors'\nmax-raw = 1\n", a=MODEL)
    found = prunectl(tmp_path, "check", "--html", "check.html", "--report", "html:report.html")
    assert found.code == 1
    page = (tmp_path / "check.html").read_text()
    assert (tmp_path / "report.html").read_text() == page
    assert "FAIL" in page
    # Each ends with the command that it was made by.
    assert "<code>prunectl check --html check.html --report html:report.html</code>" in page
    printed = prunectl(tmp_path, "check", "--report", "html:-").out
    assert printed.partition("<footer>")[0] == page.partition("<footer>")[0]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_every_page_without_an_error_or_a_request(pages: Path) -> None:
    browser = Browser(pages / "profile")
    try:
        for title in TITLES:
            browser.told.clear()
            place = pages / f"{title}.html"
            browser.open(place)
            assert browser.value("document.querySelectorAll('main table').length") > 0, title
            assert browser.value(SORT) is True, title
            # What is wider than a phone scrolls within its own box.
            browser.ask("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=True)
            assert browser.value("document.documentElement.scrollWidth") <= 360, title
            assert not browser.events("Log.entryAdded"), title
            assert not browser.events("Runtime.exceptionThrown"), title
            assert not browser.events("Runtime.consoleAPICalled"), title
            asked = [event["request"]["url"] for event in browser.events("Network.requestWillBeSent")]
            # Pictures of masks lie in the page itself.
            assert [url for url in asked if not url.startswith("data:")] == [place.as_uri()], title
    finally:
        browser.close()
