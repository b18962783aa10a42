"""Rows bent at random: each becomes a record that can be rendered, or one line that a user can act on; no traceback."""

import copy
import math
import random
from pathlib import Path

import pytest

from data.boxes import place_boxes
from data.record import parse_record
from data.settings import ReadSettings, SourceSettings
from tests.data.forms.test_forms import SAME
from tests.places import NANO_BPE
from vl2.errors import UserError
from vl2.prompt import IGNORE, render
from vl2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(NANO_BPE)
BOXES = {
    "messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "<ref-object><bbox><bbox>"}],
    "images": ["cat.jpg"],
    "objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4], [0, 0, 9, 9]], "image_id": [0, 0]},
}
ROWS = [*(row for _, row in SAME.values()), BOXES, {"question": "q", "answer": "a", "picture": "cat.jpg"}]
ODD = [
    *(None, True, 0, 1, -1, 3.5, math.nan, math.inf, 10**400, "", " ", [], {}, [None], [[]], [{}], b"\xff", "a" * 3000),
    *("<image>", "<bbox>", "<ref-object>", "[1,2", "{", "[]", "\ud800", "\0", "data:", "http://", "file://", "<|det|>"),
    *({"bytes": None}, {"url": "x"}, {"type": "text", "text": "x"}, {"role": "user", "content": "x"}, [1, 2, 3, 4]),
]
KEYS = [
    "loss",
    "weight",
    "train",
    "images",
    "image",
    "objects",
    "system",
    "history",
    "tools",
    "index",
    "type",
    "text",
    "content",
    "role",
    "value",
    "from",
]
SETTINGS = [ReadSettings(), ReadSettings(supervise="last", special_tokens="neutralise"), ReadSettings(unknown="error")]
SOURCES = [
    SourceSettings(path="a"),
    SourceSettings(path="a", columns={"user": "question", "assistant": "answer", "image": "picture"}),
    SourceSettings(path="a", form="alpaca", image_root="/pictures"),
    SourceSettings(path="a", columns={"image": "picture", "system": "instruction"}, system="Be brief."),
]


def places(value, path=()):
    """The way to every value within a row."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from places(inner, (*path, key))


def bend(row, dice: random.Random):
    """Put something odd into a row, or take something away."""
    path = dice.choice(list(places(row)))
    odd = copy.deepcopy(dice.choice(ODD))
    if not path:
        return odd
    parent = row
    for key in path[:-1]:
        parent = parent[key]
    match dice.randrange(4):
        case 0 if isinstance(parent, dict):
            parent[dice.choice(KEYS)] = odd
        case 1:
            parent.pop(path[-1])
        case 2 if isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        case _:
            parent[path[-1]] = odd
    return row


@pytest.mark.parametrize("seed", range(4))
def test_bent_row_is_a_record_or_one_line(seed):
    dice = random.Random(seed)
    used = 0
    for _ in range(1500):
        row = copy.deepcopy(dice.choice(ROWS))
        for _ in range(dice.randint(1, 3)):
            row = bend(row, dice)
        try:
            record = parse_record(
                row,
                source="a.jsonl",
                row_number=1,
                folder=Path("/pictures"),
                tokenizer=TOKENIZER,
                settings=dice.choice(SETTINGS),
                of=dice.choice(SOURCES),
            )
            messages = place_boxes(record, [(100, 100)] * len(record.images))
        except UserError as error:
            text = str(error)
            assert len(text) < 2500 and "\n" not in text and text.encode()
            continue
        assert not any("<bbox>" in message.content or "<ref-object>" in message.content for message in messages)
        rendered = render(messages, [(1, 1)] * len(record.images), TOKENIZER)
        assert (rendered.labels != IGNORE).any()
        used += 1
    assert used > 20
