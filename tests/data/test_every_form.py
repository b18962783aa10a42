"""Sixteen conversations about pictures in every form, every kind of file, every way to name a picture: the same packs.

The packs are compared bit for bit, ids, labels and tiles, with those of the plainest file: JSON lines of `messages`,
with paths, and boxes in the model's own text.
"""

import base64
import copy
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from PIL import Image, ImageDraw

from data.boxes import COORDINATE_MAX
from data.dataset import open_dataset
from data.images.reader import ImageReader
from data.packs import Batch, PackDataset
from data.plan import make_plan
from data.settings import ReadSettings, SourceSettings
from tests.data.images.web import Web
from tests.places import NANO_BPE
from vl2.tokenizer import Tokenizer

pytestmark = pytest.mark.slow  # half a minute for all files

TOKENIZER = Tokenizer.from_folder(NANO_BPE)
CANDIDATES = ((384, 384), (768, 384))
SIZES = {"carrots.jpg": (90, 60), "corn.png": (60, 90), "ribs.webp": (200, 90), "street.jpg": (333, 111)}

DET = re.compile(r"<\|ref\|>(.*?)<\|/ref\|><\|det\|>(\[\[.*?\]\])<\|/det\|>")
GIRAFFE = "<|ref|>The giraffe at the back.<|/ref|>"
STREET = (
    "<|ref|>A woman<|/ref|><|det|>[[660, 560, 770, 860]]<|/det|> waits where <|ref|>cars<|/ref|>"
    "<|det|>[[420, 500, 500, 560], [0, 510, 61, 999]]<|/det|> drive."
)
# (pictures, system message, question, answer, question, answer ...)
TALKS: list[tuple[list[str], str, list[str]]] = [
    (["carrots.jpg"], "", ["<image>\nWhat vegetable is this?", "Four orange carrots."]),
    (["corn.png"], "", ["<image>\n这是什么？", "这是两根带绿叶的玉米。"]),
    (["ribs.webp"], "", ["What is in the bowl? <image>", "Raw pork ribs."]),
    (
        ["carrots.jpg", "corn.png", "ribs.webp"],
        "",
        ["1: <image>\n2: <image>\n3: <image>\n What?", "Carrots, corn, meat."],
    ),
    (["street.jpg"], "", [f"<image>\n{GIRAFFE}.", f"{GIRAFFE}<|det|>[[580, 270, 999, 900]]<|/det|>"]),
    (["street.jpg"], "", ["<image>\nWhich?", "Two giraffes.", "How many?", "Two.", "Behind them?", "Trees."]),
    (["carrots.jpg"], "", ["<image>\nRead the text.", "MONDAY. JUST...MONDAY."]),
    (
        ["ribs.webp"],
        "",
        ["<image>\n<|ref|>the dog<|/ref|>", "<|ref|>the dog<|/ref|><|det|>[[180, 370, 715, 705]]<|/det|>"],
    ),
    (["corn.png"], "", ["<image>\nHighest?", "Above 70.", "And the lowest?", "About 53."]),
    (["carrots.jpg"], "Answer in one word.", ["<image>\nWhat fruit?", "Watermelon"]),
    (["street.jpg"], "", ["Is <image> taken by day?", "By day: the sky is blue."]),
    (["carrots.jpg", "corn.png"], "", ["<image>\n<image>\nWhich is sweeter?", "The second."]),
    ([], "", ["What is a mixture of experts?", "Many small networks."]),
    ([], "说中文。", ["用一句话介绍长江。", "长江是亚洲最长的河流。"]),
    (["carrots.jpg", "corn.png"], "", ["First: <image> What?", "Carrots.", "And this <image>?", "Corn."]),
    (["street.jpg"], "", ["<image>\n<|grounding|>Describe the street.", STREET]),
]
# Those that a question and its answer can say, without turns before them.
SINGLE = [talk for talk in TALKS if len(talk[2]) == 2]

Row = dict | list
Name = Callable[[str], object]  # a picture's file name -> how a row names it


def parts(content: str, pictures: Iterator[object], image: Callable[[object], dict]) -> list[dict]:
    pieces = re.split("(<image>)", content)
    return [
        image(next(pictures)) if piece == "<image>" else {"type": "text", "text": piece} for piece in pieces if piece
    ]


def as_parts(talk, name: Name, image: Callable[[object], dict], *, column: bool = False) -> Row:
    pictures, system, turns = talk
    names = iter([name(picture) for picture in pictures])
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for i, turn in enumerate(turns):
        messages.append({"role": ("user", "assistant")[i % 2], "content": parts(turn, names, image)})
    return {"messages": messages, **({"images": [name(picture) for picture in pictures]} if column else {})}


def messages(talk, name: Name) -> Row:
    pictures, system, turns = talk
    listed = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {
        "messages": ([{"role": "system", "content": system}] if system else []) + listed,
        "images": [name(picture) for picture in pictures],
    }


