"""Texts as two people would compare them: without what case, width, punctuation and white space make of them."""

from __future__ import annotations

import re
import unicodedata

# And Japanese: radicals, marks of repetition, kana, ideographs.
_CHINESE = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
)
_SPACE_BESIDE_CHINESE = re.compile(rf"(?<=[{_CHINESE}])\s+|\s+(?=[{_CHINESE}])")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)[.,:/-](?=\d)", re.ASCII)  # 3.5, 12:30, 1/2, 2026-11-26
_SIGN = re.compile(rf"(?<![^\s(\[{_CHINESE}])-(?=\.?\d)", re.ASCII)  # of a number
_POINT = re.compile(r"(?<![\w.])\.(?=\d)", re.ASCII)  # of .5
_VANISH = frozenset(".'\u2019")  # U.S., don't
_KEPT = frozenset("%\u2030")  # says what a number is
_MARK_OF_NUMBER = re.compile(r"\d[.,:/-]", re.ASCII)
_REST_OF_NUMBER = re.compile(r"[.,:/-]\d", re.ASCII)
_WORD = re.compile(rf"[^\W{_CHINESE}]")


def plain(text: str) -> str:
    """Take away what does not change an answer.

    1. Full width becomes half width and compatibility forms become plain ones (NFKC): １２％ is 12%, ﬁ is fi; a true
       minus is a hyphen.
    2. Case goes (casefold).
    3. Punctuation goes, Chinese too: full stops and apostrophes leave nothing (U.S. is us), all other marks a space.
       It stays where it is part of a number: between digits (3.5, 12:30, 1/2), before them (-3, .5), and as %. Symbols
       such as + and $ are no punctuation.
    4. White space becomes one space; beside Chinese and Japanese characters, which need none, it goes.

    Words stay as they are: no article is taken away, no numeral read, no traditional character simplified.

    Source: the normalisation of SQuAD's evaluation (Rajpurkar et al. 2016, section 6.1) without its English articles;
    steps 1 and 4 and numbers are ours, for Chinese and for answers that are numbers.

    Example: "  红色，３ 个。" and "红色3个" are both 红色3个; "It's RED!" is "its red"; "-3.50" stays.
    """
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").casefold()
    kept = {found.start() for pattern in (_BETWEEN_DIGITS, _SIGN, _POINT) for found in pattern.finditer(text)}
    shown = "".join(
        character
        if i in kept or character in _KEPT or not unicodedata.category(character).startswith("P")
        else ("" if character in _VANISH else " ")
        for i, character in enumerate(text)
    )
    return _SPACE_BESIDE_CHINESE.sub("", " ".join(shown.split()))


def holds(text: str, part: str) -> bool:
    """Whether a plain text holds another one that is not empty.

    Not inside of a longer word or number; between Chinese characters anywhere.

    Example: "a red cat" holds "cat", "concatenate" and "35" hold neither "cat" nor "3", 一只红猫 holds 红猫.
    """
    start = text.find(part)
    while start >= 0:
        end = start + len(part)
        before = text[max(0, start - 2) : start]
        inside = _WORD.match(part[0]) and (_WORD.match(before[-1:]) or _MARK_OF_NUMBER.match(before))
        goes_on = _WORD.match(part[-1]) and (_WORD.match(text[end : end + 1]) or _REST_OF_NUMBER.match(text, end))
        if not inside and not goes_on:
            return True
        start = text.find(part, start + 1)
    return False
