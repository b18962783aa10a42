"""Packs: what the plan promised is what is built."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.dataset import Dataset, open_dataset
from data.images.reader import DEFAULT_READER
from data.packs import PackDataset
from data.plan import make_plan
from data.record import RecordError
from data.settings import ReadSettings, SourceSettings
from data.sizes import Sizes
from tests.places import NANO_BPE
from vl2.prompt import IGNORE, render
from vl2.tiles import cut_tiles, num_image_tokens
from vl2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(NANO_BPE)
CANDIDATES = ((384, 384), (768, 384))


def write_data(folder: Path) -> Path:
    for i, size in enumerate([(700, 300), (300, 300), (500, 200)]):
        random = np.random.default_rng(i)
        Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = [
        ("Hi", "Hello.", []),
        ("<image> 这是什么？", "一张图。", ["0.png"]),
        ("<image><image>Compare.", "Both are noise.", ["1.png", "2.png"]),
        ("Count", "one two three " * 120, []),
        ("<image>", "noise", ["1.png"]),
    ]
    path = folder / "train.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for question, answer, images in rows:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages, "images": images}) + "\n")
    return path


@pytest.fixture
def opened(tmp_path) -> Dataset:
    source = SourceSettings(path=str(write_data(tmp_path)))
    return open_dataset([source], settings=ReadSettings(), tokenizer=TOKENIZER, candidates=CANDIDATES, max_tokens=1200)


def build(opened: Dataset, *, packs_per_step: int = 4, max_tokens: int = 1200, **options) -> PackDataset:
    plan = make_plan(
        opened.sizes,
        max_tokens=max_tokens,
        max_tiles_per_pack=8,
        packs_per_step=packs_per_step,
        epochs=1,
        seed=0,
        data_fingerprint=opened.fingerprint,
    )
    return PackDataset(opened.records, plan, opened.sizes, TOKENIZER, CANDIDATES, **options)


def test_pack_is_its_samples_one_after_the_other(opened):
    packs = build(opened)
    seen = []
    for index, spec in enumerate(packs.plan.packs):
        batch = packs[index]
        seen.extend(spec.samples)
        if not spec.samples:
            continue
        ends = np.cumsum(batch["seq_lens"])
        assert ends[-1] == len(batch["input_ids"]) == spec.tokens
        assert (batch["labels"] != IGNORE).sum() == spec.supervised
        images = []
        for sample, start, end in zip(spec.samples, [0, *ends], ends):
            record, size = opened.records[sample], opened.sizes[sample]
            alone = render(record.messages, size.grids, TOKENIZER)
            assert batch["input_ids"][start:end].tolist() == alone.input_ids.tolist()
            assert batch["labels"][start:end].tolist() == alone.labels.tolist()
            assert batch["position_ids"][start:end].tolist() == list(range(size.tokens))
            assert batch["labels"][end - 1] == IGNORE  # nothing is predicted across samples
            images += [(image, grid) for image, grid in zip(record.images, size.grids)]
        if images:
            expected = np.concatenate([cut_tiles(DEFAULT_READER.decode(image), grid) for image, grid in images])
            assert np.array_equal(batch["tiles"], expected) and len(expected) == spec.tiles
            assert batch["grids"].tolist() == [list(grid) for _, grid in images]
    assert sorted(seen) == list(range(5))


def test_types_and_absent_keys(opened):
    packs = build(opened, max_tokens=1070)
    batches = [packs[i] for i in range(len(packs))]
    assert {batch["pack"].item() for batch in batches} == set(range(len(packs)))
    with_images = [batch for batch in batches if "tiles" in batch]
    assert 0 < len(with_images) < len(batches)
    for batch, spec in zip(batches, packs.plan.packs):
        assert ("tiles" in batch) == ("grids" in batch) == (spec.tiles > 0)
        assert all(array.dtype == (np.uint8 if key == "tiles" else np.int64) for key, array in batch.items())
        assert all(array.size > 0 for array in batch.values())
    assert with_images[0]["tiles"].shape[1:] == (3, 384, 384)


def test_steps_count_of_supervised_tokens(opened):
    packs = build(opened, packs_per_step=2, max_tokens=1070)
    for index in range(len(packs)):
        assert packs[index]["supervised_in_step"] == packs.plan.supervised(index // 2)


def test_empty_pack(opened):
    packs = build(opened, packs_per_step=16)
    batch = packs[15]
    assert packs.plan.packs[15].samples == ()
    assert {key: array.tolist() for key, array in batch.items() if key != "supervised_in_step"} == {
        "input_ids": [TOKENIZER.bos_id],
        "labels": [IGNORE],
        "position_ids": [0],
        "seq_lens": [1],
        "pack": 15,
    }
    assert batch["supervised_in_step"] == sum(size.supervised for size in opened.sizes)


def test_ranks_read_the_same_packs_in_another_order(opened):
    alone, pair = build(opened, max_tokens=1070), build(opened, max_tokens=1070, num_ranks=2)
    order = [pair[i]["pack"].item() for i in range(len(pair))]
    assert order == alone.plan.order(2).tolist()
    assert sorted(order) == list(range(len(alone)))
    assert np.array_equal(pair[1]["input_ids"], alone[order[1]]["input_ids"])


def damage(opened: Dataset) -> Path:
    """Break the picture of row 2 in a way that only decoding shows."""
    path = Path(opened.records[1].images[0].name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return path


def test_image_that_breaks_after_the_plan_is_an_error(opened):
    damage(opened)
    packs = build(opened)
    with pytest.raises(RecordError, match=r"train\.jsonl, row 2, images\[0\]: cannot read the image .*0\.png"):
        [packs[i] for i in range(len(packs))]


def test_image_that_is_gone_after_the_plan_is_an_error(opened):
    Path(opened.records[1].images[0].name).unlink()
    packs = build(opened)
    with pytest.raises(RecordError, match=r"train\.jsonl, row 2, images\[0\]: expected an image file, found none"):
        [packs[i] for i in range(len(packs))]


def test_skipping_a_broken_image_keeps_the_step(opened, caplog):
    """Nothing is learned from its sample; tokens, tiles, neighbours and the step's count stay as planned."""
    whole = build(opened)
    before = [whole[i] for i in range(len(whole))]
    damage(opened)
    packs = build(opened, on_bad_record="skip", max_bad=1)
    after = [packs[i] for i in range(len(packs))]
    changed = [i for i in range(len(packs)) if not np.array_equal(before[i]["labels"], after[i]["labels"])]
    (pack,) = changed
    for old, new in zip(before, after):
        for key in set(old) - {"labels", "tiles"}:
            assert np.array_equal(old[key], new[key])
    position = packs.plan.packs[pack].samples.index(1)
    ends = np.cumsum(after[pack]["seq_lens"])
    start = ends[position] - after[pack]["seq_lens"][position]
    expected = before[pack]["labels"].copy()
    expected[start : ends[position]] = IGNORE
    assert after[pack]["labels"].tolist() == expected.tolist()
    assert after[pack]["tiles"].shape == before[pack]["tiles"].shape
    assert (after[pack]["tiles"] == 127).all(axis=(1, 2, 3)).sum() == opened.sizes[1].tiles

    again = packs[pack]  # another epoch: counted and told once
    assert np.array_equal(again["labels"], after[pack]["labels"])
    assert caplog.text.count("nothing is learned from this sample") == 1


