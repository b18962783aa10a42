"""Opening a data file: budget, bad rows, fingerprint."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from data.cache import default_cache
from data.dataset import Dataset, open_dataset
from data.record import RecordError
from data.settings import ReadSettings, SourceSettings
from tests.places import NANO_BPE
from vl2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(NANO_BPE)
CANDIDATES = ((384, 384), (768, 384))


def row(question: str, answer: str = "ok", images: list[str] | None = None) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": images or []}


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (700, 300)).save(tmp_path / "a.png")

    def write(*rows) -> Path:
        path = tmp_path / "train.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
        return path

    return write


def open_(path, *, on_bad_record="error", max_bad=0, **options) -> Dataset:
    return open_dataset(
        [SourceSettings(path=str(path))],
        tokenizer=TOKENIZER,
        candidates=CANDIDATES,
        settings=ReadSettings(on_bad_record=on_bad_record, max_bad=max_bad),
        **options,
    )


def test_records_and_sizes_belong_together(write):
    dataset = open_(write(row("one"), row("<image>", images=["a.png"])), max_tokens=4096, max_tiles_per_pack=32)
    assert [record.row for record in dataset.records] == [1, 2]
    assert [size.grids for size in dataset.sizes] == [(), ((2, 1),)]
    assert dataset.skipped == ()


@pytest.mark.parametrize("content", [(), ("", "  ")])
def test_empty_dataset(write, content):
    with pytest.raises(ValueError, match=r"train\.jsonl: empty dataset: expected at least one conversation"):
        open_(write(*content))


def test_conversation_longer_than_the_budget(write):
    tokens = open_(write(row("<image> long", images=["a.png"]))).sizes[0].tokens
    with pytest.raises(
        RecordError,
        match=rf"train\.jsonl, row 2, messages: conversation of {tokens} tokens \(617 of them for 1 <image>\), "
        rf"expected at most data\.max_tokens={tokens - 1}",
    ):
        open_(write(row("short"), row("<image> long", images=["a.png"])), max_tokens=tokens - 1)
    assert len(open_(write(row("<image> long", images=["a.png"])), max_tokens=tokens).records) == 1


def test_row_that_is_far_too_long_is_refused_before_it_is_encoded(write, monkeypatch):
    """A row of 50 MB took 15.9 GB and 98 s, only to be refused."""

    def encode(self, text, *, plain=False):
        assert len(text) < 1000
        return [0] * 9

    monkeypatch.setattr(Tokenizer, "encode", encode)
    path = write(row("word " * 100_000, "more " * 100_000), row("short"))
    with pytest.raises(
        RecordError,
        match=r"train\.jsonl, row 1, messages: conversation of 999998 characters, at least \d+ tokens, "
        r"expected at most 4096 tokens; shorten it",
    ):
        open_(path, max_tokens=4096)
    with pytest.raises(RecordError, match=r"row 1, messages: .* expected at most 4096 tokens"):
        open_(path, context=4096)
    dataset = open_(path, max_tokens=4096, on_bad_record="skip", max_bad=1)
    assert ([record.row for record in dataset.records], [error.row for error in dataset.skipped]) == ([2], [1])


def test_conversation_longer_than_the_context(write):
    """What is asked must fit into the positions the model knows; what is learned may go beyond them."""
    path = write(row("short"), row("<image> long", images=["a.png"]))
    with pytest.raises(
        RecordError, match=r"row 2, .* \(617 of them for 1 <image>\), expected at most the 600 that the"
    ):
        open_(path, context=600)
    assert len(open_(path, max_tokens=4096).records) == 2


def test_more_tiles_than_the_budget(write):
    with pytest.raises(RecordError, match=r"row 1, images: conversation of 3 tiles, expected .*max_tiles_per_pack=2"):
        open_(write(row("<image>", images=["a.png"])), max_tiles_per_pack=2)


def test_bad_rows_of_every_stage_are_skipped_and_listed(write):
    path = write(
        row("<image>", images=["gone.png"]), row("fine"), row("very long " * 50), "{", row("a", "<image>"), row("too")
    )
    dataset = open_(path, max_tokens=60, on_bad_record="skip", max_bad=4)
    assert [record.row for record in dataset.records] == [2, 6]
    assert len(dataset.sizes) == 2
    assert [(error.row, error.where) for error in dataset.skipped] == [
        (1, "images[0]"),
        (3, "messages"),
        (4, "row"),
        (5, "messages[1].content"),
    ]
    with pytest.raises(ValueError, match=r"more than data\.max_bad=3 bad rows"):
        open_(path, max_tokens=60, on_bad_record="skip", max_bad=3)


def test_images_that_are_no_files_are_skipped_like_others(write, tmp_path):
    """A pipe hung for ever, the others were tracebacks, whatever on_bad_record said."""
    os.mkfifo(tmp_path / "pipe.png")
    names = ["pipe.png", "data:image/png;base64,iVBORw0KGgo=", "a\0.png", "a\ud800.png", "x" * 5000, "/dev/zero", "."]
    rows = [row("<image>", images=[name]) for name in names]
    dataset = open_(write(*rows, row("fine")), on_bad_record="skip", max_bad=len(names))
    assert [record.row for record in dataset.records] == [8]
    assert [(error.row, error.where) for error in dataset.skipped] == [(i, "images[0]") for i in range(1, 8)]


def test_an_empty_file_among_others_has_no_form(write, tmp_path):
    """The report named the form of a source with an empty shard "auto, messages"."""
    write(row("one"))
    (tmp_path / "empty.jsonl").touch()
    (source,) = open_(tmp_path / "*.jsonl").sources
    assert (source.rows, source.form) == (1, "messages")


def test_all_rows_skipped(write):
    """A wrong form or folder of pictures ended with the count alone: nobody could tell what to mend."""
    message = r"empty dataset: .*found none; all 2 rows were skipped, the first: .*, row 1, row: .* 'oops'$"
    with pytest.raises(ValueError, match=message):
        open_(write("oops", "oh"), on_bad_record="skip", max_bad=2)


def test_fingerprint_follows_the_content_not_the_place(write, tmp_path):
    rows = row("<image>", images=["a.png"]), row("text")
    fingerprint = open_(write(*rows)).fingerprint
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copyfile(write(*rows), moved / "other.jsonl")
    shutil.copyfile(tmp_path / "a.png", moved / "a.png")  # a new mtime
    assert open_(moved / "other.jsonl").fingerprint == fingerprint

    assert open_(write(*reversed(rows))).fingerprint != fingerprint
    assert open_(write(rows[0], row("texts"))).fingerprint != fingerprint
    Image.new("RGB", (700, 300), (1, 2, 3)).save(tmp_path / "a.png")
    assert open_(write(*rows)).fingerprint != fingerprint


def test_default_cache_is_in_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "deepseek-vl2-finetune"
