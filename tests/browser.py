"""A headless Chromium, driven over its DevTools pipe: what a page logs, requests, and looks like."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from PIL import Image

from tests.started import running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
PATIENCE_SECONDS = 60.0


class Browser:
    """One tab. `complaints` and `requests` are those since the last `open`."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, page: Path, width: int, dark: bool) -> None:
        """Load `page` in a window of that width and colour scheme, and wait until its scripts are done."""
        self.complaints.clear()
        self.requests.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Page.navigate", url=page.resolve().as_uri())
        deadline = monotonic() + PATIENCE_SECONDS
        while self.evaluate("document.readyState") != "complete":
            assert monotonic() < deadline, "the page did not load"
        self.evaluate("new Promise(done => setTimeout(() => requestAnimationFrame(() => done(0)), 100))")

    def evaluate(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """x, y, width and height of an element, on the page."""
        self.evaluate("scrollTo(0, 0)")
        found = self.evaluate(
            f"(e => [e.x, e.y, e.width, e.height])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        return tuple(found)

    def picture(self) -> Image.Image:
        """Of the whole page."""
        _, _, width, height = self.box("html")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; what happens in between is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reading], [], [], PATIENCE_SECONDS)
            assert ready, "the browser does not answer"
            data = os.read(self._reading, 1 << 16)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: str, facts: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.complaints.append(str(facts["exceptionDetails"]))
        elif event == "Log.entryAdded":
            self.complaints.append(f"{facts['entry']['level']}: {facts['entry']['text']}")
        elif event == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
            self.complaints.append(f"{facts['type']}: {facts['args']}")
        elif event == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])


@contextmanager
def running_browser(profile: Path) -> Iterator[Browser]:
    """`profile` is a new, empty folder for what the browser keeps."""
    assert CHROMIUM is not None
    to_read, to_write = os.pipe(), os.pipe()  # the browser's commands, the browser's answers
    start = f'exec "$@" 3<&{to_read[0]} 4>&{to_write[1]}'
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    environment = {**os.environ, "HOME": str(profile), "TMPDIR": str(profile)}
    with running(
        ["bash", "-c", start, "browser", *command],
        pass_fds=(to_read[0], to_write[1]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        os.close(to_read[0])
        os.close(to_write[1])
        try:
            yield Browser(to_write[0], to_read[1])
        finally:
            process.terminate()
            process.wait(30)
            os.close(to_write[0])
            os.close(to_read[1])
