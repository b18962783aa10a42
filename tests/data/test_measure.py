"""Measuring: sizes are exact, remembered, and measured again when anything they depend on changed."""

import dataclasses
import gc
import json
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

import data.measure
import data.measurer
from data.budget import Budget
from data.dataset import Dataset, open_dataset
from data.images.reader import DEFAULT_READER, ImageReader
from data.measure import measure
from data.measurer import Measurer
from data.record import BadRecords, RecordError
from data.records import RecordReader
from data.settings import ReadSettings, SourceSettings
from data.size_table import NOT_MEASURED, SizeTable, column, sizes_of
from data.sizes import Size
from data.sources.open import open_sources
from tests.places import NANO_BPE
from vl2.prompt import IGNORE, render
from vl2.tiles import limit_candidates, num_image_tokens, tile_grid
from vl2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(NANO_BPE)
CANDIDATES = ((384, 384), (384, 768), (768, 384), (768, 768), (384, 1152), (1152, 384))


def row(question: str = "Hi", *images: Path | str) -> dict:
    """A row; the id of the conversation is no part of what it says."""
    said = [("user", "<image>" * len(images) + question), ("assistant", "Hello.")]
    messages = [{"role": role, "content": content} for role, content in said]
    return {"messages": messages, "images": [str(image) for image in images]}


def picture(path: Path, size=(700, 300)) -> Path:
    Image.new("RGB", size, (9, 9, 9)).save(path)
    return path


def reader_of(path: Path, rows: list, settings=ReadSettings(), **source) -> RecordReader:  # noqa: B008
    """Write rows to a file, and open it."""
    lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    of = SourceSettings(path=str(path), **source)
    (opened,) = open_sources(of, cache=None)
    return RecordReader(rows=opened, of=of, settings=settings, tokenizer=TOKENIZER)


def measure_one(reader: RecordReader, candidates=CANDIDATES, *, limit=None, budget=Budget(), **options):  # noqa: B008
    """(table, indices of usable rows) of one file."""
    measurer = Measurer(reader=reader, candidates=tuple(candidates), images=DEFAULT_READER, budget=budget)
    (found,) = measure([measurer], [len(reader.rows) if limit is None else limit], **options)
    return found


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


def test_size_is_that_of_the_rendered_conversation(tmp_path, sizes):
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.jpg", (300, 300))
    rows = [row("你好"), row("compare", a, b)]
    text, pair = sizes(rows)
    records = [reader_of(tmp_path / "a.jsonl", rows).read(i) for i in range(2)]
    answer = len(TOKENIZER.encode("Hello.")) + 1
    assert text == Size(tokens=len(render(records[0].messages, [], TOKENIZER).input_ids), supervised=answer, grids=())
    ids = render(records[1].messages, [(2, 1), (1, 1)], TOKENIZER).input_ids
    assert pair == Size(tokens=len(ids), supervised=answer, grids=((2, 1), (1, 1)))
    assert pair.tiles == 3 + 2
    assert (ids == TOKENIZER.image_id).sum() == num_image_tokens((2, 1)) + num_image_tokens((1, 1))


def random_row(draw: random.Random, pictures: list[Path]) -> dict:
    """A conversation of anything that may be said: many tongues, spaces, special tokens as text, images anywhere."""
    words = ["word", " ", "\n", "你好", "Ünï", "🙂", "  ", "x" * 50, "12345", "<|User|>", "<|grounding|>", "[[1, 2]]"]
    words.append("<|ref|>a dog<|/ref|><|det|>[[1, 20, 300, 999]]<|/det|>")

    def text(*more: str) -> str:
        return "".join(draw.choices([*words, *more], k=draw.randrange(1, 30)))

    messages = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
    for _ in range(draw.randrange(1, 4)):
        messages.append({"role": "user", "content": text("<image>")})
        messages.append({"role": "assistant", "content": f"a{text()}", "loss": draw.random() < 0.7})
    messages[-1]["loss"] = True
    num_images = sum(message["content"].count("<image>") for message in messages)
    return {"messages": messages, "images": [str(draw.choice(pictures)) for _ in range(num_images)]}


