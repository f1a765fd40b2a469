"""Drives a headless Chromium, where there is one, through the DevTools pipe."""

import base64
import contextlib
import json
import os
import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--remote-debugging-pipe"),
)


class Browser(contextlib.AbstractContextManager):
    """One tab: `goto`, `resize`, `evaluate` (JavaScript) and `screenshot`.

    `problems` is what the console said and what was requested, but for the pages.
    """

    def __init__(self, profile):
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        shell = f'exec "$@" 3<&{commands} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._number, self._rest, self._session = 0, b"", {}
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self.problems = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Calls a method of the DevTools protocol, and returns its result."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        os.write(
            self._commands, json.dumps({**command, **self._session}).encode() + b"\0"
        )
        answer = self._until(lambda message: message.get("id") == self._number)
        assert "error" not in answer, answer
        return answer["result"]

    def _until(self, wanted):
        while True:
            while b"\0" not in self._rest:
                data = os.read(self._answers, 1 << 20)
                assert data, "the browser has ended"
                self._rest += data
            text, self._rest = self._rest.split(b"\0", 1)
            self._note(message := json.loads(text))
            if wanted(message):
                return message

    def _note(self, message):
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.problems.append(params)
            case "Log.entryAdded":
                self.problems.append(params["entry"])
            case "Network.requestWillBeSent" if params["type"] != "Document":
                self.problems.append(params["request"]["url"])

    def wait_for_load(self):
        self._until(lambda message: message.get("method") == "Page.loadEventFired")

    def goto(self, path):
        self.call("Page.navigate", url=path.absolute().as_uri())
        self.wait_for_load()

    def resize(self, width, height):
        size = {"width": width, "height": height}
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **size,
            deviceScaleFactor=1,
            mobile=False,
        )

    def evaluate(self, expression):
        """Evaluates JavaScript in the page, and returns its value."""
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def __exit__(self, *_exception):
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
