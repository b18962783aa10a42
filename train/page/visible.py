"""Text as a page shows it: what cannot be seen, or would turn other text around, gets a shape."""

from __future__ import annotations

import re

# Controls, what turns the direction of text, what has no width, halves of surrogate pairs. Joiners of emoji stay.
_UNSEEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Give unseen characters a shape; tabs and line ends stay.

    Example: "a\\0b\\u202ec" becomes "a␀b⟨U+202E⟩c".
    """
    return _UNSEEN.sub(_shape, text)


def _shape(found: re.Match[str]) -> str:
    code = ord(found.group())
    if code < 0x20:
        return chr(0x2400 + code)  # the Unicode block of control pictures
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"
