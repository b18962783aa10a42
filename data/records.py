"""Records of every source, read and parsed when one is asked for: numbers say where each lies, no object a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np

from data.forms.fields import FieldError
from data.forms.table import FORMS, find_form
from data.record import Record, RecordError, parse_record
from data.settings import ReadSettings, SourceSettings
from data.sources.rows import Rows
from vl2.tokenizer import Tokenizer

_ROWS_TRIED = 100  # for a form; where none has one, each says what is wrong with it


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordReader:
    """Makes records of the rows of one file or table."""

    rows: Rows
    of: SourceSettings
    """The source they belong to."""
    settings: ReadSettings
    tokenizer: Tokenizer

    @cached_property
    def form(self) -> str:
        """Form of the file's rows: what the user said, or what the first row has that has one.

        Raises:
            UserError: the source says a form or columns that there are not.
        """
        for index in range(min(len(self.rows), _ROWS_TRIED)):
            with suppress(FieldError, RecordError):
                return find_form(self.rows[index], self.of)
        return self.of.form

    @property
    def field(self) -> str:
        """What errors call the place of a whole conversation: a field such as messages, or the row."""
        keys = FORMS[self.form].keys if self.form in FORMS else ()
        return keys[0] if len(keys) == 1 and self.form != "deepseek_vl2" else "row"  # whose rows may be bare lists

    def read(self, index: int) -> Record:
        """Read and parse a row.

        Args:
            index: of the row, from 0.

        Raises:
            RecordError: a row that cannot be used.
        """
        return parse_record(
            self.rows[index],
            source=self.rows.name,
            row_number=self.rows.number(index),
            folder=self.rows.folder,
            form=self.form,
            tokenizer=self.tokenizer,
            settings=self.settings,
            of=self.of,
        )

    def error(self, index: int, where: str, problem: str) -> RecordError:
        """Make an error about a field of a row."""
        return RecordError(self.rows.name, self.rows.number(index), where, problem)


class Records(Sequence[Record]):
    """Usable records, in the order of their sources and rows; a slice is another such view."""

    def __init__(self, readers: Sequence[RecordReader], reader_of: np.ndarray, row_of: np.ndarray):
        """Keep where the records lie; nothing is read yet.

        Args:
            readers: of every file or table.
            reader_of: int32 [N], the reader of each record.
            row_of: int64 [N], the index of its row there.
        """
        self.readers, self.reader_of, self.row_of = tuple(readers), reader_of, row_of

    def __len__(self) -> int:
        """Count the records."""
        return len(self.row_of)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Records: ...

    def __getitem__(self, index: int | slice) -> Record | Records:
        """Read and parse one record, or return a view of some.

        Raises:
            RecordError: a row that cannot be used any more: its file changed after it was measured.
        """
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        index = range(len(self))[index]
        return self.readers[self.reader_of[index]].read(int(self.row_of[index]))

    def __iter__(self) -> Iterator[Record]:
        """Read the records one after the other."""
        return map(self.__getitem__, range(len(self)))

    def take(self, indices: np.ndarray) -> Records:
        """Return a view of some records, in the order given.

        Args:
            indices: int [M] of records.
        """
        return Records(self.readers, self.reader_of[indices], self.row_of[indices])
