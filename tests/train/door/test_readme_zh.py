"""README.zh.md says what README.md says: the same sections, commands, keys and figures.

The commands are those of README.md, which test_readme.py runs.
"""

import re
from collections import Counter

import pytest

from tests.places import ROOT

ENGLISH, CHINESE = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,:]\d+)*(?![\d ]*月)")  # February has no number in English


def sections(text: str) -> list[tuple[str, str]]:
    """(level of the heading, what stands below it without its blocks) of each section."""
    parts = re.split(r"^(#+) .*\n", BLOCK.sub("", text), flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def tables(text: str) -> list[list[str]]:
    """The rows of each table."""
    return [found.splitlines() for found in re.findall(r"(?:^\|.*\n)+", BLOCK.sub("", text), re.MULTILINE)]


def figures(text: str) -> Counter:
    """Numbers outside of code and links, each as often as it stands there."""
    return Counter(NUMBER.findall(re.sub(r"\]\(.*?\)", "]", CODE.sub("", text))))


SECTIONS = list(zip(sections(ENGLISH), sections(CHINESE), strict=False))


def test_they_name_each_other_first():
    assert ENGLISH.splitlines()[0] == "English | [简体中文](README.zh.md)"
    assert CHINESE.splitlines()[0] == "[English](README.md) | 简体中文"


def test_sections_are_the_same():
    assert [level for level, _ in sections(ENGLISH)] == [level for level, _ in sections(CHINESE)]
    assert len(SECTIONS) > 8


def test_blocks_are_the_same():
    """The tree too, but for what it says of the folders."""
    (*english, tree), (*chinese, chinese_tree) = (BLOCK.findall(text) for text in (ENGLISH, CHINESE))
    assert english == chinese and len(english) > 8
    folders = [re.findall(r"^ *\S+/", block, re.MULTILINE) for _, block in (tree, chinese_tree)]
    assert folders[0] == folders[1] and len(folders[0]) > 20
    assert len(tree[1].splitlines()) == len(folders[0])


def test_tables_say_the_same():
    assert len(tables(ENGLISH)) == len(tables(CHINESE)) > 3
    for english, chinese in zip(tables(ENGLISH), tables(CHINESE), strict=True):
        assert len(english) == len(chinese)
        for row, other in zip(english, chinese, strict=True):
            assert row.count("|") == other.count("|"), other
            assert CODE.findall(row) == CODE.findall(other), other
            assert figures(row) == figures(other), other


@pytest.mark.parametrize("number", range(len(SECTIONS)))
def test_a_section_names_the_same_keys_figures_and_links(number):
    (_, english), (_, chinese) = SECTIONS[number]
    missing = set(CODE.findall(english)) - set(CODE.findall(chinese))
    added = set(CODE.findall(chinese)) - set(CODE.findall(english))
    assert (missing, added) == (set(), set())
    assert figures(english) == figures(chinese)
    assert english.count("\n- ") == chinese.count("\n- ")
    assert re.findall(r"\]\((.*?)\)", english) == re.findall(r"\]\((.*?)\)", chinese)


def test_it_is_chinese():
    """No sentence was left in English."""
    for _, text in sections(CHINESE):
        for line in text.splitlines():
            plain = re.sub(r"\]\(.*?\)", "]", CODE.sub("", line))
            assert not re.search(r"[A-Za-z][a-z]+(?: [a-z]+){4}", plain), line
