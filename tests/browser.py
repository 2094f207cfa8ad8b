"""A real browser for tests of pages: Chromium without a window, driven by its own protocol through two pipes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
"""The program; None on a machine without one."""
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
_PATIENCE = 120.0  # seconds for one reply, on a machine that does much else


class Browser:
    """One process of Chromium, with one page open at a time."""

    def __init__(self, profile: Path) -> None:
        """Start it. ``profile``: an empty directory of its own."""
        assert CHROMIUM is not None
        commands, self._to = os.pipe()
        self._from, replies = os.pipe()
        redirected = f'exec "$@" 3</dev/fd/{commands} 4>/dev/fd/{replies}'
        words = [CHROMIUM, *_OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["sh", "-c", redirected, "sh", *words],
            pass_fds=(commands, replies),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(replies)
        self._unread = b""
        self._count = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def open(self, page: Path, *, width: int, dark: bool = False, height: int = 844) -> None:
        """Show a file in a fresh tab of so many CSS pixels, for a reader who likes it dark or light."""
        self._session = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._take()

    def value(self, expression: str) -> Any:
        """Return what an expression of JavaScript is in the page, as JSON has it; of a promise, what it ends with."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Click on the middle of an element, as a mouse does: what lies over it gets the click."""
        x, y = self.value(
            f"(found => {{ found.scrollIntoView({{ block: 'center' }}); const r = found.getBoundingClientRect();"
            f" return [r.x + r.width / 2, r.y + r.height / 2] }})(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type a text where the page has its focus."""
        self.ask("Input.insertText", text=text)

    def complaints(self) -> list[str]:
        """Return what the console says, and what the page's program has raised."""
        methods = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in methods]

    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for."""
        asked = (event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [one["request"]["url"] for one in asked]

    def picture(self, path: Path) -> None:
        """Write what is in the window, as PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the reply of a method of the protocol."""
        self._count += 1
        wanted = {"id": self._count, "method": method, "params": params}
        if self._session is not None and not method.startswith("Target."):
            wanted["sessionId"] = self._session
        os.write(self._to, json.dumps(wanted).encode() + b"\0")
        while (reply := self._take()).get("id") != self._count:
            pass
        assert "error" not in reply, (method, reply)
        result: dict[str, Any] = reply["result"]
        return result

    def _take(self) -> dict[str, Any]:
        """The next message; events are put on their list, too."""
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], _PATIENCE)
            data = os.read(self._from, 1 << 20) if ready else b""
            assert data, "Chromium has ended" if ready else f"Chromium has said nothing for {_PATIENCE} s"
            self._unread += data
        first, self._unread = self._unread.split(b"\0", 1)
        message: dict[str, Any] = json.loads(first)
        if "method" in message and message.get("sessionId") == self._session:
            self.events.append(message)
        return message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self.ask("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
