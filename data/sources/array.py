"""Where the elements of a JSON array lie: found block by block, so that an array of any length needs little memory.

Only what separates elements is looked at. Whether each is JSON is found when its row is decoded.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from data.sources.content import BLOCK

_QUOTE, _BACKSLASH, _COMMA = b'"'[0], b"\\"[0], b","[0]
# How a byte changes the depth; the comma does not, but stands between elements.
_DEPTH = np.zeros(256, dtype=np.int64)
_DEPTH[list(b"[{")], _DEPTH[list(b"]}")] = 1, -1
_SEPARATES = _DEPTH != 0
_SEPARATES[_COMMA] = True


class ArrayError(ValueError):
    """A text that is not one whole JSON array; `elements` whole ones were found before the fault."""

    def __init__(self, problem: str, elements: int):
        super().__init__(problem, elements)
        self.problem, self.elements = problem, elements
        self.spans = np.empty((0, 3), np.int64)
        """Where those lie, as `find_elements` gives them; empty where that is not known."""


class ArrayScanner:
    """Finds the brackets of one array and the commas between its elements; holds no text."""

    def __init__(self) -> None:
        self._depth = 0
        self._closed = False
        self._in_string = False
        self._escaped = False  # the next byte follows a backslash
        self._cuts = 0

    def feed(self, block: bytes) -> np.ndarray:
        r"""Look at the next bytes of the text.

        Returns:
            Places in the block of the array's opening bracket, its commas and its closing bracket: an element lies
            between each two. In b'[1, "],"]' they are 0, 2 and 8.

        Raises:
            ArrayError: text after the closing bracket.
        """
        if self._closed:
            self._check_end(block)
            return np.empty(0, np.int64)
        content = np.frombuffer(block, dtype=np.uint8)
        quotes = self._quotes(content)
        places = np.flatnonzero(_SEPARATES[content])
        outside = (np.searchsorted(quotes, places) + self._in_string) % 2 == 0
        places = places[outside]
        self._in_string = (len(quotes) + self._in_string) % 2 == 1

        byte = content[places]
        depth = self._depth + np.cumsum(_DEPTH[byte])
        if len(depth):
            self._depth = int(depth[-1])
        ends = np.flatnonzero(depth <= 0)
        if len(ends):
            last = int(ends[0])
            places, byte, depth = places[: last + 1], byte[: last + 1], depth[: last + 1]
            self._closed = True
        is_cut = (depth == 0) | ((depth == 1) & (byte == _COMMA))
        if not self._cuts and len(depth):
            is_cut[0] = True  # the opening bracket
        cuts = places[is_cut]
        self._cuts += len(cuts)
        if self._closed:
            self._check_end(block[int(places[-1]) + 1 :])
        return cuts

    def finish(self) -> None:
        """Check that the array was closed.

        Raises:
            ArrayError: it was not.
        """
        if not self._closed:
            raise ArrayError("expected the array to end with ], found the end of the text", max(0, self._cuts - 1))

    def _quotes(self, content: np.ndarray) -> np.ndarray:
        """Places of the quotes that begin or end a string."""
        quotes = np.flatnonzero(content == _QUOTE)
        backslashes = np.flatnonzero(content == _BACKSLASH)
        if self._escaped and len(content):
            quotes, backslashes = quotes[quotes > 0], backslashes[backslashes > 0]
            self._escaped = False
        if not len(backslashes):
            return quotes
        # The byte after an odd number of backslashes in a row is escaped.
        begins = np.flatnonzero(np.diff(backslashes, prepend=-2) != 1)
        lengths = np.diff(begins, append=len(backslashes))
        escaped = (backslashes[begins] + lengths)[lengths % 2 == 1]
        self._escaped = bool(len(escaped) and escaped[-1] == len(content))
        return quotes[~np.isin(quotes, escaped)]

    def _check_end(self, rest: bytes) -> None:
        if text := rest.strip():
            raise ArrayError(f"expected nothing after the array's closing ], found {text[:40]!r}", self._cuts - 1)


def find_elements(file: BinaryIO) -> np.ndarray:
    """Find the elements of the array that a file is.

    Args:
        file: at its beginning; it is read to its end.

    Returns:
        int64 [N, 3]: first byte, byte after the last one, number from 1; space around an element is inside.

    Raises:
        ArrayError: not one whole array.

    Example: b"[1, [2]]" gives [[1, 2, 1], [3, 7, 2]].
    """
    scanner, found, position = ArrayScanner(), [np.empty(0, np.int64)], 0
    try:
        while block := file.read(BLOCK):
            found.append(scanner.feed(block) + position)
            position += len(block)
        scanner.finish()
    except ArrayError as error:
        error.spans = _between(found)
        raise
    elements = _between(found)
    if len(elements) == 1:
        file.seek(elements[0, 0])
        if not file.read(elements[0, 1] - elements[0, 0]).strip():  # []
            return elements[:0]
    return elements


def _between(found: list[np.ndarray]) -> np.ndarray:
    cuts = np.concatenate(found)
    return np.stack([cuts[:-1] + 1, cuts[1:], np.arange(1, max(1, len(cuts)))], axis=1)
