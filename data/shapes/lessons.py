"""Text-only lessons of nano's pre-training: repeating any text, and the names of shapes in two languages.

Without them most rows of the embedding and of the output head would never be trained, and no later LoRA could use them.
"""

import random
import string
from functools import lru_cache

from data.nano_tokenizer import read_words
from data.shapes.questions import Question, chinese
from data.shapes.scene import KINDS

# Blocks of characters without gaps (so no Unicode version matters), of 2, 3 and 4 bytes, for the single-byte tokens.
_SCRIPTS = (
    (0x00AE, 0x024F),  # Latin
    (0x0250, 0x02FF),  # phonetic
    (0x0400, 0x052F),  # Cyrillic
    (0x05D0, 0x05EA),  # Hebrew
    (0x0621, 0x064A),  # Arabic
    (0x0671, 0x06D3),  # more Arabic
    (0x0780, 0x07A5),  # Thaana
    (0x03B1, 0x03CE),  # Greek
    (0x0561, 0x0586),  # Armenian
    (0x0710, 0x072F),  # Syriac
    (0x07C0, 0x07E7),  # N'Ko
    (0x0905, 0x0939),  # Devanagari
    (0x1200, 0x1246),  # Ethiopic
    (0x2190, 0x23E8),  # arrows, mathematics
    (0x2500, 0x26FF),  # boxes, symbols
    (0x3041, 0x3096),  # Hiragana
    (0x30A1, 0x30FA),  # Katakana
    (0x3400, 0x4DB5),  # rare Chinese
    (0x4E00, 0x9FA5),  # Chinese
    (0x4E00, 0x9FA5),  # Chinese, twice as often
    (0xA000, 0xA48C),  # Yi
    (0xAC00, 0xD7A3),  # Korean
    (0xFF01, 0xFF5E),  # full-width forms
    (0x1F300, 0x1F64F),  # emoji
    (0x20000, 0x2A6D6),  # rarer Chinese
)
_BETWEEN = (" ",) * 8 + ("", "", ", ", ", ", "\n", "\n\n", ".\n", ". ")


def repeat_lesson(rng: random.Random) -> Question:
    """A "Repeat:" and 1 to 4 random pieces of text on the next line, which are the answer."""
    text = _piece(rng)
    for _ in range(rng.randint(0, 3)):
        text += rng.choice(_BETWEEN) + _piece(rng)
    return Question(kind="repeat", text=f"Repeat:\n{text}", answer=text)


def translate_lesson(rng: random.Random) -> Question:
    """The Chinese name for an English one, or the other way round."""
    colour, form = rng.choice(KINDS)
    pair = f"{colour} {form}", chinese(f"{colour} {form}")
    source, target = pair if rng.random() < 0.5 else pair[::-1]
    return Question(kind="translate", text=f"Translate: {source}", answer=target)


def _piece(rng: random.Random) -> str:
    words = _all_words()
    sort = rng.randrange(10)
    if sort < 4:
        return rng.choice(words)
    if sort < 6:  # Starts and ends of words: pieces that are no words.
        first, second = rng.choice(words), rng.choice(words)
        start, end = first[: rng.randint(1, len(first))], second[rng.randrange(len(second)) :]
        return rng.choice((start, end, start + end))
    if sort < 7:
        return rng.choice(words).capitalize()
    if sort < 8:
        return str(rng.randrange(10 ** rng.randint(1, 3)))
    if sort < 9:
        return "".join(rng.choices(string.ascii_letters + string.punctuation, k=rng.randint(1, 3)))
    return "".join(_any_character(rng) for _ in range(rng.randint(1, 3)))


def _any_character(rng: random.Random) -> str:
    first, last = rng.choice(_SCRIPTS)
    return chr(rng.randint(first, last))


@lru_cache(maxsize=1)
def _all_words() -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for group in read_words() for word in group.words))
