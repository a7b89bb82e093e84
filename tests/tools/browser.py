"""A headless Chromium on a pipe: its DevTools protocol, messages ended by a zero byte. No driver or package needed."""
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find():
    """The browser's path, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. `events` are all events that the browser has sent."""

    def __init__(self, send, receive):
        self.send_fd, self.receive_fd, self.buffer, self.number, self.events, self.session = send, receive, b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self):
        while b"\0" not in self.buffer:
            piece = os.read(self.receive_fd, 1 << 16)
            if not piece:
                raise RuntimeError("the browser has ended")
            self.buffer += piece
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.send_fd, data) :]
        while True:
            found = self._message()
            if found.get("id") == self.number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                return found["result"]
            self.events.append(found)

    def open(self, path, width=1200, height=900, dark=False):
        """Loads a file and waits for it."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.events.clear()
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def evaluate(self, expression):
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def type(self, text):
        self.call("Input.insertText", text=text)

    def complaints(self):
        """What the console shows: errors, warnings and exceptions."""
        return [event["params"] for event in self.events
                if event.get("method") == "Runtime.exceptionThrown"
                or event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] in ("error", "warning")
                or event.get("method") == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning")]  # fmt: skip

    def requests(self):
        return [event["params"]["request"]["url"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser():
    """A Browser, ended afterwards."""
    ours, theirs = os.pipe(), os.pipe()  # what we say; what it says

    def as_three_and_four():
        os.dup2(spare_in, 3)
        os.dup2(spare_out, 4)

    spare_in, spare_out = os.dup2(ours[0], 60), os.dup2(theirs[1], 61)  # numbers that do not get in each other's way
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [find(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, close_fds=True, pass_fds=(3, 4), preexec_fn=as_three_and_four, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for fd in (ours[0], theirs[1], spare_in, spare_out):
            os.close(fd)
        try:
            yield Browser(ours[1], theirs[0])
        finally:
            process.terminate()
            process.wait(20)
            os.close(ours[1])
            os.close(theirs[0])


if __name__ == "__main__":  # python -m tools.browser PAGE.html PICTURE.png, from tests/: the picture in docs
    with browser() as shown:
        shown.open(sys.argv[1], width=1100, height=1500)
        shown.screenshot(sys.argv[2])
