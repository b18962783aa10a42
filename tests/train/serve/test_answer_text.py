"""Text that grows by tokens: whole characters, and stop words wherever the ends of tokens lie."""

import pytest

from tests.places import NANO_BPE
from train.serve.answer_text import AnswerText
from vl2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(NANO_BPE)
TEXT = "A 红 circle — naïve 🙂 and <|ref|>a cat<|/ref|>, aab aabaac."


def grown(ids, stops=()):
    text = AnswerText(TOKENIZER, stops)
    given = []
    for token in ids:
        given.append(text.add(token))
        if text.stopped:
            break
    given.append(text.end())
    assert "".join(given) == text.text
    return text, given


def test_pieces_are_whole_characters():
    """Nano's tokenizer spells most of these in several tokens each."""
    ids = TOKENIZER.encode(TEXT)
    text, given = grown(ids)
    assert text.text == TEXT and not any("\ufffd" in piece for piece in given)
    assert len([piece for piece in given if piece]) > 10
    assert grown(ids[:-1] + TOKENIZER.encode("🙂")[:2])[0].text.endswith("\ufffd")  # half a character at the end


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
def test_every_stop_word_is_found_and_never_shown(length):
    ids = TOKENIZER.encode(TEXT)
    for start in range(len(TEXT) - length + 1):
        stop = TEXT[start : start + length]
        text, _ = grown(ids, ["never said", stop])
        assert text.text == TEXT[: TEXT.index(stop)] and text.stopped, stop
    text, _ = grown(ids, ["aabaaac", "circles"])
    assert text.text == TEXT and not text.stopped


def test_the_first_of_several_stop_words_ends_the_answer():
    assert grown(TOKENIZER.encode("one two three"), ["three", "two t", "wo"])[0].text == "one t"


def test_what_may_become_a_stop_word_is_held_back_and_given_at_the_end():
    text = AnswerText(TOKENIZER, ["aabaac"])
    shown = [text.add(token) for token in TOKENIZER.encode("x aabaa")]
    assert "".join(shown) == "x " and text.end() == "aabaa"