def test_measured_is_rendered_for_any_conversation(tmp_path, monkeypatch):
    """Batches in processes count what rendering one after the other makes, and what is kept is the same once more."""
    monkeypatch.setattr(data.measure, "_MIN_PARALLEL", 4)
    monkeypatch.setattr(data.measure, "_CHUNK", 37)
    monkeypatch.setattr(data.measurer, "_BATCH_CHARACTERS", 500)
    draw = random.Random(5)
    pictures = [picture(tmp_path / f"{i}.png", size) for i, size in enumerate([(700, 300), (300, 300), (300, 700)])]
    settings = ReadSettings(special_tokens="neutralise")
    reader = reader_of(tmp_path / "a.jsonl", [random_row(draw, pictures) for _ in range(200)], settings)
    expected = []
    for i in range(200):
        record = reader.read(i)
        shown = [DEFAULT_READER.size(image) for image in record.images]
        grids = tuple(tile_grid(size, len(shown), CANDIDATES) for size in shown)
        rendered = render(record.messages, grids, TOKENIZER)
        supervised = int((rendered.labels != IGNORE).sum())
        expected.append(Size(tokens=len(rendered.input_ids), supervised=supervised, grids=grids))
    assert any(message.plain for i in range(200) for message in reader.read(i).messages)
    assert {len(size.grids) for size in expected} >= {0, 1, 2, 3}
    for workers in (1, 2, 2):
        cache = tmp_path / f"cache{workers}"
        table, kept = measure_one(reader, CANDIDATES, workers=workers, cache=cache)
        assert list(sizes_of(table)) == expected
        assert kept.tolist() == list(range(200))


def test_max_tiles_changes_the_size(tmp_path, sizes):
    (size,) = sizes([row("x", picture(tmp_path / "a.png"))], candidates=limit_candidates(CANDIDATES, 1))
    assert size.grids == ((1, 1),)


def test_third_image_shows_all_uncropped(tmp_path, sizes):
    a = picture(tmp_path / "a.png")
    (size,) = sizes([row("x", a, a, a)])
    assert size.grids == ((1, 1),) * 3


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


def test_processes_leave_paddle_and_the_library_in_peace(tmp_path, monkeypatch, capfd):
    """Threads or forks, never both: a fork after the library's threads were used makes it complain."""
    monkeypatch.setattr(data.measure, "_CHUNK", 8)
    reader = reader_of(tmp_path / "a.jsonl", [row(f"question {i} " * (i % 7)) for i in range(50)])
    alone, _ = measure_one(reader, CANDIDATES)
    (paddle.ones([256, 256]) @ paddle.ones([256, 256])).sum().item()  # Paddle's threads exist when the processes fork
    monkeypatch.setattr(data.measure, "_MIN_PARALLEL", 4)
    forked, _ = measure_one(reader, CANDIDATES, workers=3)
    assert list(sizes_of(forked)) == list(sizes_of(alone))
    assert "TOKENIZERS_PARALLELISM" not in capfd.readouterr().err
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_progress_bar_goes_to_stderr(sizes, monkeypatch, capfd):
    monkeypatch.setattr(data.measure, "_MIN_SHOWN", 2)
    sizes([row(), row()])
    out, err = capfd.readouterr()
    assert "measuring" in err and "2/2" in err
    assert out == ""


@pytest.mark.parametrize("workers", [1, 2])
def test_first_bad_row_of_the_file_is_said(tmp_path, sizes, monkeypatch, workers):
    """Whatever is wrong with the rows after it, and however quickly another process finds that."""
    monkeypatch.setattr(data.measure, "_MIN_PARALLEL", 2)
    monkeypatch.setattr(data.measure, "_CHUNK", 1)
    a = picture(tmp_path / "a.png")
    rows = [row(), row("x", a, tmp_path / "b.png"), "oops", row("long " * 50)]
    for first, max_tokens, expected in (
        (0, 2000, r"a\.jsonl, row 2, images\[1\]: expected an image file, found none at .*b\.png"),
        (2, 2000, r"a\.jsonl, row 1, row: expected a JSON object"),
        (3, 60, r"a\.jsonl, row 1, messages: conversation of \d+ tokens"),
    ):
        with pytest.raises(RecordError, match=expected):
            sizes(rows[first:] + rows[:first], workers=workers, budget=Budget(max_tokens=max_tokens))


