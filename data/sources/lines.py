"""Where the lines of a JSON-lines file lie: found in one pass over its bytes, without decoding any."""

from __future__ import annotations

import codecs
from typing import BinaryIO

import numpy as np

from data.sources.content import BLOCK

_NEWLINE = ord("\n")
_SPACE = np.frombuffer(b" \t\r\v\f", dtype=np.uint8)


def find_lines(file: BinaryIO) -> np.ndarray:
    r"""Find the lines that are not blank.

    Args:
        file: at its beginning; it is read to its end, then where lines begin with a space.

    Returns:
        int64 [N, 3]: first byte, byte after the last one, line number from 1. The line end is outside; a byte order
        mark too.

    Example: b"{}\n\n{}" gives [[0, 2, 1], [4, 6, 3]].
    """
    ends, heads = [], []
    first = position = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    file.seek(first)
    at_start = True  # the next byte is the first of a line
    while block := file.read(BLOCK):
        content = np.frombuffer(block, dtype=np.uint8)
        found = np.flatnonzero(content == _NEWLINE)
        inside = found[:-1] if len(found) and found[-1] == len(content) - 1 else found
        heads.append(content[: int(at_start)].copy())  # a view would keep the whole block
        heads.append(content[inside + 1])
        at_start = len(inside) < len(found)
        ends.append(found + position)
        position += len(content)

    newlines = np.concatenate([*ends, np.empty(0, np.int64)])
    starts = np.concatenate([[first], newlines + 1])
    stops = np.concatenate([newlines, [position]])
    head = np.concatenate([*heads, np.empty(0, np.uint8)])
    lines = np.stack([starts, stops, np.arange(1, len(starts) + 1)], axis=1)[: len(head)]  # a last line may be empty
    kept = head != _NEWLINE
    for i in np.flatnonzero(np.isin(head, _SPACE)).tolist():
        file.seek(lines[i, 0])
        kept[i] = bool(file.read(lines[i, 1] - lines[i, 0]).strip())
    return lines[kept]