def test_skipping_more_than_max_bad(opened):
    damage(opened)
    packs = build(opened, on_bad_record="skip", max_bad=0)
    with pytest.raises(ValueError, match=r"more than data\.max_bad=0 bad rows"):
        [packs[i] for i in range(len(packs))]


@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_image_of_another_size_than_planned(opened, on_bad_record):
    """It would not fit its place in the stream: an error even where broken images are skipped."""
    Image.new("RGB", (300, 300)).save(opened.records[1].images[0].name)
    packs = build(opened, on_bad_record=on_bad_record, max_bad=9)
    with pytest.raises(RecordError, match=r"row 2, images\[0\]: planned as 2×1 tiles, but .*0\.png now gives 1×1"):
        [packs[i] for i in range(len(packs))]


def test_pack_that_differs_from_the_plan(opened):
    sizes = Sizes.of([dataclasses.replace(opened.sizes[0], tokens=opened.sizes[0].tokens + 1), *opened.sizes[1:]])
    packs = build(dataclasses.replace(opened, sizes=sizes))
    with pytest.raises(RecordError, match=r"row 1, messages: planned as 16 tokens, 5 of them supervised, but built as"):
        [packs[i] for i in range(len(packs))]


def test_packs_cross_to_a_worker_that_is_no_fork(opened):
    """macOS starts workers anew, and sends them what they build packs from; an open file cannot be sent."""
    packs = build(opened)
    sent = pickle.loads(pickle.dumps(packs))
    for i in range(len(packs)):
        assert all(np.array_equal(array, sent[i][key]) for key, array in packs[i].items())


@pytest.fixture
def grounded(tmp_path) -> Dataset:
    """One row, whose picture has two boxes in pixels."""
    write_data(tmp_path)
    said = [
        {"role": "user", "content": "<image>Where is <ref-object>?"},
        {"role": "assistant", "content": "There: <bbox>"},
    ]
    objects = {"ref": ["the dog"], "bbox": [[70, 30, 350, 150]]}
    path = tmp_path / "boxes.jsonl"
    path.write_text(json.dumps({"messages": said, "images": ["0.png"], "objects": objects}) + "\n")
    source = SourceSettings(path=str(path))
    return open_dataset([source], settings=ReadSettings(), tokenizer=TOKENIZER, candidates=CANDIDATES)


def test_boxes_are_written_for_the_picture_that_is_shown(grounded):
    (batch,) = [build(grounded, packs_per_step=1)[0]]
    text = TOKENIZER.decode(batch["input_ids"])
    assert "<|ref|>the dog<|/ref|>" in text and "<bbox>" not in text
    assert "<|det|>[[100, 100, 500, 500]]<|/det|>" in text
    assert (batch["labels"] != IGNORE).sum() == grounded.sizes[0].supervised


def test_boxes_on_a_picture_that_broke_keep_the_step(grounded):
    """They cannot be written any more, and the sample must not become shorter than planned."""
    Path(grounded.records[0].images[0].name).write_bytes(b"")
    batch = build(grounded, packs_per_step=1, on_bad_record="skip", max_bad=1)[0]
    assert len(batch["input_ids"]) == len(batch["labels"]) == grounded.sizes[0].tokens
    assert (batch["labels"] == IGNORE).all()
    assert (batch["input_ids"] == TOKENIZER.image_id).sum() == num_image_tokens(grounded.sizes[0].grids[0])
