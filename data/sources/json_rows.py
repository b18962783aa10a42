"""Rows that lie as JSON text in a plain file: each read where it lies, by its byte offsets."""

from __future__ import annotations

import functools
import json
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from data.record import RecordError

_SHOWN = 40  # characters of a text that is no JSON


class JsonRows:
    """The rows of a plain file of JSON lines, or of one JSON array; see `data.sources.rows.Rows`."""

    def __init__(self, path: Path, spans: np.ndarray, *, name: str, folder: Path, fingerprint: str):
        """Open a file.

        Args:
            path: the file.
            spans: int64 [N, 3], first byte, byte after the last, and number of each row.
            name, folder, fingerprint: see `Rows`.
        """
        self.name, self.folder, self.fingerprint = name, folder, fingerprint
        self._spans = spans
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)  # rows stay readable where the file is replaced by another
        weakref.finalize(self, os.close, self._descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the file once more in a worker that is no fork of this process, as on macOS."""
        again = functools.partial(JsonRows, name=self.name, folder=self.folder, fingerprint=self.fingerprint)
        return again, (self._path, self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Any:
        return decode_row(self.content(index), source=self.name, number=self.number(index))

    def number(self, index: int) -> int:
        """Number of a row: its line, or its place in the array."""
        return int(self._spans[index, 2])

    def content(self, index: int) -> bytes:
        """Text of a row, without the space around it."""
        start, stop, number = self._spans[index].tolist()
        content = os.pread(self._descriptor, stop - start, start)
        if len(content) < stop - start:
            raise RecordError(
                self.name, number, "row", "found the file cut short since it was opened; leave it alone and start again"
            )
        return content.strip()


def decode_row(content: bytes, *, source: str, number: int) -> Any:
    """Decode the JSON text of one row; of a key given twice the last counts, NaN and Infinity are numbers.

    Args:
        content: UTF-8.
        source, number: file and row, for errors.

    Raises:
        RecordError: no JSON, no UTF-8, or JSON that cannot be held.
    """
    if not content:  # no line is: blank ones are no rows
        raise RecordError(source, number, "row", "found nothing between two commas of the array; remove one of them")
    text = ""
    try:
        text = content.decode("utf-8")
        return json.loads(text)
    except UnicodeDecodeError as error:
        problem = f"expected UTF-8 text, found byte {error.start} is not"
    except json.JSONDecodeError as error:
        problem = _not_json(text, error)
    except RecursionError:
        problem = "expected a JSON object, found one nested too deeply to be read"
    except ValueError as error:  # a number of thousands of digits
        problem = f"expected a JSON object that can be read, found: {error}"
    raise RecordError(source, number, "row", problem)


def _not_json(text: str, error: json.JSONDecodeError) -> str:
    place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} of the row, column {error.colno}"
    problem = f"expected a JSON object, found text that is not JSON ({error.msg}, {place}): {text[:_SHOWN]!r}"
    if text.startswith("[") or text == "{":
        problem += "; a file of JSON lines holds one whole object a line, without brackets or commas around them"
    return problem
