"""Metrics of an answer's text against examples worked by hand, in English and Chinese."""

import random

import pytest

from train.ask.scores.plain import holds, plain
from train.ask.scores.texts import _edits, anls, contains, exact_match, normalised_match, relaxed_accuracy


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("  红色，３ 个。", "红色3个"),
        ("It's RED!", "its red"),
        ("U.S. Navy", "us navy"),
        ("well-known", "well known"),
        ("red,blue", "red blue"),
        ("《红楼梦》", "红楼梦"),
        ("答案：Ａ", "答案a"),
        ("有 3 只 cat 在", "有3只cat在"),
        ("new  york\n", "new york"),
        ("newyork", "newyork"),
        ("“是”的", "是的"),
        ("カタ カナ", "カタカナ"),
        ("ﾊﾝｶｸ", "ハンカク"),
        ("한국 사람", "한국 사람"),  # Korean words are divided by spaces
        ("-3.50", "-3.50"),
        ("−3", "-3"),
        ("是 -3", "是-3"),
        ("是-3", "是-3"),
        ("3.", "3"),
        (".5, -.5", ".5 -.5"),
        ("a...5", "a5"),
        ("12:30", "12:30"),
        ("１２％", "12%"),
        ("1/2, 3/4", "1/2 3/4"),
        ("2026-11-26", "2026-11-26"),
        ("C++", "c++"),
        ("$5", "$5"),
        ("Straße", "strasse"),
        ("…", ""),
        ("", ""),
    ],
)
def test_plain(text, shown):
    assert plain(text) == shown
    assert plain(shown) == shown


@pytest.mark.parametrize(
    ("references", "answer", "exact", "normalised"),
    [
        (["red"], " red\n", 1, 1),
        (["red"], "Red.", 0, 1),
        (["red", "crimson"], "crimson", 1, 1),
        (["red"], "crimson", 0, 0),
        (["红色，3 个。"], "红色３个", 0, 1),
        (["红色3个"], "红色4个", 0, 0),
        (["3.5"], "35", 0, 0),
        (["-3"], "3", 0, 0),
        (["50%"], "50", 0, 0),
        (["new york"], "newyork", 0, 0),
        (["red"], "", 0, 0),
        ([""], "", 1, 1),
        ([""], "red", 0, 0),
        (["!"], "?", 0, 0),
        (["!"], "!", 1, 1),
        ([], "red", 0, 0),
    ],
)
def test_matches(references, answer, exact, normalised):
    assert (exact_match(references, answer), normalised_match(references, answer)) == (exact, normalised)


@pytest.mark.parametrize(
    ("references", "answer", "value"),
    [
        (["cat"], "It is a Cat.", 1),
        (["cat"], "concatenate", 0),
        (["cat"], "cats", 0),
        (["a cat"], "there's a  cat", 1),
        (["红色"], "它是红色的。", 1),
        (["红 色"], "它是红色的。", 1),
        (["cat"], "一只cat在", 1),
        (["3"], "35", 0),
        (["3"], "3.5", 0),
        (["3"], "1,3", 0),
        (["3"], "有3个", 1),
        (["3"], "3.", 1),
        (["-3"], "it is -3", 1),
        (["-3"], "是-3。", 1),
        (["3"], "13, 3", 1),
        (["c++"], "C++, of course", 1),
        (["dog", "cat"], "a cat", 1),
        (["cat"], "", 0),
        ([""], "anything", 0),
        ([""], "", 1),
        (["!"], "red!", 0),
    ],
)
def test_contains(references, answer, value):
    assert contains(references, answer) == value


def test_holds_takes_marks_as_they_are():
    assert holds("a.b", "a") and not holds("axb", "a.b")


@pytest.mark.parametrize(
    ("references", "answer", "value"),
    [
        (["monday"], "Mondey", 1 - 1 / 6),
        (["MONDAY"], "  monday ", 1),
        (["monday"], "Mo", 0),  # 1 - 4/6 is below the threshold
        (["abcd"], "ab", 0.5),  # at the threshold it counts, as in DocVQA's evaluation
        (["abcd"], "abxy", 0.5),
        (["abcde"], "abxyz", 0),
        (["a b"], "a  b", 1),
        (["monday", "mondey"], "Mondey", 1),
        (["北京大学"], "北京大字", 0.75),
        (["kitten"], "sitting", 1 - 3 / 7),
        (["red"], "", 0),
        ([""], "", 1),
        ([""], "red", 0),
        ([], "red", 0),
    ],
)
def test_anls(references, answer, value):
    assert anls(references, answer) == pytest.approx(value)


def test_edits_are_those_of_the_table():
    """The table filled cell by cell, as textbooks do, for random texts."""

    def textbook(one: str, other: str) -> int:
        table = [list(range(len(other) + 1))]
        for i, a in enumerate(one, 1):
            table.append([i])
            for j, b in enumerate(other, 1):
                table[i].append(min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b)))
        return table[-1][-1]

    draw = random.Random(0)
    for _ in range(100):
        one, other = ("".join(draw.choices("abc红", k=draw.randint(0, 9))) for _ in range(2))
        assert _edits(one, other) == textbook(one, other)


@pytest.mark.parametrize(
    ("references", "answer", "value"),
    [
        (["20"], "21", 1),
        (["20"], "19.0", 1),
        (["20"], "18.9", 0),
        (["20"], "21.01", 0),
        (["-20"], "-21", 1),
        (["-20"], "21", 0),
        (["20"], "２０", 1),
        (["1,000"], "1040", 1),
        (["12,34"], "1234", 0),  # no thousands
        (["50%"], "0.51", 1),
        (["50%"], "50", 0),
        (["50%"], "52 %", 1),
        ([".5"], "0.5", 1),
        (["0"], "0.0", 1),
        (["0"], "0.001", 0),
        (["2019"], "2020", 1),  # years are numbers here, as in the official evaluation
        (["3个"], "3个", 1),
        (["20"], "about 20", 0),
        (["20"], "", 0),
        (["Yes"], "yes", 1),
        (["yes"], "no", 0),
        (["yes"], "3", 0),
        (["nan"], "nan", 1),
        (["inf"], "1e999", 0),
        (["10", "20"], "21", 1),
        ([""], "", 1),
        ([], "3", 0),
    ],
)
def test_relaxed_accuracy(references, answer, value):
    assert relaxed_accuracy(references, answer) == value


def test_long_answers_are_compared_in_no_time():
    """4,000 characters, letter by letter in Python, would be a table of 16 million cells an answer."""
    text = "".join(random.Random(1).choices("abcdef", k=4000))
    changed = text[:1000] + "x" + text[1001:3000] + text[3001:]
    assert anls([text], changed) == pytest.approx(1 - 2 / 4000)
