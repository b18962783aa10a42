"""Measuring rows, and counting which were measured."""

import pytest

from data.measurer import Measurer
from data.settings import ReadSettings
from data.size_table import sizes_of
from tests.data.measuring import CANDIDATES, measure_one, reader_of


@pytest.fixture
def sizes(tmp_path):
    """Measure rows written to a file; None for a row that cannot be used."""

    def sizes(rows: list, *, candidates=CANDIDATES, settings=ReadSettings(), of=None, **options):  # noqa: B008
        reader = reader_of(tmp_path / "a.jsonl", rows, settings, **(of or {}))
        table, kept = measure_one(reader, candidates, **options)
        found = sizes_of(table)
        return [found[i] if i in kept else None for i in range(len(rows))]

    return sizes


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Numbers of the rows that were measured instead of found in the table."""
    rows: list[int] = []
    original = Measurer.measure

    def count(self, indices, **options):
        rows.extend(self.reader.rows.number(int(i)) for i in indices)
        return original(self, indices, **options)

    monkeypatch.setattr(Measurer, "measure", count)
    return rows
