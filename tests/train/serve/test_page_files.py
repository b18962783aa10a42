"""The page's files as they stand: nothing from elsewhere, no text as HTML, every text in both languages."""

import re

import pytest

from tests.train.page.html_reader import Page, outside_links
from train.serve.page_files import PAGE

SCRIPTS = {path.name: path.read_text("utf-8") for path in sorted(PAGE.glob("*.js"))}
INDEX = (PAGE / "index.html").read_text("utf-8")
TEXTS = re.findall(r'^  (\w+): \[\s*"(.*?)",\s*"(.*?)",?\s*\],$', SCRIPTS["texts.js"], re.MULTILINE | re.DOTALL)


def test_nothing_comes_from_elsewhere():
    for name, text in {**SCRIPTS, "index.html": INDEX, "style.css": (PAGE / "style.css").read_text("utf-8")}.items():
        assert re.findall(r"(?:https?:)?//\w[\w./]*", re.sub(r"// .*", "", text)) in (
            [],
            ["http://www.w3.org/2000/svg"],  # a name, which is not fetched
        ), name
        assert not re.search(r"\burl\(|@import", text), name
    places = {link for link in outside_links(Page(INDEX)) if "=" in link}
    assert places == {"link href=data:,", "link href=style.css", "script src=page.js"}


def test_texts_are_never_taken_as_html():
    for name, text in SCRIPTS.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
    assert not re.search(r"\son\w+=|style=", INDEX)  # which the policy would not let pass


def test_modules_and_elements_exist():
    for name, text in SCRIPTS.items():
        assert set(re.findall(r'from "\./(.*?)"', text)) <= SCRIPTS.keys(), name
        for used in re.findall(r'\$\("([\w-]+)"\)', text):
            assert f'id="{used}"' in INDEX, (name, used)


def test_every_text_is_there_in_both_languages():
    named = {name for name, _, _ in TEXTS}
    assert len(TEXTS) > 50
    assert len(named) == len(TEXTS) == SCRIPTS["texts.js"].split("const TEXTS")[1].split("\n};")[0].count(": [")
    code = "".join(text for name, text in SCRIPTS.items() if name != "texts.js")
    used = {*re.findall(r'data-(?:text|label|title|placeholder)="(\w+)"', INDEX), *re.findall(r'say\("(\w+)"', code)}
    used |= set(re.findall(r'button\("(\w+)"', code))
    used |= {name for pair in re.findall(r'\? "(\w+)" : "(\w+)"', code) for name in pair} & named
    assert used == named
    for name, english, chinese in TEXTS:
        assert re.search("[\u4e00-\u9fff]", chinese), name
        assert not re.search("[\u4e00-\u9fff]", english), name
        assert sorted(re.findall(r"\{(\w+)\}", english)) == sorted(re.findall(r"\{(\w+)\}", chinese)), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_stays_short(name):
    assert len(SCRIPTS[name].splitlines()) <= 210
