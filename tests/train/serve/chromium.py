"""A headless Chromium that is driven over its DevTools protocol: scripts, files, keys, screenshots."""

import asyncio
import base64
import itertools
import json
import subprocess
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.train.page.html_reader import browser

SECONDS = 60  # until something that is waited for counts as not coming, on a machine that does other work too


class Tab:
    """One tab. What its console and its policy complain of gathers in `complaints`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.complaints: list[str] = []
        self._socket, self._session = socket, ""
        self._numbers, self._waiting = itertools.count(1), {}

    async def call(self, method: str, **parameters: Any) -> dict:
        """A command of the protocol, and what it answers."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json(message)
        return await asyncio.wait_for(answer, SECONDS)

    async def listen(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                answer = self._waiting.pop(said["id"])
                if "error" in said:
                    answer.set_exception(RuntimeError(said["error"]["message"]))
                else:
                    answer.set_result(said["result"])
            elif said["method"] == "Runtime.exceptionThrown":
                self.complaints.append(said["params"]["exceptionDetails"]["exception"]["description"])
            elif said["method"] == "Log.entryAdded":
                self.complaints.append(said["params"]["entry"]["text"])
            elif said["method"] == "Page.javascriptDialogOpening":
                self._answering = asyncio.ensure_future(self.call("Page.handleJavaScriptDialog", accept=True))

    async def attach(self) -> None:
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        attached = await self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            await self.call(f"{domain}.enable")

    async def js(self, expression: str) -> Any:
        """The value of an expression, awaited where it is a promise."""
        done = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"]["exception"].get("description", expression))
        return done["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait for an expression to be true, or an element, and give its value; of an element True."""
        expression = f"((found) => found instanceof Node || found)({expression})"
        end = time.monotonic() + SECONDS
        while not (value := await self.js(expression)):
            assert time.monotonic() < end, f"did not come: {expression}\n{self.complaints}"
            await asyncio.sleep(0.03)
        return value

    async def open(self, address: str) -> None:
        await self.call("Page.navigate", url=address)
        await self.until("document.readyState === 'complete'")

    async def look(self, width: int, height: int, language: str = "en-US", scheme: str = "light") -> None:
        """Size, language and colour scheme, of the pages that are opened from now on."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        agent = await self.js("navigator.userAgent")
        await self.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def key(self, name: str, code: int, text: str = "", modifiers: int = 0) -> None:
        keys = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **keys)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **keys)

    async def write(self, text: str) -> None:
        """Type into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def screenshot(self, file: Path) -> None:
        shot = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def chromium(profile: Path):
    """A tab of a browser of its own."""
    program = browser()
    assert program is not None
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file, end = profile / "DevToolsActivePort", time.monotonic() + SECONDS
        while not (port_file.is_file() and port_file.read_text().count("\n")):
            assert time.monotonic() < end and process.poll() is None, "the browser does not start"
            await asyncio.sleep(0.03)
        port, path = port_file.read_text().splitlines()
        async with aiohttp.ClientSession() as session:
            socket = await session.ws_connect(f"ws://127.0.0.1:{port}{path}", max_msg_size=0)
            tab = Tab(socket)
            listening = asyncio.ensure_future(tab.listen())
            await tab.attach()
            yield tab
            await socket.close()
            await listening
    finally:
        process.terminate()
        process.wait(SECONDS)
