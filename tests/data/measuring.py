"""Rows to measure, written to a file and opened."""

import json
from pathlib import Path

from PIL import Image

from data.budget import Budget
from data.images.reader import DEFAULT_READER
from data.measure import measure
from data.measurer import Measurer
from data.records import RecordReader
from data.settings import ReadSettings, SourceSettings
from data.sources.open import open_sources
from tests.places import NANO_BPE
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


def measure_one(reader: RecordReader, candidates=CANDIDATES, *, budget=Budget(), **options):  # noqa: B008
    """(table, indices of usable rows) of one file."""
    measurer = Measurer(reader=reader, candidates=tuple(candidates), images=DEFAULT_READER, budget=budget)
    (found,) = measure([measurer], **options)
    return found
