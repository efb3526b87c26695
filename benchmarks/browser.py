"""A page in headless Chromium, driven by its DevTools protocol over two pipes.

[The protocol](https://chromedevtools.github.io/devtools-protocol/): JSON messages, each ended by a zero byte. Pipes
need no port and no client library.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import psutil

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
"""The browser's program; None where there is none."""

_SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_SOFTWARE_GL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """A running browser with one page; use as a context manager.

    Attributes:
        errors: exceptions and error messages of the page so far.
        requests: addresses that the page asked for, its own and `data:` left out.
    """

    def __init__(self, width: int = 1400, height: int = 1000, *, dark: bool = False, webgl: bool = False) -> None:
        assert CHROMIUM is not None
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._folder = TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()
        self._pid = os.posix_spawn(
            CHROMIUM,
            [
                CHROMIUM,
                *_SWITCHES,
                *(_SOFTWARE_GL if webgl else ("--disable-gpu",)),
                f"--user-data-dir={self._folder.name}",
                "about:blank",
            ],
            os.environ,
            setpgroup=0,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, commands, 3),
                (os.POSIX_SPAWN_DUP2, answers, 4),
            ],
        )
        os.close(commands)
        os.close(answers)
        self._received, self._number, self._session, self._address = b"", 0, "", ""
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        self.dark(dark)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._to)
        os.close(self._from)
        self._folder.cleanup()

    def call(self, method: str, seconds: float = 60, **parameters: Any) -> dict[str, Any]:
        """The answer to one command.

        Raises:
            RuntimeError: the browser refuses it. TimeoutError: no answer in time.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + seconds
        while (found := self._next(until)).get("id") != self._number:
            self._note(found)
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']['message']}")
        result: dict[str, Any] = found["result"]
        return result

    def open(self, path: Path, seconds: float = 60) -> float:
        """Show a file; returns the seconds until it has loaded and its scripts have run."""
        self._address, self._loaded = path.absolute().as_uri(), False
        began = time.monotonic()
        self.call("Page.navigate", url=self._address)
        while not self._loaded:
            self._note(self._next(began + seconds))
        return time.monotonic() - began

    def run(self, script: str) -> Any:
        """The value of an expression in the page, awaited if it is a promise.

        Raises:
            RuntimeError: it throws.
        """
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(_message(found["exceptionDetails"]))
        return found["result"].get("value")

    def frame(self) -> None:
        """Wait until everything that is due has been painted."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def press(self, key: str) -> None:
        """Press and release a key: a character, or one of Enter, Escape, Tab and the arrows."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"windowsVirtualKeyCode": _KEYS[key]} if key in _KEYS else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def type(self, text: str) -> None:
        """Press the keys of a text."""
        for character in text:
            self.press(character)

    def click(self, x: float, y: float, count: int = 1) -> None:
        """Click at a place of the window; a count of two is a double click."""
        self._mouse("mouseMoved", x, y)
        for clicks in range(1, count + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self._mouse(kind, x, y, button="left", clickCount=clicks)

    def drag(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """Press at one place, release at another."""
        self._mouse("mousePressed", x, y, button="left", clickCount=1)
        self._mouse("mouseMoved", to_x, to_y, button="left", buttons=1)
        self._mouse("mouseReleased", to_x, to_y, button="left", clickCount=1)

    def wheel(self, x: float, y: float, by: float) -> None:
        """Turn the wheel at a place; a negative amount turns it away."""
        self._mouse("mouseWheel", x, y, deltaX=0, deltaY=by)

    def resize(self, width: int, height: int) -> None:
        """Another size of window."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, wanted: bool) -> None:
        """The system's colour scheme."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        """A PNG of what the window shows."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def cpu_seconds(self) -> float:
        """CPU time of all processes of the browser so far."""
        own = psutil.Process(self._pid)
        times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def _mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            if not select.select([self._from], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser did not answer in time")
            part = os.read(self._from, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._received += part
        message, self._received = self._received.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        method, found = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(_message(found["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(each.get("value", each.get("description"))) for each in found["args"]))
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.errors.append(found["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            address = found["request"]["url"]
            if address != self._address and not address.startswith("data:"):
                self.requests.append(address)


def _message(details: dict[str, Any]) -> str:
    return str(details.get("exception", {}).get("description", details["text"]))
