"""The page in a browser, where there is one: it works, it complains of nothing, it asks nobody for anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from prunectl.api import inspect, prune
from tests.reporting.test_html import written
from tests.running import FIXTURES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Chromium without a window, spoken to through a pipe."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        self.told: list[dict[str, Any]] = []
        self._number = 0
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        words = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
            *(f"--user-data-dir={folder}", "--no-first-run", "--disable-background-networking", "about:blank"),
        ]
        # It reads from 3 and writes to 4.
        line = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", *words], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb")
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **words: Any) -> dict[str, Any]:
        self._number += 1
        said: dict[str, Any] = {"id": self._number, "method": method, "params": words}
        if hasattr(self, "_session"):
            said["sessionId"] = self._session
        self._out.write(json.dumps(said).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.told.append(answer)
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    def open(self, path: Path) -> None:
        self.ask("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.told):
            self.told.append(self._next())

    def value(self, code: str) -> Any:
        return self.ask("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def events(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.told if event.get("method") == method]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._out.close()
        self._in.close()

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (letter := self._in.read(1)) != b"\0":
            assert letter, "the browser is gone"
            text += letter
        found: dict[str, Any] = json.loads(text)
        return found


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_sorts_and_filters_without_an_error_or_a_request(tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    prune(FIXTURES / "digits_cnn.h5", tmp_path / "sparse.h5", sparsity=0.5)
    written("inspect", tmp_path / "sparse.h5", "--html", place)
    first = (
        "[...document.querySelectorAll('#t1 tbody tr')].filter(row => !row.hidden).map(row => row.cells[0].textContent)"
    )
    expected = [row.name for row in inspect(FIXTURES / "digits_cnn.h5").layers]
    sizes = {row.name: row.params for row in inspect(FIXTURES / "digits_cnn.h5").layers}
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(place)
        assert browser.value(first) == expected
        click = (
            "const head = document.querySelectorAll('#t1 th')[4]; head.querySelector('button').click(); head.ariaSort"
        )
        assert browser.value(f"{{ {click} }}") == "ascending"
        assert browser.value(first) == sorted(expected, key=lambda name: sizes[name])
        assert browser.value(f"{{ {click} }}") == "descending"
        assert browser.value(first) == sorted(expected, key=lambda name: -sizes[name])
        typing = "field.value = 'BIAS'; field.dispatchEvent(new Event('input'))"
        assert browser.value(f"{{ const field = document.querySelector('input[type=search]'); {typing} }}")
        assert sorted(browser.value(first)) == sorted(name for name in expected if "bias" in name)
        assert browser.value("document.querySelector('output').textContent") == "4 of 9 rows"
        assert browser.value("getComputedStyle(document.querySelector('main button')).cursor") == "pointer"
        drawn = "[...document.images].map(image => image.complete && image.naturalWidth > 0)"
        assert browser.value(drawn) == [True] * 4
        # What the page was not to do is seen by trying it.
        assert not browser.events("Log.entryAdded")
        assert not browser.events("Runtime.exceptionThrown")
        requests = [event["request"]["url"] for event in browser.events("Network.requestWillBeSent")]
        assert [url for url in requests if not url.startswith("data:image/png;")] == [place.as_uri()]
    finally:
        browser.close()
