"""What of an answer is not as expected, marked word by word, and letter by letter within words that are alike."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Words of alphabets, other letters (Chinese) one by one, white space, and each mark by itself.
_TOKEN = re.compile(r"[^\W\u2e80-\u9fff\U00020000-\U0003ffff]+|\s+|.", re.DOTALL)
MOST_TOKENS = 600  # of a text that are compared: the time goes with their square
_ALIKE = 0.6  # from here on two words are one with other letters
_LONGEST_WORD = 60  # characters; a longer one is no word


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a text."""

    text: str
    differs: bool


def differences(expected: str, answer: str) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Mark what an answer lacks in the expected text, and what it has instead in its own.

    Beyond the first 600 words nothing is compared, and nothing marked.

    Example: "a red cat" and "a blue cat" differ in red and in blue; "monday" and "mondey" in a and in e.
    """
    wanted, given = _TOKEN.findall(expected), _TOKEN.findall(answer)
    left: list[Part] = []
    right: list[Part] = []
    for one, other, same in _compare(wanted[:MOST_TOKENS], given[:MOST_TOKENS]):
        if same or len(one) != 1 or len(other) != 1 or not _alike(one[0], other[0]):
            left.append(Part(text="".join(one), differs=not same))
            right.append(Part(text="".join(other), differs=not same))
            continue
        for a, b, equal in _compare(one[0], other[0]):
            left.append(Part(text="".join(a), differs=not equal))
            right.append(Part(text="".join(b), differs=not equal))
    left.append(Part(text="".join(wanted[MOST_TOKENS:]), differs=False))
    right.append(Part(text="".join(given[MOST_TOKENS:]), differs=False))
    return _joined(left), _joined(right)


def _compare(one: Sequence[str], other: Sequence[str]) -> Iterator[tuple[Sequence[str], Sequence[str], bool]]:
    for kind, a, b, c, d in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        yield one[a:b], other[c:d], kind == "equal"


def _alike(one: str, other: str) -> bool:
    if max(len(one), len(other)) > _LONGEST_WORD:
        return False
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio() >= _ALIKE


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Put neighbours of one kind together, without empty ones."""
    found: list[Part] = []
    for part in parts:
        if found and found[-1].differs == part.differs:
            found[-1] = Part(text=found[-1].text + part.text, differs=part.differs)
        elif part.text:
            found.append(part)
    return tuple(found)