def openai(talk, name: Name) -> Row:
    return as_parts(talk, name, lambda value: {"type": "image_url", "image_url": {"url": value}})


def hugging_face(talk, name: Name) -> Row:
    return as_parts(talk, name, lambda value: {"type": "image", "image": value})


def image_column(talk, name: Name) -> Row:
    return as_parts(talk, name, lambda _: {"type": "image"}, column=True)


def llava(talk, name: Name) -> Row:
    pictures, system, turns = talk
    listed = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    row = {"conversations": ([{"from": "system", "value": system}] if system else []) + listed}
    names = [name(picture) for picture in pictures]
    return {**row, "image": names[0] if len(names) == 1 else names} if names else row


def deepseek_vl2(talk, name: Name) -> Row:
    pictures, system, turns = talk
    left = [name(picture) for picture in pictures]
    row: list[dict] = [{"role": "system", "content": system}] if system else []
    for i, turn in enumerate(turns):
        own = [left.pop(0) for _ in range(turn.count("<image>"))]
        message = {"role": ("<|User|>", "<|Assistant|>")[i % 2], "content": turn}
        row.append({**message, "images": own} if own else message)
    return row


def query(talk, name: Name) -> Row:
    pictures, system, turns = talk
    history = [[turns[i], turns[i + 1]] for i in range(0, len(turns) - 2, 2)]
    names = [name(picture) for picture in pictures]
    return {"system": system, "history": history, "query": turns[-2], "response": turns[-1], "images": names}


def alpaca(talk, name: Name) -> Row:
    row = query(talk, name)
    first, _, rest = row.pop("query").partition("\n")
    return {"instruction": first, "input": rest, "output": row.pop("response"), **row}


def texts(talk, name: Name) -> Row:
    pictures, system, turns = talk
    pairs = [{"user": turns[i], "assistant": turns[i + 1], "source": ""} for i in range(0, len(turns), 2)]
    return {"system": system, "texts": pairs, "images": [name(picture) for picture in pictures]}


def columns(talk, name: Name) -> Row:
    pictures, system, (question, answer) = talk
    names = [name(picture) for picture in pictures]
    # One picture that leads is how such tables have it: no <image> in the question.
    plain = question.removeprefix("<image>\n") if question.count("<image>") == 1 else question
    return {"q": plain, "a": answer, "s": system, "p": names[0] if len(names) == 1 else json.dumps(names)}


def with_objects(row: Row, talk, *, parts_of_picture: bool) -> Row:
    """Take the boxes out of the texts of a row of messages, and put them beside it."""
    labels, boxes, row = [], [], copy.deepcopy(row)
    width, height = SIZES[talk[0][0]] if talk[0] else (1, 1)
    full = (1, 1) if parts_of_picture else (width, height)

    def take(match: re.Match[str]) -> str:
        labels.append(match[1])
        found = json.loads(match[2])
        boxes.extend([[x / COORDINATE_MAX * edge for x, edge in zip(box, (*full, *full))] for box in found])
        return "<ref-object>" + "<bbox>" * len(found)

    for message in row["messages"]:
        message["content"] = DET.sub(take, message["content"])
    kind = {"bbox_type": "norm1"} if parts_of_picture else {}
    return {**row, "objects": {"ref": labels, "bbox": boxes, **kind}} if boxes else row


def boxes_in_pixels(talk, name: Name) -> Row:
    return with_objects(messages(talk, name), talk, parts_of_picture=False)


def boxes_in_parts(talk, name: Name) -> Row:
    return with_objects(messages(talk, name), talk, parts_of_picture=True)


