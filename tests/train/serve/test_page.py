"""The page in a real browser, against a real service on nano: a picture is dropped, asked about, and drawn on."""

import asyncio
import base64
import io
import json
import os
import subprocess

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.train.page.html_reader import browser
from tests.train.serve.chromium import chromium

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser() is None, reason="no Chromium is installed"),
]
LAST = "[...document.querySelectorAll('.answer')].at(-1)"
CIRCLE = (48, 48, 336, 336)
# What the browser has kept of the conversation: the state of each answer.
KEPT = """new Promise((resolve) => {
    const opening = indexedDB.open("conversations");
    opening.onsuccess = () => {
        const found = opening.result.transaction("tabs").objectStore("tabs").getAll();
        const states = ({ turns }) => turns.map(({ answers }) => answers[0].state);
        found.onsuccess = () => resolve(found.result.flatMap(states).join());
        opening.result.close();
    };
})"""


@pytest.fixture(scope="module")
def page(service, tmp_path_factory):
    """Runs what it is given with the one tab of one browser, at the page."""
    with asyncio.Runner() if hasattr(asyncio, "Runner") else Loop() as runner:
        opening = chromium(tmp_path_factory.mktemp("chromium"))
        tab = runner.run(opening.__aenter__())
        tab.home = f"{service.url}/"
        yield lambda steps: runner.run(steps(tab))
        runner.run(opening.__aexit__(None, None, None))


class Loop:
    """asyncio.Runner, which Python 3.10 lacks."""

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        return self

    def run(self, awaitable):
        return self.loop.run_until_complete(awaitable)

    def __exit__(self, *problem):
        self.loop.close()


def picture(size=(384, 384)) -> bytes:
    image, stream = Image.new("RGB", size, "white"), io.BytesIO()
    ImageDraw.Draw(image).ellipse(CIRCLE, fill=(220, 40, 40))
    image.save(stream, "png")
    return stream.getvalue()


async def drop(tab, *files: tuple[str, str, bytes]) -> None:
    """Drop files on the page: (name, kind, bytes) of each."""
    made = ",".join(
        f"new File([Uint8Array.from(atob('{base64.b64encode(data).decode()}'), (c) => c.charCodeAt(0))], "
        f"{json.dumps(name)}, {{type: {json.dumps(kind)}}})"
        for name, kind, data in files
    )
    await tab.js(f"""(() => {{
        const dataTransfer = new DataTransfer();
        for (const file of [{made}]) dataTransfer.items.add(file);
        const event = new DragEvent("drop", {{ dataTransfer, bubbles: true, cancelable: true }});
        document.querySelector("main").dispatchEvent(event);
    }})()""")


async def start(tab, *look, **more) -> None:
    """The page anew, with an empty conversation."""
    await tab.look(*(look or (1280, 800)), **more)
    await tab.open(tab.home)
    await tab.js("localStorage.clear(); sessionStorage.clear()")
    await tab.open(tab.home)
    await tab.until("document.querySelectorAll('#model-0 option').length")


async def ask(tab, question: str, state: str = "done") -> str:
    """Type a question, press Enter, wait for the end of its answer; its text."""
    before = await tab.js("document.querySelectorAll('.turn').length")
    await tab.js("document.getElementById('question').focus()")
    await tab.write(question)
    await tab.key("Enter", 13, "\r")
    await tab.until(f"document.querySelectorAll('.turn').length === {before + 1} && {LAST}.dataset.state === '{state}'")
    return await tab.js(f"{LAST}.querySelector('.text').textContent")


async def answers_with(tab, status: int, body: str, headers: dict | None = None) -> None:
    """Let the page's next requests get this answer, wherever the service is."""
    made = f"new Response({json.dumps(body)}, {{status: {status}, headers: {json.dumps(headers or {})}}})"
    await tab.js(f"window.asked ??= window.fetch; window.fetch = async () => {made}; 0")


def stream(*documents: dict) -> str:
    return "".join(f"data: {json.dumps(each)}\n\n" for each in documents)


