"""Writes rows that cannot be read by index, those of compressed JSON, into an Arrow file where they can.

The file has two flat columns: the row's number and its text as it was written, so that a row that is no JSON is found
and named when it is read, as in a plain file. It is named after the content it was made from.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data.sources.array import ArrayError, ArrayScanner
from data.sources.compressed import CompressionError
from vl2.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH_BYTES, _BATCH_ROWS = 1 << 24, 10_000


def write_spool(blocks: Iterable[bytes], folder: Path, *, is_array: bool, name: str) -> Dataset:
    """Write the rows of a JSON text into an Arrow file.

    Args:
        blocks: the text, in pieces.
        folder: where to write it.
        is_array: the text is one array; otherwise JSON lines.
        name: the source, for errors.

    Raises:
        UserError: the text breaks off, or the disk is full.
    """
    from datasets import Dataset, Features, Value  # here: the import takes seconds
    from datasets.arrow_writer import ArrowWriter

    features = Features({"number": Value("int64"), "text": Value("large_binary")})
    path = str(folder / "rows.arrow")
    number = 0
    try:
        with ArrowWriter(features=features, path=path) as writer:
            numbers: list[int] = []
            texts: list[bytes] = []
            size = 0
            for number, text in _rows(blocks, is_array):
                numbers.append(number)
                texts.append(text)
                size += len(text)
                if size >= _BATCH_BYTES or len(texts) >= _BATCH_ROWS:
                    writer.write_batch({"number": numbers, "text": texts})
                    numbers, texts, size = [], [], 0
            if texts:
                writer.write_batch({"number": numbers, "text": texts})
            writer.finalize()
    except ArrayError as error:
        raise UserError(f"{name}: {error.problem}, after row {error.elements}; write the file again") from None
    except CompressionError as error:
        raise UserError(f"{name}: {error}, after row {number}; fetch or compress it again") from None
    return Dataset.from_file(path)


def _rows(blocks: Iterable[bytes], is_array: bool) -> Iterator[tuple[int, bytes]]:
    """(number, text) of each row; blank lines are counted but are no rows."""
    for number, text in _elements(blocks) if is_array else _lines(blocks):
        yield number, text.strip()


def _lines(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    begun: list[bytes] = []  # of the line that the last block broke off in
    number = 1
    for block in blocks:
        *whole, rest = block.split(b"\n")
        for line in whole:
            text = b"".join([*begun, line])
            text = text.removeprefix(codecs.BOM_UTF8) if number == 1 else text
            if text.strip():
                yield number, text
            begun, number = [], number + 1
        begun.append(rest)
    text = b"".join(begun)
    if text.strip():
        yield number, text.removeprefix(codecs.BOM_UTF8) if number == 1 else text


def _elements(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    scanner = ArrayScanner()
    begun: list[bytes] = []  # of the element that the last block broke off in
    number = 0  # before the opening bracket
    first_is_empty = False  # as in []: a row only if a comma follows
    for block in blocks:
        start = 0
        for cut in scanner.feed(block).tolist():
            text = b"".join([*begun, block[start:cut]])
            begun, start = [], cut + 1
            if first_is_empty:
                yield 1, b""
            first_is_empty = number == 1 and not text.strip()
            if number and not first_is_empty:
                yield number, text
            number += 1
        begun.append(block[start:])
    scanner.finish()
