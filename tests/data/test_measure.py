"""Measuring: sizes are exact, remembered, and measured again when anything they depend on changed."""

import os
from pathlib import Path

import paddle
import pytest
from PIL import Image

import data.measure
from data.images.ref import ImageRef
from data.measure import measure
from data.record import BadRecords, Record, RecordError
from data.size_table import Size, SizeTable, record_key
from tests.places import NANO_BPE
from vl2.prompt import Message, render
from vl2.tiles import limit_candidates, num_image_tokens
from vl2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(NANO_BPE)
CANDIDATES = ((384, 384), (384, 768), (768, 384), (768, 768), (384, 1152), (1152, 384))


def record(row: int, question: str = "Hi", *images: Path) -> Record:
    messages = (Message("user", "<image>" * len(images) + question), Message("assistant", "Hello."))
    pictures = tuple(ImageRef(kind="file", name=str(image)) for image in images)
    return Record(messages=messages, images=pictures, source="a.jsonl", row=row)


def picture(path: Path, size=(700, 300)) -> Path:
    Image.new("RGB", size, (9, 9, 9)).save(path)
    return path


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Rows that were measured instead of found in the table."""
    rows: list[int] = []
    original = data.measure._Job.one

    def one(self, index):
        rows.append(self.records[index].row)
        return original(self, index)

    monkeypatch.setattr(data.measure._Job, "one", one)
    return rows


def test_size_is_that_of_the_rendered_conversation(tmp_path):
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.jpg", (300, 300))
    records = [record(1, "你好"), record(2, "compare", a, b)]
    text, pair = measure(records, TOKENIZER, CANDIDATES)
    answer = len(TOKENIZER.encode("Hello.")) + 1
    assert text == Size(tokens=len(render(records[0].messages, [], TOKENIZER).input_ids), supervised=answer, grids=())
    ids = render(records[1].messages, [(2, 1), (1, 1)], TOKENIZER).input_ids
    assert pair == Size(tokens=len(ids), supervised=answer, grids=((2, 1), (1, 1)))
    assert pair.tiles == 3 + 2
    assert (ids == TOKENIZER.image_id).sum() == num_image_tokens((2, 1)) + num_image_tokens((1, 1))


def test_max_tiles_changes_the_size(tmp_path):
    one = [record(1, "x", picture(tmp_path / "a.png"))]
    (size,) = measure(one, TOKENIZER, limit_candidates(CANDIDATES, 1))
    assert size.grids == ((1, 1),)


def test_third_image_shows_all_uncropped(tmp_path):
    a = picture(tmp_path / "a.png")
    (size,) = measure([record(1, "x", a, a, a)], TOKENIZER, CANDIDATES)
    assert size.grids == ((1, 1),) * 3


def test_second_run_measures_nothing(tmp_path, counted):
    records = [record(1), record(2, "x", picture(tmp_path / "a.png"))]
    table = tmp_path / "cache" / "sizes.npz"
    first = measure(records, TOKENIZER, CANDIDATES, cache=table)
    assert measure(records, TOKENIZER, CANDIDATES, cache=table) == first
    assert counted == [1, 2]


def test_added_row_measures_only_the_new_one(tmp_path, counted):
    table = tmp_path / "sizes.npz"
    measure([record(1, "a"), record(2, "b")], TOKENIZER, CANDIDATES, cache=table)
    measure([record(1, "new"), record(2, "a"), record(3, "b")], TOKENIZER, CANDIDATES, cache=table)
    assert counted == [1, 2, 1]


def test_changed_image_is_measured_again(tmp_path, counted):
    """A cache keyed by the row alone returns the size of the old picture."""
    image = picture(tmp_path / "a.png")
    records = [record(1, "x", image), record(2, "y")]
    table = tmp_path / "sizes.npz"
    before, _ = measure(records, TOKENIZER, CANDIDATES, cache=table)
    picture(image, (300, 700))
    after, _ = measure(records, TOKENIZER, CANDIDATES, cache=table)
    assert (before.grids, after.grids) == (((2, 1),), ((1, 2),))
    assert counted == [1, 2, 1]


def test_touched_image_is_measured_again(tmp_path, counted):
    image = picture(tmp_path / "a.png")
    table = tmp_path / "sizes.npz"
    for nanoseconds in (1, 1, 2):
        os.utime(image, ns=(nanoseconds, nanoseconds))
        measure([record(1, "x", image)], TOKENIZER, CANDIDATES, cache=table)
    assert counted == [1, 1]


def test_key_holds_all_that_a_size_depends_on(tmp_path):
    image = picture(tmp_path / "a.png")
    base = {"tokenizer": TOKENIZER, "candidates": CANDIDATES, "verify": "header"}
    key = record_key(record(1, "x", image), **base)
    assert key == record_key(record(9, "x", image), **base)  # where a row stands does not matter
    plain = Record(messages=(Message("user", "x", plain=True),), images=(), source="", row=1)
    keys = {
        key,
        record_key(record(1, "y", image), **base),
        record_key(record(1, "x", image), **{**base, "candidates": CANDIDATES[:1]}),
        record_key(record(1, "x", image), **{**base, "verify": "decode"}),
        record_key(plain, **base),
        record_key(Record(messages=(Message("user", "x"),), images=(), source="", row=1), **base),
    }
    assert len(keys) == 6


def test_table_keeps_every_field(tmp_path):
    path = tmp_path / "sizes.npz"
    table = SizeTable(path)
    sizes = [
        Size(tokens=5, supervised=2, grids=()),
        Size(tokens=700, supervised=1, grids=((2, 1), (1, 9))),
        Size(tokens=421, supervised=0, grids=((1, 1),)),
    ]
    for i, size in enumerate(sizes):
        table.put(bytes([i]) * 16, size)
    table.save()
    again = SizeTable(path)
    assert len(again) == 3
    assert [again.get(bytes([i]) * 16) for i in range(3)] == sizes
    assert again.get(bytes(16 * [7])) is None
    assert sorted(tmp_path.iterdir()) == [path]  # no temporary file stays


def test_broken_table_is_measured_again(tmp_path, counted, caplog):
    table = tmp_path / "sizes.npz"
    table.write_bytes(b"PK\x03\x04 half a file")
    measure([record(1)], TOKENIZER, CANDIDATES, cache=table)
    assert "cannot be read" in caplog.text
    measure([record(1)], TOKENIZER, CANDIDATES, cache=table)
    assert counted == [1]


def test_unwritable_table_costs_nothing_but_time(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    (size,) = measure([record(1)], TOKENIZER, CANDIDATES, cache=tmp_path / "file" / "sizes.npz")
    assert size is not None
    assert "cannot be written" in caplog.text


def test_processes_give_the_same_sizes(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(data.measure, "_MIN_PARALLEL", 4)
    monkeypatch.setattr(data.measure, "_CHUNK", 8)
    image = picture(tmp_path / "a.png")
    records = [record(i, f"question {i} " * (i % 7), *[image] * (i % 4)) for i in range(50)]
    alone = measure(records, TOKENIZER, CANDIDATES, workers=1)
    (paddle.ones([256, 256]) @ paddle.ones([256, 256])).sum().item()  # Paddle's threads exist when the processes fork
    assert measure(records, TOKENIZER, CANDIDATES, workers=3) == alone
    assert "TOKENIZERS_PARALLELISM" not in capfd.readouterr().err  # said where threads of the tokenizer ran before


def test_progress_bar_goes_to_stderr(monkeypatch, capfd):
    monkeypatch.setattr(data.measure, "_MIN_SHOWN", 2)
    measure([record(1), record(2)], TOKENIZER, CANDIDATES)
    out, err = capfd.readouterr()
    assert "measuring" in err and "2/2" in err
    assert out == ""


@pytest.mark.parametrize("workers", [1, 2])
def test_missing_image(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(data.measure, "_MIN_PARALLEL", 2)
    monkeypatch.setattr(data.measure, "_CHUNK", 1)
    records = [record(1), record(2, "x", picture(tmp_path / "a.png"), tmp_path / "b.png"), record(3)]
    with pytest.raises(
        RecordError, match=r"^a\.jsonl, row 2, images\[1\]: expected an image file, found none at .*b\.png"
    ):
        measure(records, TOKENIZER, CANDIDATES, workers=workers)


def test_truncated_image(tmp_path):
    image = picture(tmp_path / "a.jpg")
    image.write_bytes(image.read_bytes()[:-50])
    with pytest.raises(RecordError, match=r"^a\.jsonl, row 4, images\[0\]: truncated image, its end is missing"):
        measure([record(4, "x", image)], TOKENIZER, CANDIDATES)


def test_verify_decode_finds_damage_that_headers_hide(tmp_path):
    image = picture(tmp_path / "a.jpg")
    content = image.read_bytes()
    tables = content.index(b"\xff\xdb"), content.index(b"\xff\xda")  # without them no pixel can be computed
    image.write_bytes(content[: tables[0]] + content[content.index(b"\xff\xc0") : tables[1]] + content[tables[1] :])
    table = tmp_path / "sizes.npz"
    assert measure([record(4, "x", image)], TOKENIZER, CANDIDATES, cache=table)[0].tiles == 3
    with pytest.raises(RecordError, match=r"^a\.jsonl, row 4, images\[0\]: cannot read the image"):
        measure([record(4, "x", image)], TOKENIZER, CANDIDATES, cache=table, verify="decode")


def test_skipped_records_have_no_size(tmp_path, counted):
    records = [record(1), record(2, "x", tmp_path / "gone.png"), record(3)]
    table = tmp_path / "sizes.npz"
    for _ in range(2):
        bad = BadRecords(on_bad_record="skip", max_bad=1)
        sizes = measure(records, TOKENIZER, CANDIDATES, bad=bad, cache=table)
        assert [size is None for size in sizes] == [False, True, False]
        assert [error.row for error in bad.skipped] == [2]
    assert counted == [1, 2, 3, 2]  # a bad record is looked at anew: its image may be back


def test_what_was_measured_before_a_bad_record_is_kept(tmp_path, counted):
    table = tmp_path / "sizes.npz"
    records = [record(1), record(2, "x", tmp_path / "late.png")]
    with pytest.raises(RecordError):
        measure(records, TOKENIZER, CANDIDATES, cache=table)
    picture(tmp_path / "late.png")
    measure(records, TOKENIZER, CANDIDATES, cache=table)
    assert counted == [1, 2, 2]
