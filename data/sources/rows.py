"""Rows of one file or data set: read when they are asked for, by index, never all of them at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Rows(Protocol):
    """The rows of one source file or table, in order.

    Forked processes share one: reading moves no common file position.
    """

    name: str
    """As errors and reports call it: the file's path as typed, or the data set's name."""
    folder: Path
    """Where relative image paths start."""
    fingerprint: str
    """Hex digest of the content: equal content, equal fingerprint; neither path nor time takes part."""

    def __len__(self) -> int:
        """Count the rows; blank lines are none."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Read and decode a row.

        Raises:
            RecordError: naming file and row, when it cannot be read or decoded.
        """
        ...

    def number(self, index: int) -> int:
        """Number of a row as an editor or a viewer shows it, from 1; of JSON lines the line."""
        ...

    def content(self, index: int) -> bytes:
        """Bytes that change when the row changes, for hashing; of a row that cannot be decoded too."""
        ...
