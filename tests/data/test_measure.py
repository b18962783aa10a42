"""Measuring: sizes are exact, and the first bad row is said, whatever measures it."""

import os
import random
from pathlib import Path

import paddle
import pytest

import data.measure
import data.measurer
from data.budget import Budget
from data.images.reader import DEFAULT_READER
from data.measure import measure
from data.measurer import Measurer
from data.record import BadRecords, RecordError
from data.settings import ReadSettings
from data.size_table import sizes_of
from data.sizes import Size
from tests.data.measuring import CANDIDATES, TOKENIZER, measure_one, picture, reader_of, row
from vl2.prompt import IGNORE, render
from vl2.tiles import limit_candidates, num_image_tokens, tile_grid
from vl2.tokenizer import Tokenizer


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


@pytest.mark.parametrize("count", [50, 5000])
def test_the_field_of_a_long_conversation_is_one_that_the_row_has(sizes, count):
    """Of a row of query and response the error named `messages`; also where the text is too long to be encoded."""
    budget, answer = Budget(max_tokens=60), "long " * count
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": answer}]
    for one, field in (
        ({"query": "Hi", "response": answer}, "row"),
        ({"conversations": talk}, "conversations"),
        ([{"role": "<|User|>", "content": "Hi"}, {"role": "<|Assistant|>", "content": answer}], "row"),
    ):
        with pytest.raises(RecordError, match=rf"a\.jsonl, row 1, {field}: conversation of \d+ "):
            sizes([one], budget=budget)


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


def test_files_are_measured_together(tmp_path, monkeypatch, counted):
    """A thousand small files, each with its own processes or none, would take one core for ever."""
    monkeypatch.setattr(data.measure, "_MIN_PARALLEL", 30)
    started = []
    original = data.measure.map_forked
    monkeypatch.setattr(data.measure, "map_forked", lambda *given: started.append(given) or original(*given))
    readers = [reader_of(tmp_path / f"{i}.jsonl", [row(f"{i} {j}") for j in range(10)]) for i in range(4)]
    all_of_it = readers[1]
    readers[1] = reader_of(tmp_path / "1.jsonl", [row(f"1 {j}") for j in range(10)], limit=7)
    readers[2] = reader_of(tmp_path / "2.jsonl", [row("fine"), "oops", row("long " * 50), row("fine")])

    def measurer(reader):
        return Measurer(reader=reader, candidates=CANDIDATES, images=DEFAULT_READER, budget=Budget(max_tokens=60))

    measurers = [measurer(reader) for reader in readers]
    bad = BadRecords(on_bad_record="skip", max_bad=2)
    found = measure(measurers, workers=2, bad=bad, cache=tmp_path / "cache")
    assert len(started) == 1
    assert [kept.tolist() for _, kept in found] == [[*range(10)], [*range(7)], [0, 3], [*range(10)]]
    assert [(Path(error.source).name, error.row) for error in bad.skipped] == [("2.jsonl", 2), ("2.jsonl", 3)]
    bad = BadRecords(on_bad_record="skip", max_bad=2)
    measurers[1] = measurer(all_of_it)
    again = measure(measurers, workers=2, bad=bad, cache=tmp_path / "cache")
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


def test_what_is_wrong_with_a_picture_comes_before_what_is_wrong_with_a_later_row(tmp_path, sizes):
    """Rows are parsed some at a time, before their pictures are looked at."""
    with pytest.raises(RecordError, match=r"row 1, images\[0\]: expected an image file"):
        sizes([row("x", tmp_path / "gone.png"), "oops", *[row()] * 30])


def test_where_nothing_forks_the_library_takes_its_threads(sizes, monkeypatch, single_threaded_tokenizers):
    """On macOS one core measured all rows."""
    rows = [row(f"question {i}") for i in range(10)]
    expected, batches = sizes(rows), []
    original = Tokenizer.count_batch
    monkeypatch.setattr(Tokenizer, "count_batch", lambda self, texts: batches.append(texts) or original(self, texts))
    assert sizes(rows) == expected and not batches
    monkeypatch.setattr(data.measure, "can_fork", lambda: False)
    assert sizes(rows) == expected and batches