def write(path: Path, rows: list[Row]) -> None:
    kind = path.name.partition(".")[2]
    if kind.startswith("json"):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        text = lines if kind.startswith("jsonl") else json.dumps(rows, indent=1)
        compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(kind.partition(".")[2], bytes)
        path.write_bytes(compress(text.encode()))
    elif kind == "csv":
        flat = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
        pandas.DataFrame(flat).to_csv(path, index=False)
    else:
        # `Table.from_pylist` would take the fields of the first row alone.
        table = pyarrow.Table.from_struct_array(pyarrow.array(rows))
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=5)
        elif kind == "arrow":
            with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table)
        else:
            from datasets import Dataset

            Dataset(table).save_to_disk(str(path))


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """Pictures with edges and colours, so that a wrong tile shows."""
    folder = tmp_path_factory.mktemp("album")
    for i, (name, (width, height)) in enumerate(SIZES.items()):
        noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        ImageDraw.Draw(picture).rectangle((width // 4, height // 3, width // 2, height // 2), fill=(250, 10 * i, 0))
        picture.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def web(album) -> Iterator[Web]:
    server = Web()
    for name in SIZES:
        data = (album / name).read_bytes()
        server.answers[f"/{name}"] = lambda handler, data=data: handler.give(data)
    yield server
    server.end()


@pytest.fixture(scope="module")
def ways(album, web) -> dict[str, Name]:
    def read(name: str) -> bytes:
        return (album / name).read_bytes()

    def encoded(name: str) -> str:
        return base64.b64encode(read(name)).decode()

    def png(name: str) -> bytes:
        """The pixels of the file, written anew: bytes that no file of the album holds."""
        stream = io.BytesIO()
        Image.open(album / name).convert("RGB").save(stream, "PNG")
        return stream.getvalue()

    return {
        "path": lambda name: name,
        "absolute": lambda name: str(album / name),
        "url": lambda name: web.url(f"/{name}"),
        "data uri": lambda name: f"data:image/any;base64,{encoded(name)}",
        "base64": encoded,
        "bytes": lambda name: {"bytes": png(name), "path": None},
        "raw": png,
    }


def packs_of(path: Path, album: Path, cache: Path, **of) -> list[Batch]:
    images = ImageReader(allow_private_urls=True, cache=cache / "web")
    opened = open_dataset(
        [SourceSettings(path=str(path), **of)],
        settings=ReadSettings(unknown="error"),
        tokenizer=TOKENIZER,
        candidates=CANDIDATES,
        images=images,
        max_tokens=2048,
        cache=cache,
        workers=1,
    )
    plan = make_plan(opened.sizes, max_tokens=2048, max_tiles_per_pack=24, packs_per_step=1, epochs=1, seed=0)
    packs = PackDataset(opened.records, plan, opened.sizes, TOKENIZER, CANDIDATES, images=images)
    return [packs[i] for i in range(len(packs))]


@pytest.fixture(scope="module")
def expected(album, ways, tmp_path_factory) -> Callable[[list], list[Batch]]:
    found: dict[int, list[Batch]] = {}

    def of(talks: list) -> list[Batch]:
        if len(talks) not in found:
            write(album / f"{len(talks)}.jsonl", [messages(talk, ways["path"]) for talk in talks])
            found[len(talks)] = packs_of(album / f"{len(talks)}.jsonl", album, tmp_path_factory.mktemp("cache"))
        return found[len(talks)]

    return of


FILES = [
    (messages, "path", "json"),
    (messages, "absolute", "jsonl.gz"),
    (messages, "url", "jsonl"),
    (messages, "data uri", "json.zst"),
    (messages, "base64", "jsonl"),
    (messages, "bytes", "parquet"),
    (messages, "raw", "arrow"),
    (messages, "bytes", "saved"),
    (messages, "path", "csv"),
    (openai, "path", "jsonl"),
    (openai, "url", "json"),
    (openai, "data uri", "parquet"),
    (openai, "base64", "jsonl.gz"),
    (hugging_face, "path", "json.zst"),
    (hugging_face, "bytes", "saved"),
    (image_column, "path", "jsonl"),
    (image_column, "bytes", "parquet"),
    (llava, "path", "json"),
    (llava, "url", "jsonl.gz"),
    (llava, "data uri", "jsonl"),
    (deepseek_vl2, "path", "jsonl"),
    (deepseek_vl2, "url", "json"),
    (query, "path", "parquet"),
    (query, "base64", "jsonl"),
    (query, "absolute", "csv"),
    (alpaca, "path", "json.zst"),
    (alpaca, "bytes", "arrow"),
    (texts, "bytes", "saved"),
    (texts, "path", "jsonl"),
    (columns, "path", "csv"),
    (columns, "data uri", "parquet"),
    (columns, "url", "jsonl"),
    (boxes_in_pixels, "path", "jsonl"),
    (boxes_in_pixels, "bytes", "parquet"),
    (boxes_in_pixels, "absolute", "csv"),
    (boxes_in_parts, "data uri", "json"),
    (boxes_in_parts, "url", "arrow"),
]


@pytest.mark.parametrize(("form", "way", "kind"), FILES, ids=lambda value: getattr(value, "__name__", value))
def test_every_form_and_file_gives_the_same_packs(form, way, kind, album, ways, expected, tmp_path):
    of = {"columns": {"user": "q", "assistant": "a", "system": "s", "image": "p"}} if form is columns else {}
    # In a column beside the question a picture has no place in the text but before it.
    talks = [talk for talk in SINGLE if form is not columns or re.match(r"(<image>\n)*[^<]+$", talk[2][0])]
    talks = talks if form is columns else TALKS
    path = album / f"{form.__name__} {way}.{kind}"
    write(path, [form(talk, ways[way]) for talk in talks])
    packs = packs_of(path, album, tmp_path, image_root=str(album) if kind == "saved" else "", **of)
    assert len(packs) == len(expected(talks)) > 1
    for pack, same in zip(packs, expected(talks)):
        assert pack.keys() == same.keys()
        for key in pack:
            assert np.array_equal(pack[key], same[key]), key


def test_the_files_are_many():
    assert len(FILES) >= 20 and len(TALKS) == 16 and len({kind for _, _, kind in FILES}) >= 8
    assert sum("<|det|>" in "".join(talk[2]) for talk in TALKS) == 3
