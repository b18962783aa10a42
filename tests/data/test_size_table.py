"""What was measured is remembered, and measured again when anything it depends on changed."""

import dataclasses
import gc
import json
import os
import signal
import time
import tracemalloc
from pathlib import Path

import pytest

import data.measure
from data.budget import Budget
from data.dataset import Dataset, open_dataset
from data.images.reader import DEFAULT_READER, ImageReader
from data.measure import measure
from data.measurer import Measurer
from data.record import BadRecords, RecordError
from data.settings import ReadSettings, SourceSettings
from data.size_table import SizeTable, sizes_of
from tests.data.measuring import CANDIDATES, TOKENIZER, measure_one, picture, reader_of, row
from vl2.errors import UserError


def test_second_run_measures_nothing(tmp_path, sizes, counted):
    rows = [row(), row("x", picture(tmp_path / "a.png"))]
    first = sizes(rows, cache=tmp_path / "cache")
    assert sizes(rows, cache=tmp_path / "cache") == first
    assert counted == [1, 2]


def test_added_rows_alone_are_measured(tmp_path, sizes, counted):
    rows = [row(f"question {i % 90}", *[picture(tmp_path / "a.png")] * (i % 3)) for i in range(100)]
    before = sizes(rows, cache=tmp_path / "cache")
    del counted[:]
    after = sizes([*rows[50:], *(row(f"new {i}") for i in range(10)), *rows[:50]], cache=tmp_path / "cache")
    assert counted == list(range(51, 61))
    assert after[:50] + after[60:] == before[50:] + before[:50]
    assert after == sizes([*rows[50:], *(row(f"new {i}") for i in range(10)), *rows[:50]])