def test_rows_over_the_budget_are_in_their_place_among_the_others(tmp_path, sizes):
    """Also when they were measured under another budget before."""
    rows = [row("long " * 20), row("x", tmp_path / "late.png"), row("long " * 20), row(), "{"]
    for _ in range(2):
        bad = BadRecords(on_bad_record="skip", max_bad=4)
        sizes(rows, cache=tmp_path / "cache", budget=Budget(max_tokens=30), bad=bad)
        assert [error.row for error in bad.skipped] == [1, 2, 3, 5]
    bad = BadRecords(on_bad_record="skip", max_bad=4)
    assert len([size for size in sizes(rows, cache=tmp_path / "cache", bad=bad) if size]) == 3


def test_truncated_image(tmp_path, sizes):
    image = picture(tmp_path / "a.jpg")
    image.write_bytes(image.read_bytes()[:-50])
    with pytest.raises(RecordError, match=r"a\.jsonl, row 1, images\[0\]: truncated image, its end is missing"):
        sizes([row("x", image)])


def test_a_broken_picture_is_named_as_its_row_names_it(sizes):
    """A LLaVA row has no images[0], nor has a part of a message."""
    part = {"type": "image_url", "image_url": {"url": "gone.png"}}
    answer = {"role": "assistant", "content": "b"}
    llava = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]
    for bad, where in [
        ({"image": "gone.png", "conversations": llava}, "image"),
        ({"messages": [{"role": "user", "content": ["a", part]}, answer]}, r"messages\[0\]\.content\[1\]\.image_url"),
    ]:
        with pytest.raises(RecordError, match=rf"row 1, {where}: expected an image file, found none at "):
            sizes([bad])


def test_verify_decode_finds_damage_that_headers_hide(tmp_path, sizes):
    image = picture(tmp_path / "a.jpg")
    content = image.read_bytes()
    tables = content.index(b"\xff\xdb"), content.index(b"\xff\xda")  # without them no pixel can be computed
    image.write_bytes(content[: tables[0]] + content[content.index(b"\xff\xc0") : tables[1]] + content[tables[1] :])
    assert sizes([row("x", image)], cache=tmp_path / "cache")[0].tiles == 3
    with pytest.raises(RecordError, match=r"a\.jsonl, row 1, images\[0\]: cannot read the image"):
        sizes([row("x", image)], cache=tmp_path / "cache", settings=ReadSettings(verify="decode"))


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


def test_limit_measures_the_first_rows_only(tmp_path, sizes, counted):
    rows = [row(), row("b"), row("c"), "{"]
    assert [size is None for size in sizes(rows, limit=2, cache=tmp_path / "cache")] == [False, False, True, True]
    assert [size is None for size in sizes(rows, limit=3, cache=tmp_path / "cache")] == [False, False, False, True]
    assert counted == [1, 2, 3]
    assert [size is None for size in sizes(rows, limit=1, cache=tmp_path / "cache")] == [False, True, True, True]


def test_content_keys_are_of_what_is_said_and_shown(tmp_path):
    """The same conversation under another id, in another file and folder has the same key; another has not."""
    keys = {}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        picture(tmp_path / folder / "a.png")
        rows = [
            {**row("x", tmp_path / folder / "a.png"), "id": folder},
            row(f"only in {folder}", "a.png"),
            row(" x\n"),
            row("x"),
        ]
        table, _ = measure_one(reader_of(tmp_path / folder / "a.jsonl", rows), CANDIDATES)
        assert NOT_MEASURED not in column(table, "tokens")
        keys[folder] = column(table, "content").tolist()
    assert [a == b for a, b in zip(keys["one"], keys["two"])] == [True, False, True, True]
    assert np.unique(keys["one"]).size == 3  # spaces around a text are not said