def test_a_dropped_picture_is_asked_about_and_drawn_on(page, tmp_path):
    async def steps(tab):
        await start(tab)
        await drop(tab, ("circle.png", "image/png", picture()), ("notes.txt", "text/plain", b"no picture"))
        await tab.until("document.querySelector('#pictures img')?.naturalWidth === 384")
        assert "notes.txt is no picture" in await tab.js("document.getElementById('notice').textContent")
        assert await ask(tab, "What is this?") == "red circle"
        assert "tokens" in await tab.js(f"{LAST}.querySelector('.facts').textContent")

        # The button marks what is to be found; the answer's marks are shown as its label.
        await tab.js("document.getElementById('question').value = 'red circle'")
        await tab.js("document.getElementById('question').select(); document.getElementById('find').click()")
        assert await tab.js("document.getElementById('question').value") == "<|ref|>red circle<|/ref|>"
        assert await ask(tab, "") == "red circle"
        await tab.until(f"{LAST}.querySelector('svg rect')")
        box = f"{LAST}.querySelector('rect:not(.halo)')"
        x, y, width, height = await tab.js(f"['x', 'y', 'width', 'height'].map((name) => +{box}.getAttribute(name))")
        found = (x, y, x + width, y + height)
        assert np.abs(np.subtract(found, CIRCLE)).max() < 10  # of 384 pixels
        # On the screen the box lies where the circle is, at any size of the picture.
        where = "(e) => (({x, y, right, bottom}) => [x, y, right, bottom])(e.getBoundingClientRect())"
        image = await tab.js(f"({where})({LAST}.querySelector('img'))")
        drawn = await tab.js(f"({where})({box})")
        scale = (image[2] - image[0]) / 384
        expected = [image[i % 2] + scale * value for i, value in enumerate(found)]
        assert np.abs(np.subtract(drawn, expected)).max() < 3  # pixels of the screen; the line is 2.5 wide
        assert await tab.js(f"{LAST}.querySelector('.tag').textContent") == "red circle"
        assert "48, 48, 336, 336" in await tab.js(f"{LAST}.querySelector('.boxes').textContent")
        assert tab.complaints == []

        # It survives a reload, and the command that it copies gives bash the same answer.
        await tab.until(f"{KEPT}.then((states) => states === 'done,done')")
        await tab.open(tab.home)
        await tab.until("document.querySelectorAll('.turn').length === 2")
        await tab.until(f"{LAST}.querySelector('svg rect')")
        await tab.js("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
        await tab.js(f"[...{LAST}.querySelectorAll('.facts button')].at(-1).click()")
        return await tab.until("window.copied")

    command = page(steps)
    said = subprocess.run(["bash"], input=command, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    message = json.loads(said.stdout)["choices"][0]["message"]
    assert message["content"].startswith("<|ref|>red circle<|/ref|><|det|>")
    assert message["boxes"][0]["label"] == "red circle"


def test_two_models_answer_side_by_side(page):
    """The base and an adapter of it; each goes on from what it said itself."""

    async def steps(tab):
        await start(tab)
        await tab.js("document.getElementById('compare').click()")
        assert await tab.js("[...document.querySelectorAll('select')].map((e) => e.value)") == ["nano", "cats"]
        await tab.js("""window.sent = []; window.asked = window.fetch; window.fetch = (place, options) => {
            if (options.body) sent.push(JSON.parse(options.body));
            return asked(place, options);
        }; 0""")
        await drop(tab, ("circle.png", "image/png", picture()))
        await tab.until("document.querySelector('#pictures img')")
        both = "[...document.querySelectorAll('.turn:last-child .answer')]"
        for question in ("What is this?", "Are you sure?"):
            await ask(tab, question)
            await tab.until(f"{both}.every((e) => e.dataset.state === 'done')")
        assert await tab.js(f"{both}.map((e) => e.querySelector('h3').textContent)") == ["nano", "cats"]
        first = "[...document.querySelectorAll('.turn:first-child .answer .text')].map((e) => e.textContent)"
        left, right = await tab.js(first)
        assert left == "red circle" and left != right
        sent = {each["model"]: each["messages"] for each in (await tab.js("sent"))[2:]}
        assert [(name, messages[1]["content"]) for name, messages in sorted(sent.items())] == [
            ("cats", right),
            ("nano", left),
        ]
        assert sent["cats"][0] == sent["nano"][0] and len(sent["nano"]) == 3
        places = f"{both}.map((e) => e.getBoundingClientRect()).map((e) => [e.left, e.top])"
        (x, y), (other_x, other_y) = await tab.js(places)
        assert x < other_x and y == other_y
        await tab.look(390, 844)
        (x, y), (other_x, other_y) = await tab.js(places)
        assert x == other_x and y < other_y
        await tab.open(tab.home)  # the choice stays
        await tab.until("!document.getElementById('against').hidden")

    page(steps)


def test_what_a_model_says_is_text(page):
    """Whatever it says; and the page's policy would not run it either."""
    hostile = "<img src=x onerror='window.owned=1'><script>window.owned=1</script> {{7*7}} <|ref|><b>x</b><|/ref|>"

    async def steps(tab):
        await start(tab)
        boxes = [{"label": "<b>x</b>", "image": 1, "box": [0, 0, 9, 9]}]
        chunks = [{"choices": [{"delta": {"content": part}}]} for part in (hostile[:30], hostile[30:])]
        chunks.append({"choices": [{"delta": {"boxes": boxes}, "finish_reason": "length"}]})
        await answers_with(tab, 200, stream(*chunks) + "data: [DONE]\n\n")
        await drop(tab, ("<i>a</i>.png", "image/png", picture((600, 300))))
        await tab.until("document.querySelector('#pictures img')")
        shown = await ask(tab, "<u>?</u>")
        assert shown == hostile.replace("<|ref|>", "").replace("<|/ref|>", "")
        assert await tab.js("document.querySelectorAll('main :is(script, b, i, u), main img[src=x]').length") == 0
        assert "Cut at the most tokens" in await tab.js(f"{LAST}.textContent")
        await tab.js("""(() => {
            const script = document.createElement("script");
            script.textContent = "window.owned = 1";
            document.body.append(script);
        })()""")
        assert await tab.js("window.owned") is None
        (complaint,) = tab.complaints
        assert "Content Security Policy" in complaint
        tab.complaints.clear()

    page(steps)


def test_errors_are_said_in_words(page):
    async def steps(tab):
        await start(tab)
        refused = json.dumps({"error": {"message": "messages[0]: too long"}})
        half = stream({"choices": [{"delta": {"content": "Half an"}}]})
        for status, body, headers, expected in (
            (400, refused, {}, "The service refused: messages[0]: too long"),
            (429, refused, {"Retry-After": "7"}, "Try again in 7 s"),
            (503, refused, {}, "shutting down"),
            (500, "<html>", {}, "The service failed: 500"),
            (200, half, {}, "broke off"),
            (200, half + stream({"error": {"message": "the deadline"}}), {}, "The service failed: the deadline"),
        ):
            await answers_with(tab, status, body, headers)
            await ask(tab, "?", state="failed")
            assert expected in await tab.js(f"{LAST}.querySelector('[role=alert]').textContent")
        await tab.js("window.fetch = async () => { throw new TypeError('Failed to fetch'); }")
        await ask(tab, "?", state="failed")
        assert "cannot be reached" in await tab.js(f"{LAST}.textContent")
        # A key is asked for, and sent from then on.
        await answers_with(tab, 401, refused)
        await ask(tab, "red?", state="failed")
        assert await tab.js("document.getElementById('key').open")
        await tab.js(
            "window.fetch = (place, options) => { window.sent = options.headers; return asked(place, options); }"
        )
        await tab.write("secret")
        await tab.key("Enter", 13, "\r")
        await tab.until(f"{LAST}.dataset.state === 'done'")
        assert await tab.js("window.sent.Authorization") == "Bearer secret"

    page(steps)


def test_an_answer_can_be_stopped_and_the_conversation_cleared(page):
    async def steps(tab):
        await start(tab)
        await tab.js("""window.fetch = async (place, { signal }) => new Response(new ReadableStream({ start(control) {
            const text = 'data: {"choices": [{"delta": {"content": "One moment"}}]}';
            control.enqueue(new TextEncoder().encode(`${text}\\n\\n`));
            signal.addEventListener("abort", () => control.error(signal.reason));
        } }))""")
        await ask(tab, "?", state="running")
        await tab.until(f"{LAST}.textContent.includes('One moment')")
        assert await tab.js(f"{LAST}.querySelector('.text').getAttribute('aria-busy')") == "true"
        await tab.key("Escape", 27)
        await tab.until(f"{LAST}.dataset.state === 'stopped'")
        assert "Stopped." in await tab.js(f"{LAST}.textContent")
        await tab.js("document.getElementById('clear').click()")  # asks first: the tab says yes
        await tab.until("document.querySelectorAll('.turn').length === 0")
        await tab.open(tab.home)
        await tab.until("!document.getElementById('welcome').hidden")

    page(steps)


def test_the_page_speaks_chinese_fits_a_phone_and_needs_no_mouse(page):
    async def steps(tab):
        await start(tab, 390, 844, language="zh-CN", scheme="dark")
        assert await tab.js("[document.documentElement.lang, document.getElementById('send').textContent]") == [
            "zh-CN",
            "发送",
        ]
        assert await tab.js("[...document.querySelectorAll('[data-text]')].filter((e) => !e.textContent).length") == 0
        assert await tab.js("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 25)"
        await drop(tab, ("circle.png", "image/png", picture((1200, 400))))
        await tab.until("document.querySelector('#pictures img')?.naturalWidth")
        await ask(tab, "<|ref|>red circle<|/ref|>" + "长" * 200)
        assert await tab.js("document.documentElement.scrollWidth <= innerWidth")
        # Each stop of Tab is to be seen and has a name.
        names = """(() => {
            const e = document.activeElement, line = getComputedStyle(e.closest(".row") ?? e).borderColor;
            const name = e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.[0]?.textContent.trim();
            return [e.id, name, getComputedStyle(e).outlineStyle !== "none" || line !== "rgb(52, 58, 68)"];
        })()"""
        await tab.js("document.activeElement.blur(); scrollTo(0, 0)")
        stops = []
        for _ in range(20):
            await tab.key("Tab", 9)
            stop = await tab.js(names)
            if stop in stops or (stops and not stop[1]):
                break
            stops.append(stop)
        assert {"model-0", "open-settings", "clear", "attach", "find", "question", "send"} <= {
            stop[0] for stop in stops
        }
        assert [stop for stop in stops if not (stop[1] and stop[2])] == []
        assert tab.complaints == []

    page(steps)