def test_rows_are_found_again_wherever_their_file_lies(tmp_path, counted):
    """A text means the same in every folder; a picture's name does not."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    picture(tmp_path / "here" / "a.png"), picture(tmp_path / "there" / "a.png", (300, 700))
    found = []
    for folder in ("here", "there", "there"):
        table, _ = measure_one(
            reader_of(tmp_path / folder / "a.jsonl", [row(), row("x", "a.png")]), CANDIDATES, cache=tmp_path / "cache"
        )
        found.append([size.grids for size in sizes_of(table)])
    assert found == [[(), ((2, 1),)], [(), ((1, 2),)], [(), ((1, 2),)]]
    assert counted == [1, 2, 2]


def test_changed_image_is_measured_again(tmp_path, sizes, counted):
    """A cache keyed by the row alone returns the size of the old picture."""
    image = picture(tmp_path / "a.png")
    rows = [row("x", image), row("y")]
    before, _ = sizes(rows, cache=tmp_path / "cache")
    picture(image, (300, 700))
    after, _ = sizes(rows, cache=tmp_path / "cache")
    assert (before.grids, after.grids) == (((2, 1),), ((1, 2),))
    assert counted == [1, 2, 1]


def test_touched_image_is_measured_again(tmp_path, sizes, counted):
    image = picture(tmp_path / "a.png")
    for nanoseconds in (1, 1, 2):
        os.utime(image, ns=(nanoseconds, nanoseconds))
        sizes([row("x", image)], cache=tmp_path / "cache")
    assert counted == [1, 1]


@pytest.mark.parametrize(
    "changed",
    [
        {"candidates": CANDIDATES[:1]},
        {"settings": ReadSettings(verify="decode")},
        {"settings": ReadSettings(special_tokens="neutralise")},
        {"settings": ReadSettings(supervise="last")},
        {"settings": ReadSettings(unknown="error")},
        {"of": {"form": "query"}},
        {"of": {"system": "You see."}},
        {"of": {"columns": {"image": "picture"}}},
    ],
    ids=str,
)
def test_changed_settings_measure_again(tmp_path, changed):
    def name_of(**changed) -> str:
        settings, of = changed.pop("settings", ReadSettings()), changed.pop("of", {})
        reader = reader_of(tmp_path / "a.jsonl", [row()], settings, **of)
        options = {"candidates": CANDIDATES, "images": DEFAULT_READER, **changed}
        return SizeTable(tmp_path, reader, **options)._content

    assert name_of() == name_of(settings=ReadSettings(on_bad_record="skip", max_bad=3), of={"limit": 5, "repeat": 2.0})
    assert name_of(**changed) != name_of()


def test_another_image_reader_measures_again(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Turned(ImageReader):
        turned: bool = True

    reader = reader_of(tmp_path / "a.jsonl", [row()])
    tables = [SizeTable(None, reader, candidates=(), images=Turned(turned=turned)) for turned in (False, True)]
    assert tables[0]._content != tables[1]._content


def test_changed_code_measures_again(tmp_path, monkeypatch):
    """A table of before a correction would keep what was wrong, or unseen, for ever."""
    reader = reader_of(tmp_path / "a.jsonl", [row()])
    before = SizeTable(None, reader, candidates=(), images=DEFAULT_READER)._content
    monkeypatch.setattr("data.size_table._code", lambda: "other")
    assert SizeTable(None, reader, candidates=(), images=DEFAULT_READER)._content != before


def test_damaged_table_is_measured_again(tmp_path, sizes, counted, caplog):
    """One wrong byte among the numbers would be a wrong size, which no header tells of."""
    before = sizes([row(), row("more")], cache=tmp_path / "cache")
    (table,) = (tmp_path / "cache").iterdir()
    content = table.read_bytes()
    for damaged in (content[:100], b"", b"other", content.replace(b"\x0f\0\0\0", b"\x0e\0\0\0")):
        assert damaged != content
        table.write_bytes(damaged)
        del counted[:]
        caplog.clear()
        assert sizes([row(), row("more")], cache=tmp_path / "cache") == before
        assert counted == [1, 2] and "cannot be read" in caplog.text
    assert sizes([row(), row("more")], cache=tmp_path / "cache") == before
    assert counted == [1, 2]


def test_nothing_but_the_table_stays(tmp_path, sizes):
    sizes([row()], cache=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".arrow"]


def test_old_tables_are_forgotten(tmp_path, sizes, monkeypatch):
    monkeypatch.setattr("data.size_table._TABLES_KEPT", 3)
    for i in range(6):
        sizes([row(f"{i}")], cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_unwritable_table_costs_nothing_but_time(tmp_path, sizes, caplog):
    (tmp_path / "file").write_text("")
    (size,) = sizes([row()], cache=tmp_path / "file" / "sizes")
    assert size is not None
    assert "cannot be written" in caplog.text


def test_bad_rows_are_looked_at_anew(tmp_path, sizes, counted):
    """Their image may be back."""
    rows = [row(), row("x", tmp_path / "gone.png"), row()]
    for _ in range(2):
        bad = BadRecords(on_bad_record="skip", max_bad=1)
        found = sizes(rows, bad=bad, cache=tmp_path / "cache")
        assert [size is None for size in found] == [False, True, False]
        assert [error.row for error in bad.skipped] == [2]
    picture(tmp_path / "gone.png")
    assert None not in sizes(rows, cache=tmp_path / "cache")
    assert counted == [1, 2, 3, 2, 2]


def test_what_was_measured_before_a_bad_row_is_kept(tmp_path, sizes, counted):
    rows = [row(), row("x", tmp_path / "late.png")]
    with pytest.raises(RecordError):
        sizes(rows, cache=tmp_path / "cache")
    picture(tmp_path / "late.png")
    sizes(rows, cache=tmp_path / "cache")
    assert counted == [1, 2, 2]


def test_what_was_measured_before_a_process_was_killed_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(data.measure, "_MIN_PARALLEL", 2)
    monkeypatch.setattr(data.measure, "_CHUNK", 1)
    original, parent = Measurer.measure, os.getpid()
    measured, taken = tmp_path / "measured", tmp_path / "taken"
    over_budget = data.measure._over_budget

    def takes(table, indices, measurer):
        if len(table) == 1:  # a chunk that came in, not what was known before
            taken.touch()
        return over_budget(table, indices, measurer)

    def dies(self, indices, **options):
        if int(indices[0]) == 5 and os.getpid() != parent:
            deadline = time.monotonic() + 60
            while not taken.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, indices, **options)

    reader = reader_of(tmp_path / "a.jsonl", [row(f"{i}") for i in range(8)])
    monkeypatch.setattr(Measurer, "measure", dies)
    monkeypatch.setattr(data.measure, "_over_budget", takes)
    with pytest.raises(UserError, match=r"was killed \(out of memory\?\): 2 were at work.* What was measured is kept"):
        measure_one(reader, workers=2, cache=tmp_path / "cache")

    def counts(self, indices, **options):
        with measured.open("a") as file:
            file.write(f"{int(indices[0])}\n")
        return original(self, indices, **options)

    monkeypatch.setattr(Measurer, "measure", counts)
    measure_one(reader, workers=2, cache=tmp_path / "cache")
    again = sorted(map(int, measured.read_text().split()))
    assert 5 in again and 0 not in again


def test_limit_measures_the_first_rows_only(tmp_path, sizes, counted):
    rows = [row(), row("b"), row("c"), "{"]
    for limit in (2, 3, 1):
        found = sizes(rows, of={"limit": limit}, cache=tmp_path / "cache")
        assert [size is not None for size in found] == [i < limit for i in range(4)]
    assert counted == [1, 2, 3]


def test_a_table_that_is_gone_hides_no_other(tmp_path, sizes, counted):
    """Another process may remove a table while the folder is looked through: all that came after it was not found."""
    cache = tmp_path / "cache"
    sizes([row()], cache=cache)
    for i in range(50):
        (cache / f"{i}.arrow").symlink_to(tmp_path / "gone")
    sizes([row()], cache=cache)
    assert counted == [1]


def test_many_files_do_not_look_at_each_others_tables(tmp_path, monkeypatch):
    """Each looked at the age of all tables: the second start of 600 shards took 11 seconds."""
    measurers = [
        Measurer(
            reader=reader_of(tmp_path / f"{i}.jsonl", [row(str(i))]),
            candidates=CANDIDATES,
            images=DEFAULT_READER,
            budget=Budget(),
        )
        for i in range(20)
    ]
    looked = []
    original = Path.stat

    def stat(path, **options):
        looked.extend([path] * (path.suffix == ".arrow"))
        return original(path, **options)

    measure(measurers, cache=tmp_path / "cache")
    monkeypatch.setattr(Path, "stat", stat)
    measure(measurers, cache=tmp_path / "cache")
    assert 20 <= len(looked) <= 3 * 20


def test_a_changed_file_among_many_finds_its_own_rows(tmp_path, counted):
    """Of hundreds of shards the tables used last are those of other shards."""

    def measured(shards: list[list]) -> list[int]:
        del counted[:]
        readers = [reader_of(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(shards)]
        measurers = [
            Measurer(reader=reader, candidates=CANDIDATES, images=DEFAULT_READER, budget=Budget()) for reader in readers
        ]
        measure(measurers, cache=tmp_path / "cache")
        return list(counted)

    shards = [[row(f"{i} {j}") for j in range(3)] for i in range(9)]
    assert len(measured(shards)) == 27
    shards[4].append(row("new"))
    assert measured(shards) == [4]
    assert measured(shards) == []


@pytest.mark.slow
def test_a_million_rows_are_no_million_objects(tmp_path):
    """A record as an object takes more than a kilobyte, and was kept from the first start to the last step."""
    text = json.dumps(row("some words")) + "\n"
    (tmp_path / "a.jsonl").write_text(text * 20_000)

    def open_again() -> Dataset:
        source = SourceSettings(path=str(tmp_path / "a.jsonl"))
        return open_dataset(
            [source], settings=ReadSettings(), tokenizer=TOKENIZER, candidates=CANDIDATES, cache=tmp_path / "cache"
        )

    open_again()
    gc.collect()
    tracemalloc.start()
    try:
        dataset = open_again()
        for i in range(0, 20_000, 500):
            assert dataset.records[i].row == i + 1
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(dataset.records) == len(dataset.sizes) == 20_000
    assert held < 20_000 * 150  # bytes


def test_a_shortened_file_is_looked_through_once(tmp_path, sizes, monkeypatch):
    """Nothing of it had to be measured, so nothing was kept, and every start hashed all its rows again."""
    looked_through = []
    original = Measurer.row_keys
    monkeypatch.setattr(
        Measurer, "row_keys", lambda self, rows: looked_through.append(len(rows)) or original(self, rows)
    )
    rows = [row(f"{i}") for i in range(5)]
    sizes(rows, cache=tmp_path / "cache")
    for _ in range(3):
        sizes(rows[1:], cache=tmp_path / "cache")
    assert looked_through == [4]