def test_files_are_measured_together(tmp_path, monkeypatch, counted):
    """A thousand small files, each with its own processes or none, would take one core for ever."""
    monkeypatch.setattr(data.measure, "_MIN_PARALLEL", 30)
    started = []
    original = data.measure.map_forked
    monkeypatch.setattr(data.measure, "map_forked", lambda *given: started.append(given) or original(*given))
    readers = [reader_of(tmp_path / f"{i}.jsonl", [row(f"{i} {j}") for j in range(10)]) for i in range(4)]
    readers[2] = reader_of(tmp_path / "2.jsonl", [row("fine"), "oops", row("long " * 50), row("fine")])
    measurers = [
        Measurer(reader=reader, candidates=CANDIDATES, images=DEFAULT_READER, budget=Budget(max_tokens=60))
        for reader in readers
    ]
    bad = BadRecords(on_bad_record="skip", max_bad=2)
    found = measure(measurers, [10, 7, 4, 10], workers=2, bad=bad, cache=tmp_path / "cache")
    assert len(started) == 1
    assert [kept.tolist() for _, kept in found] == [[*range(10)], [*range(7)], [0, 3], [*range(10)]]
    assert [(Path(error.source).name, error.row) for error in bad.skipped] == [("2.jsonl", 2), ("2.jsonl", 3)]
    bad = BadRecords(on_bad_record="skip", max_bad=2)
    again = measure(measurers, [10, 10, 4, 10], workers=2, bad=bad, cache=tmp_path / "cache")
    assert counted == [8, 9, 10, 2]
    for (before, _), (after, _) in zip(found[:1] + found[2:], again[:1] + again[2:]):
        assert list(sizes_of(before)) == list(sizes_of(after))


def test_few_pictures_to_decode_are_shared_out(tmp_path, monkeypatch, single_threaded_tokenizers):
    """A chunk of 512 rows was more than most sets of pictures have, and left all cores but one idle."""
    monkeypatch.setattr(data.measure, "_MIN_PARALLEL_DECODE", 8)
    shared = []
    monkeypatch.setattr(data.measure, "map_forked", lambda work, jobs, workers: shared.append(jobs) or map(work, jobs))
    image = picture(tmp_path / "a.png")
    measure_one(reader_of(tmp_path / "a.jsonl", [row("x", image)] * 20, ReadSettings(verify="decode")), workers=2)
    assert [len(rows) for _, rows in shared[0]] == [3] * 6 + [2]


def test_a_changed_file_among_many_finds_its_own_rows(tmp_path, counted):
    """Of hundreds of shards the tables used last are those of other shards."""

    def measured(shards: list[list]) -> list[int]:
        del counted[:]
        readers = [reader_of(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(shards)]
        measurers = [
            Measurer(reader=reader, candidates=CANDIDATES, images=DEFAULT_READER, budget=Budget()) for reader in readers
        ]
        measure(measurers, [len(reader.rows) for reader in readers], cache=tmp_path / "cache")
        return list(counted)

    shards = [[row(f"{i} {j}") for j in range(3)] for i in range(9)]
    assert len(measured(shards)) == 27
    shards[4].append(row("new"))
    assert measured(shards) == [4]
    assert measured(shards) == []


def test_changed_code_measures_again(tmp_path, monkeypatch):
    """A table of before a correction would keep what was wrong, or unseen, for ever."""
    reader = reader_of(tmp_path / "a.jsonl", [row()])
    before = SizeTable(None, reader, candidates=(), images=DEFAULT_READER)._content
    monkeypatch.setattr("data.size_table._code", lambda: "other")
    assert SizeTable(None, reader, candidates=(), images=DEFAULT_READER)._content != before


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
