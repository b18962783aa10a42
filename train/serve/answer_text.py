"""From tokens to text that can be shown: whole characters, and nothing that may turn out to be a stop word."""

from __future__ import annotations

from collections.abc import Sequence

from vl2.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to


class AnswerText:
    """The text of one answer while it grows.

    The texts that `add` and `end` give make up the answer: what the tokens decode to, up to the first stop word.

    Args:
        tokenizer: of the model.
        stops: texts that end the answer and are no part of it, none of them empty.

    Attributes:
        text: what has been given out.
        stopped: a stop word came; nothing more is given out.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []  # whose text is not known yet: half a character
        self._held = ""  # may become a stop word
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; the text that is certain now, often none."""
        self._ids.append(token)
        found = self._tokenizer.decode(self._ids)
        if found.endswith(_UNFINISHED):
            return ""
        self._ids.clear()
        return self._give(found, last=False)

    def end(self) -> str:
        """The answer has ended: the text that was held back."""
        found = self._tokenizer.decode(self._ids) if self._ids else ""
        self._ids.clear()
        return self._give(found, last=True)

    def _give(self, found: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        known = self._held + found
        places = [place for stop in self._stops if (place := known.find(stop)) >= 0]
        if places:
            self.stopped, shown, self._held = True, known[: min(places)], ""
        else:
            hold = 0 if last else self._longest_start(known)
            shown, self._held = known[: len(known) - hold], known[len(known) - hold :]
        self.text += shown
        return shown

    def _longest_start(self, known: str) -> int:
        """How many of the last characters are the start of a stop word."""
        most = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(most, len(known)), 0, -1):
            if any(stop.startswith(known[-size:]) for stop in self._stops):
                return size
        return 0
