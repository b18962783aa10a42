"""What a data set is opened with: its sources, and how their rows are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SpecialTokens = Literal["error", "neutralise"]
OnBadRecord = Literal["error", "skip"]
Verify = Literal["header", "decode"]
Supervise = Literal["all", "last"]
Unknown = Literal["report", "error"]


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """One source of a mixture."""

    path: str
    """A file, a folder, a glob, or a name on the hub with `:config@split`."""
    name: str = ""
    """What metrics and reports call it; empty: its path."""
    form: str = "auto"
    """Form of its rows, or auto: found by their fields."""
    image_root: str = ""
    """Folder where relative image paths start and that none may leave; empty: beside the file, anywhere."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns that hold a question, its answer and so on: user, assistant, system, image -> name in the file."""
    system: str = ""
    """System message of conversations that have none."""
    repeat: float = 1.0
    """How often an epoch takes each row: 2.5 is two and a half times."""
    limit: int | None = None
    """Only the first rows."""


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """How rows of every source become records, and what is done with those that cannot be used."""

    special_tokens: SpecialTokens = "error"
    """A special token typed into a text is an error, or encoded as ordinary text."""
    supervise: Supervise = "all"
    """Every answer is learned, or the last of each conversation."""
    unknown: Unknown = "report"
    """Unknown columns are counted and reported, or an error."""
    on_bad_record: OnBadRecord = "error"
    """A row that cannot be used stops, or is left out."""
    max_bad: int = 0
    """Rows that may be left out."""
    verify: Verify = "header"
    """What is read of each picture before training."""
