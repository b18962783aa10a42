"""Metrics of one answer beside the answers that would be right: 0 to 1, and the best of the right ones counts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from train.ask.scores.plain import holds, plain

ANLS_THRESHOLD = 0.5
RELATIVE_ERROR = 0.05  # of a number, as ChartQA allows
_NUMBER = re.compile(r"([+-]?)\s*(\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)\s*(%?)", re.ASCII)


def exact_match(references: Sequence[str], answer: str) -> float:
    """1 where the answer is a right one character by character, white space around it aside; else 0.

    Source: exact match of SQuAD (Rajpurkar et al. 2016, section 6.1), without its normalisation.

    Edge cases: an empty answer is right only where an empty one is expected.

    Example: "red" expected: "red\\n" is 1, "Red" and "red." are 0.
    """
    return float(answer.strip() in {reference.strip() for reference in references})


def normalised_match(references: Sequence[str], answer: str) -> float:
    """1 where the answer is a right one but for case, width, punctuation and white space (`plain`); else 0.

    Edge cases: a right answer that is punctuation alone is compared as `exact_match` does, so that ! is not ?.

    Example: "红色，3 个。" expected: "红色３个" is 1, "红色4个" is 0. "3.5" expected: "35" is 0.
    """
    given = plain(answer)
    return float(any((plain(reference) or reference.strip()) == (given or answer.strip()) for reference in references))


def contains(references: Sequence[str], answer: str) -> float:
    """1 where the answer holds a right one, both as `plain` has them, and not inside of a longer word or number.

    A lenient metric for answers in sentences: it does not see that "not a cat" denies what it holds.

    Source: as OCRBench counts (Liu et al. 2023, section 3: an answer is right where the label occurs in it), there
    inside of words too.

    Edge cases: a right answer that is empty or punctuation alone is compared as `exact_match` does.

    Example: "cat" expected: "It is a Cat." is 1, "concatenate" 0. 红色 expected: 它是红色的 is 1. Of "3", 35 is 0.
    """
    given = plain(answer)
    return float(
        any(
            holds(given, part) if (part := plain(reference)) else reference.strip() == answer.strip()
            for reference in references
        )
    )


def anls(references: Sequence[str], answer: str) -> float:
    """Normalised Levenshtein similarity to the nearest right answer; 0 where it is below 0.5.

    1 - edits / length of the longer, both in lower case with single spaces. Its mean over the questions is ANLS. Right
    answers read with a wrong letter or two lose a little, other answers everything.

    Source: Biten et al. 2019 (Scene Text Visual Question Answering), equation 1; at exactly 0.5 as the official
    evaluation of DocVQA has it, which keeps 0.5.

    Edge cases: an empty answer is 0 unless an empty one is expected, then 1. Chinese counts by characters.

    Example: "monday" expected: "Mondey" is 1 - 1/6 = 0.8333, "Mo" is 1 - 4/6, below 0.5, and so 0.
    """
    given = _lower(answer)
    best = max((_similarity(_lower(reference), given) for reference in references), default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def relaxed_accuracy(references: Sequence[str], answer: str) -> float:
    """1 where the answer is the expected number within 5 % of it; other answers must be equal but for case.

    A number is the whole answer: digits, a sign, a decimal point, commas between thousands, % (a hundredth); full width
    too. A number within a sentence or with a unit is text.

    Source: Masry et al. 2022 (ChartQA), end of section 5.1, after Methani et al. 2020; `relaxed_correctness` in
    Pix2Struct's metrics.py. Commas between thousands, and a full stop after the answer, are text there.

    Edge cases: no number expected: text. 0 expected: 0 alone. "nan" and "inf" are text.

    Example: "20" expected: 19, 21 and 21.0 are 1, 18.9 is 0. "1,000" expected: 1040 is 1. "50%" expected: 0.51 is 1, 50
    is 0.
    """
    given, text = _number(answer), _lower(answer)
    for reference in references:
        wanted = _number(reference)
        if wanted is None or given is None:
            right = _lower(reference) == text
        else:  # a billionth, since 21 is 20 and 5 % although 0.05 is no binary fraction
            right = abs(given - wanted) <= RELATIVE_ERROR * abs(wanted) * (1 + 1e-9)
        if right:
            return 1.0
    return 0.0


def _lower(text: str) -> str:
    return " ".join(text.lower().split())


def _number(text: str) -> float | None:
    found = _NUMBER.fullmatch(unicodedata.normalize("NFKC", text).replace("\u2212", "-").strip())
    if found is None:
        return None
    sign, digits, percent = found.groups()
    return float(sign + digits.replace(",", "")) / (100 if percent else 1)


def _similarity(one: str, other: str) -> float:
    longer = max(len(one), len(other))
    if not longer:
        return 1.0
    if abs(len(one) - len(other)) > ANLS_THRESHOLD * longer:  # too many edits already
        return 0.0
    return 1 - _edits(one, other) / longer


def _edits(one: str, other: str) -> int:
    """Levenshtein's distance: fewest insertions, removals and replacements of a character, row by row of the table."""
    characters, places = np.array([ord(character) for character in other]), np.arange(len(other) + 1)
    row = places
    for i, character in enumerate(one, 1):
        kept = np.minimum(row[1:] + 1, row[:-1] + (characters != ord(character)))
        # An insertion adds 1 a place to the right: the least of all places to the left, each with its distance.
        row = np.minimum.accumulate(np.concatenate([[i], kept]) - places) + places
    return int(row[-1])
