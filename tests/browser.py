"""A headless Chromium for tests, over its debugging pipe: open a page, ask it something, learn what it complained about."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# The pipe has to be the descriptors 3 and 4 of the browser, whatever they are here.
_BEGIN = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(word), fcntl.F_DUPFD, 10) for word in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Tab:
    """A page in the browser.

    Attributes:
        complaints: what it wrote to the console, exceptions, dialogs.
        requests: every address it asked for, but for data in the page itself.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest, self._ident = write, read, b"", 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self._call("Target.createTarget", session=None, url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", session=None, targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Show a file at a width in pixels, in the `light` or `dark` colour scheme."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._loaded = False
        self._call("Page.navigate", url=page.resolve().as_uri())
        until = time.monotonic() + 60
        while not self._loaded:
            assert time.monotonic() < until, "the page did not load"
            self._message()

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    _OF_TAB = object()

    def _call(self, method: str, session: object = _OF_TAB, **parameters: Any) -> dict[str, Any]:
        self._ident += 1
        told: dict[str, Any] = {"id": self._ident, "method": method, "params": parameters}
        if session is self._OF_TAB:
            told["sessionId"] = self._session
        os.write(self._write, json.dumps(told).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self._ident:
                assert "error" not in message, message
                return message["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], 60)[0], "the browser does not answer"
            more = os.read(self._read, 1 << 20)
            assert more, "the browser is gone"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        kind, about = message.get("method"), message.get("params", {})
        if kind in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(about)[:500])
        elif kind == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {about.get('message')}")
        elif kind == "Network.requestWillBeSent" and not about["request"]["url"].startswith("data:"):
            self.requests.append(about["request"]["url"])
        elif kind == "Page.loadEventFired":
            self._loaded = True
        return message


@contextmanager
def tab(home: Path) -> Iterator[Tab]:
    """A browser with an empty profile under `home`, ended with the test."""
    assert PROGRAM is not None
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    words = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    words += ["--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={home / 'profile'}"]
    shim = [sys.executable, "-c", _BEGIN, str(theirs_in), str(theirs_out)]
    process = subprocess.Popen(
        [*shim, *words], pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Tab(ours_out, ours_in)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(ours_out)
        os.close(ours_in)
