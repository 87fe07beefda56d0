"""Headless Chromium for tests, driven by the DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Browser:
    """One page of a browser; commands are those of the DevTools protocol."""

    def __init__(self, process: subprocess.Popen[bytes], reader: int, writer: int) -> None:
        self.process, self.reader, self.writer = process, reader, writer
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        self._buffer, self._next = b"", 0
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command; events that come before it are kept."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self, seconds: float = 60.0) -> dict[str, Any]:
        limit = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            if not select.select([self.reader], [], [], max(0.0, limit - time.monotonic()))[0]:
                raise TimeoutError(f"the browser did not answer within {seconds:.0f} s")
            part = os.read(self.reader, 1 << 20)
            if not part:
                raise RuntimeError("the browser has gone")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(
        self, path: Path, width: int, height: int = 900, *, ratio: float = 1.0, dark: bool = False
    ) -> None:
        """Loads a file at a width in CSS pixels."""
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=ratio,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 60.0) -> None:
        """Waits until a JavaScript expression is true."""
        limit = time.monotonic() + seconds
        while not self.evaluate(condition):
            if time.monotonic() > limit:
                raise TimeoutError(f"still not true: {condition}")
            time.sleep(0.02)

    def settle(self) -> None:
        """Waits until two frames have been drawn."""
        frame = "requestAnimationFrame(() => requestAnimationFrame(() => done(1)))"
        self.evaluate(f"new Promise(done => {frame})")

    def press(self, key: str) -> None:
        """Presses and releases a key, as `KeyboardEvent.key` names it."""
        text = {"text": key} if len(key) == 1 else {}
        # Buttons and links are activated by the code of a key, not by its name.
        code = {"Enter": 13, " ": 32, "Tab": 9}.get(key, 0)
        if key == "Enter":
            text = {"text": "\r"}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)
        self.settle()

    def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG file of what is in the window, or of the whole page."""
        self.settle()
        answer = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def canvas(self, index: int) -> NDArray[np.uint8]:
        """Pixels ``(H, W, 4)`` of a canvas of the page."""
        from PIL import Image

        self.settle()
        address = self.evaluate(f"document.querySelectorAll('canvas')[{index}].toDataURL()")
        image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        return np.asarray(image.convert("RGBA"))

    def requests(self) -> list[str]:
        """Addresses that were asked for since `open`."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """Errors and exceptions since `open`."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"].get("exception", {}).get("description")))
            if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(params["entry"]["text"])
        return found


@contextlib.contextmanager
def chromium(*options: str) -> Iterator[Browser]:
    """A running browser; the test skips where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("there is no Chromium: this test looks at the page (apt-get install chromium)")
    to_browser, writer = os.pipe()
    reader, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [
            "--headless",
            "--no-sandbox",
            "--remote-debugging-pipe",
            "--no-first-run",
            "--disable-extensions",
            "--disable-background-networking",
            "--disable-component-update",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            f"--user-data-dir={profile}",
        ]
        # The browser reads commands from descriptor 3 and answers on 4.
        command = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$0" "$@"'
        process = subprocess.Popen(
            ["/bin/bash", "-c", command, program, *flags, *options],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield Browser(process, reader, writer)
        finally:
            os.close(writer)
            os.close(reader)
            # Its helpers are in the same group, and nothing of the profile is wanted.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
