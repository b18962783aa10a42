"""What a browser makes of a page: elements, scripts, text; and the page in a real browser, where one is installed."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LINKS = ("src", "href", "xlink:href", "srcset", "action", "formaction", "poster", "data", "background", "ping")


class Page(HTMLParser):
    """Elements, texts and scripts of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.own_texts: list[str] = []  # of each element, up to its first child's start or its end
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.texts: list[str] = []
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.own_texts.append("")
        self._inside = tag
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside == "style":
            self.styles[-1] += data
        else:
            self.texts.append(data)
            if self._inside:
                self.own_texts[-1] += data

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def count(self, tag: str, **attributes: str) -> int:
        return sum(name == tag and attributes.items() <= attrs.items() for name, attrs in self.elements)


def outside_links(page: Page) -> list[str]:
    """Whatever a browser would fetch for a page, or go to from it."""
    found = [
        f"{tag} {name}={value[:80]}"
        for tag, attrs in page.elements
        for name, value in attrs.items()
        if name in LINKS and not value.startswith(("#", "data:image/"))
    ]
    found += [tag for tag, _ in page.elements if tag in ("link", "base", "iframe", "frame", "object", "embed", "form")]
    found += [f"refresh {attrs}" for _, attrs in page.elements if attrs.get("http-equiv", "").lower() == "refresh"]
    found += [attrs["style"] for _, attrs in page.elements if "url(" in attrs.get("style", "")]
    return found + [style for style in page.styles if "url(" in style or "@import" in style]


def browser() -> str | None:
    """A browser that is installed here."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def open_in_browser(path: Path, profile: Path, *options: str, fragment: str = "") -> str:
    """The page after its scripts ran, as HTML; opened at #fragment."""
    program = browser()
    assert program is not None
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=2000", *options, f"{path.as_uri()}#{fragment}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout
