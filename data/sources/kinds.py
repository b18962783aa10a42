"""What kind of file lies at a path, by its first bytes; its name decides only between CSV and JSON lines."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Literal

Table = Literal["parquet", "arrow file", "arrow stream", "csv"]
Text = Literal["array", "lines", "empty"]
Kind = Table | Text | Literal["gzip", "zstd"]

HEAD = 1 << 12
"""First bytes that are looked at."""

_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow file"),
    (b"\xff\xff\xff\xff", "arrow stream"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
_MESSAGES = re.compile(rb'\[\s*\{\s*"role"\s*:')


def kind_of_file(path: Path, *, name: str) -> Kind:
    """Look at a regular file, which may have another name than it came with."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    text = kind_of_text(head)
    if Path(name).suffix.lower() in (".csv", ".tsv") and not head.lstrip().startswith(b'{"') and text != "empty":
        return "csv"
    return text


def kind_of_text(head: bytes) -> Text:
    """Tell one JSON array from JSON lines, by the beginning of a text; nothing but space is empty.

    What begins with a list of messages has such a list in each line: no row of any form is a single message.
    """
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text:
        return "empty"
    return "array" if text.startswith(b"[") and not _MESSAGES.match(text) else "lines"
