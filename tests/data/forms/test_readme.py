"""The rows of data/forms/README.md and of the README: all say the same, those with boxes too."""

import json
import re

from data.boxes import place_boxes
from data.forms.table import FORMS, find_form
from data.record import parse_record
from data.settings import ReadSettings, SourceSettings
from tests.places import NANO_BPE, ROOT
from vl2.tokenizer import Tokenizer

PAGE = (ROOT / "data" / "forms" / "README.md").read_text(encoding="utf-8")
TOKENIZER = Tokenizer.from_folder(NANO_BPE)


def test_rows_of_the_page_say_the_same():
    blocks = re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    rows = [json.loads(line) for block in blocks for line in block.splitlines()]
    columns = dict(re.findall(r"data\.columns\.(\w+)=(\w+)", PAGE))
    said: dict[str, set] = {"plain": set(), "boxes": set()}
    forms = set()
    for row in rows:
        of = SourceSettings(path="a.jsonl", columns=columns if "question" in row else {})
        record = parse_record(
            row,
            source="a.jsonl",
            row_number=1,
            folder=ROOT,
            tokenizer=TOKENIZER,
            settings=ReadSettings(unknown="error"),
            of=of,
        )
        forms.add(find_form(row, of))
        kind = "boxes" if "Find" in json.dumps(row) else "plain"
        said[kind].add((place_boxes(record, [(384, 384)]), record.images))
    assert len(rows) >= 12 and {kind: len(texts) for kind, texts in said.items()} == {"plain": 1, "boxes": 1}
    assert forms == set(FORMS) == set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))


def test_rows_of_the_readme():
    """What they become is what is written beside them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [json.loads(row) for row in re.findall(r"^```json\n(.*)\n```", text, re.MULTILINE)]
    answers = []
    for row in rows:
        record = parse_record(
            row,
            source="a.jsonl",
            row_number=1,
            folder=ROOT,
            tokenizer=TOKENIZER,
            settings=ReadSettings(unknown="error"),
            of=SourceSettings(path="a.jsonl"),
        )
        answers.append(place_boxes(record, [(384, 384)])[-1].content)
    assert answers[0] == "A cat." and f"`{answers[1]}`" in text
