"""Three sources in three forms for a run on nano: photographs in a table, drawn shapes, and text."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pandas
from PIL import Image

from data.shapes.write import write_shapes

NAMES = ("photographs", "shapes", "text")
_TINTS = {"red": (200, 60, 50), "green": (60, 170, 70), "blue": (60, 80, 200), "yellow": (210, 200, 60)}
# LLaVA's words for the roles.
_FROM = {"user": "human", "assistant": "gpt", "system": "system"}


def write_three_sources(folder: Path, *, rows: int, seed: int = 0) -> str:
    """Write the files and return the `data.sources` of a recipe file.

    Args:
        folder: where to write.
        rows: of each source.
        seed: of what is written.
    """
    _photographs(folder / "photos.parquet", rows, seed)
    _shapes(folder, rows, seed)
    _texts(folder / "texts.json", rows, seed)
    entries = [
        {
            "path": str(folder / "photos.parquet"),
            "name": "photographs",
            "columns": {"user": "ask", "assistant": "say", "image": "photo"},
        },
        {"path": str(folder / "shapes" / "train" / "llava.jsonl"), "name": "shapes", "form": "conversations"},
        {"path": str(folder / "texts.json"), "name": "text", "repeat": 1.5},
    ]
    return json.dumps(entries)


def _photographs(path: Path, rows: int, seed: int) -> None:
    """JPEG bytes in Parquet: no drawn edges but soft light and noise, of one tint each, upright and lying."""
    draw = np.random.default_rng(seed)
    table = []
    for _ in range(rows):
        tint = str(draw.choice(list(_TINTS)))
        height, width = [(200, 300), (300, 200), (256, 256)][draw.integers(3)]
        light = Image.fromarray(draw.integers(90, 255, (5, 5), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
        noise = draw.normal(0, 12, (height, width, 3))
        pixels = np.asarray(light)[..., None] / 255 * np.array(_TINTS[tint]) + noise
        encoded = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=85)
        table.append(
            {"photo": {"bytes": encoded.getvalue(), "path": None}, "ask": "What colour is the light?", "say": tint}
        )
    pandas.DataFrame(table).to_parquet(path)


def _shapes(folder: Path, rows: int, seed: int) -> None:
    """The rehearsal's pictures, told as LLaVA does."""
    drawn = write_shapes(folder / "shapes", task="chinese", split="train", count=rows, seed=seed)
    lines = []
    for line in drawn.read_text("utf-8").splitlines():
        row = json.loads(line)
        turns = [{"from": _FROM[message["role"]], "value": message["content"]} for message in row["messages"]]
        lines.append(json.dumps({"conversations": turns, "image": row["images"]}, ensure_ascii=False))
    drawn.with_name("llava.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def _texts(path: Path, rows: int, seed: int) -> None:
    """A JSON array of alpaca's rows."""
    draw, words = random.Random(seed), ["circle", "square", "star", "red", "blue", "green", "left", "right"]
    told = []
    for _ in range(rows):
        said = " ".join(draw.choices(words, k=draw.randint(2, 4)))
        told.append({"instruction": "Repeat the words.", "input": said, "output": said})
    path.write_text(json.dumps(told), "utf-8")
