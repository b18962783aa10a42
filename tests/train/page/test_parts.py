"""What the page is made of: bars, tokens of several bytes, boxes on padded pictures, unseen characters."""

import json

import numpy as np
import pytest
from PIL import Image

from data.boxes import Box
from data.images.reader import DEFAULT_READER
from data.images.ref import ImageRef
from data.record import Record
from train.page.histogram import count_shares, count_whole
from train.page.packs import PackPen
from train.page.pictures import TextBox, draw_picture, text_boxes
from train.page.visible import visible
from vl2.prompt import Message
from vl2.tokenizer import Tokenizer


def test_bars_hold_every_value_once():
    few = count_whole(np.array([0, 1, 1, 3]), title="", unit="")
    assert [(bar.low, bar.high, bar.count, bar.height) for bar in few.bars] == [
        *[(0, 0, 1, 50), (1, 1, 2, 100)],
        *[(2, 2, 0, 0), (3, 3, 1, 50)],
    ]
    values = np.random.default_rng(0).integers(900, 100_000, 5000)
    many = count_whole(values, title="", unit="")
    assert len(many.bars) <= 40
    assert sum(bar.count for bar in many.bars) == 5000
    for bar in many.bars:
        assert bar.count == np.count_nonzero((values >= bar.low) & (values <= bar.high))
    assert many.words["most"] == f"{values.max():,}"


def test_shares_are_counted_in_percent():
    shares = count_shares(np.array([0.0, 0.5, 0.999, 1.0]), title="", unit="")
    assert [bar.low for bar in shares.bars if bar.count] == [0, 50, 95]
    assert shares.words == {"least": "0.0%", "mean": "62.5%", "most": "100.0%"}


def test_unseen_characters_get_a_shape():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\0\r\x7f\x85\u202e\u2028\ufeff\ud800") == "␀␍␡⟨U+0085⟩⟨U+202E⟩⟨U+2028⟩⟨U+FEFF⟩⟨U+D800⟩"
    assert visible("👩‍🚀 ｜日本") == "👩‍🚀 ｜日本"
    json.dumps(visible("\udc80")).encode("utf-8")


def test_tokens_that_share_a_character_are_drawn_together(model_folder):
    """A byte-level tokenizer spells 😀 in up to four tokens, each of which alone is no text."""
    tokenizer = Tokenizer.from_folder(model_folder)
    text = "a😀é"
    ids = tokenizer.encode(text)
    drawn = list(PackPen(None, tokenizer, DEFAULT_READER)._texts(ids, [True] * len(ids)))
    assert "".join(token.text for token in drawn) == text
    assert [token_id for token in drawn for token_id in token.ids] == ids
    assert any(len(token.ids) > 1 and token.text == "😀" for token in drawn)


def test_a_box_keeps_its_place_on_a_padded_picture(tmp_path):
    """A tall picture on one tile has grey beside it: 100 × 200 fills the middle half."""
    path = tmp_path / "tall.png"
    Image.new("RGB", (100, 200), "red").save(path)
    box = TextBox(label="lower right", corners=(500, 500, 999, 999), image=0)
    image = ImageRef(kind="file", name=str(path))
    drawn = draw_picture(image, (1, 1), number=1, reader=DEFAULT_READER, boxes=[box], opened=True)
    (on_canvas,) = drawn.boxes
    found = (on_canvas.left, on_canvas.top, on_canvas.width, on_canvas.height)
    assert found == pytest.approx((50, 50, 25, 50), abs=0.1)
    assert (drawn.size, drawn.tokens) == ((100, 200), 421)


def test_a_picture_that_cannot_be_opened_says_so(tmp_path):
    """Damage within a JPEG is found by nobody before its pack is built."""
    image = ImageRef(kind="file", name=str(tmp_path / "gone.png"))
    drawn = draw_picture(image, (2, 1), number=1, reader=DEFAULT_READER, boxes=[], opened=True)
    assert "found none at" in drawn.missing
    assert (drawn.uri, drawn.width, drawn.tokens) == ("", 300, 617)


def test_boxes_know_their_picture():
    """Those in numbers by the row, those in text by the picture shown before them, and <bbox> as text is no box."""
    box = Box(x1=0, y1=0, x2=1, y2=1, unit="parts", image=0)
    read = (
        Message(
            "user", "<image><image> <|ref|>x<|/ref|><bbox> <|ref|>y<|/ref|><|det|>[[1, 2, 3, 4], [5, 6, 7, 8]]<|/det|>"
        ),
    )
    placed = (Message("user", read[0].content.replace("<bbox>", "<|det|>[[0, 0, 999, 999]]<|/det|>")),)
    record = Record(messages=read, images=(), boxes=((box,),), source="", row=1)
    assert [(found.label, found.image, found.corners) for found in text_boxes(record, placed)] == [
        ("x", 0, (0, 0, 999, 999)),
        ("y", 1, (1, 2, 3, 4)),
        ("y", 1, (5, 6, 7, 8)),
    ]
    plain = Record(messages=(Message("user", "<bbox>"),), images=(), source="", row=1)
    assert text_boxes(plain, plain.messages) == []
