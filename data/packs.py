"""Builds the packs of a plan: one flat stream of ids, labels and positions, and the tiles of its images.

A pack is one micro-batch: a dictionary of arrays without a batch axis.

    two samples of 5 and 3 tokens, the first with image tokens # and one image of 2 tiles, p = prompt, a = answer

    input_ids     p # # p a   p a a        position_ids  0 1 2 3 4   0 1 2        seq_lens  5 3
    labels        - - - a -   a a -        tiles         [2, 3, 384, 384]         grids     [[1, 1]]
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import paddle.io

from data.boxes import place_boxes
from data.images.files import ImageError
from data.images.reader import DEFAULT_READER, ImageReader
from data.plan import Plan
from data.record import BadRecords, Record
from data.settings import OnBadRecord
from data.sizes import Size, Sizes
from data.vision_cache import See, VisionCache
from vl2.prompt import IGNORE, render
from vl2.tiles import PAD_COLOUR, TILE_SIZE, Resolution, cut_tiles, num_tiles, tile_grid
from vl2.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]


class PackDataset(paddle.io.Dataset):
    """The packs of a plan, built when asked for.

    An item is a dictionary of arrays (T tokens, S samples, N tiles, I images):

        input_ids           int64 [T]
        labels              int64 [T]   shifted; IGNORE where nothing is learned
        position_ids        int64 [T]   from 0 in each sample
        seq_lens            int64 [S]   sum T
        tiles               uint8 [N, 3, 384, 384]   absent in a pack without images
        grids               int64 [I, 2]             columns and rows of local tiles; absent likewise
        names, kept         str [I], bool [I]        with a vision cache: what pictures are called there, and whether
                                                     they are there; `tiles` are those of the others
        pack                int64 []    index in the plan
        supervised_in_step  int64 []    supervised tokens of the pack's optimizer step, over all ranks

    An empty pack is one sample of one BOS, with nothing supervised.
    """

    def __init__(
        self,
        records: Sequence[Record],
        plan: Plan,
        sizes: Sizes,
        tokenizer: Tokenizer,
        candidates: Sequence[Resolution],
        *,
        images: ImageReader = DEFAULT_READER,
        num_ranks: int = 1,
        on_bad_record: OnBadRecord = "error",
        max_bad: int = 0,
        vision_cache: VisionCache | None = None,
    ):
        """Keep what packs are built from; nothing is read yet.

        Args:
            records, sizes: as the plan was made of; a record is read when its pack is built.
            plan: which samples form each pack.
            tokenizer: gives the ids.
            candidates: resolutions (width, height) in pixels an image may be shown at.
            images: opens the pictures.
            num_ranks: item p goes to rank p mod num_ranks, see `Plan.order`.
            on_bad_record: what to do with an image that turns out broken: "error", or with "skip" show a plain
                picture and learn nothing from its sample, so that the step keeps its planned size.
            max_bad: samples that may be lost so, in each process that builds packs.
            vision_cache: pictures that are in it are not decoded; `complete` puts their numbers in.
        """
        super().__init__()
        self.records, self.plan, self.sizes = records, plan, sizes
        self.tokenizer, self.candidates = tokenizer, tuple(candidates)
        self.images, self.vision_cache = images, vision_cache
        self._order = plan.order(num_ranks)
        self._bad = BadRecords(on_bad_record=on_bad_record, max_bad=max_bad)
        self._lost: set[int] = set()

    def __len__(self) -> int:
        return len(self.plan.packs)

    def __getitem__(self, index: int) -> Batch:
        """Build the pack at a position.

        Raises:
            RecordError: a broken image, or a file that changed since it was measured.
        """
        return self._assemble(int(self._order[index]), self.vision_cache)

    def complete(self, batch: Mapping[str, np.ndarray], see: See) -> Batch:
        """Put `seen` in place of the tiles of an item, where there is a vision cache; what is new is kept there.

        Args:
            batch: an item.
            see: the tower.
        """
        complete = dict(batch)
        if self.vision_cache is None or "names" not in complete:
            return complete
        names, kept, tiles = complete.pop("names"), complete.pop("kept"), complete.pop("tiles", None)
        grids = [(columns, rows) for columns, rows in complete["grids"].tolist()]
        seen = self.vision_cache.gather(names.tolist(), kept.tolist(), grids, tiles, see)
        if seen is None:  # one was removed since a worker looked
            tiles = self._assemble(int(complete["pack"]), None)["tiles"]
            seen = self.vision_cache.gather(names.tolist(), [False] * len(names), grids, tiles, see)
            assert seen is not None
        return {**complete, "seen": seen}

    def _assemble(self, pack: int, cache: VisionCache | None) -> Batch:
        """Build a pack of the plan, without the tiles of the pictures that a cache holds."""
        spec = self.plan.packs[pack]
        tiles = np.empty((spec.tiles, 3, TILE_SIZE, TILE_SIZE), dtype=np.uint8)
        ends = np.cumsum([self.sizes[sample].tiles for sample in spec.samples], dtype=np.int64).tolist()
        rooms = (tiles[start:end] for start, end in zip([0, *ends], ends))
        found: list[tuple[str, bool]] | None = [] if cache is not None else None
        samples = [self._build(sample, room, found) for sample, room in zip(spec.samples, rooms, strict=True)]
        samples = samples or [_empty_sample(self.tokenizer)]
        lengths = [len(sample["input_ids"]) for sample in samples]
        batch: Batch = {
            "input_ids": np.concatenate([sample["input_ids"] for sample in samples]),
            "labels": np.concatenate([sample["labels"] for sample in samples]),
            "position_ids": np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
            "seq_lens": np.array(lengths, dtype=np.int64),
        }
        if spec.tiles:
            batch["tiles"] = tiles
            batch["grids"] = np.concatenate([sample["grids"] for sample in samples if "grids" in sample])
        if found:
            names, kept = zip(*found, strict=True)
            batch |= {"names": np.array(names), "kept": np.array(kept)}
            batch["tiles"] = tiles[np.repeat(~batch["kept"], 1 + batch["grids"].prod(axis=1))]
            if not len(batch["tiles"]):
                del batch["tiles"]
        batch["pack"] = np.array(pack, dtype=np.int64)
        batch["supervised_in_step"] = np.array(self.plan.supervised(pack // self.plan.packs_per_step), dtype=np.int64)
        return batch

    def _build(self, index: int, tiles: np.ndarray, found: list[tuple[str, bool]] | None) -> Batch:
        """Render a sample and cut its images into `tiles`; what comes out has the size that was planned."""
        record, size = self.records[index], self.sizes[index]
        shown: Batch = {}
        pixels: list[tuple[int, int]] | None = []
        if record.images:
            pixels = self._cut(index, record, size, tiles, found)
            shown["grids"] = np.array(size.grids, dtype=np.int64)
        if pixels is None:
            return {**_nothing_learned(record, size, self.tokenizer), **shown}
        rendered = render(place_boxes(record, pixels), size.grids, self.tokenizer)
        labels = rendered.labels
        built = (len(labels), int((labels != IGNORE).sum()))
        if built != (size.tokens, size.supervised):
            raise record.error(
                "messages",
                f"planned as {size.tokens} tokens, {size.supervised} of them supervised, but built as {built[0]} and "
                f"{built[1]}: the plan was made with another tokenizer or other data; start again",
            )
        return {"input_ids": rendered.input_ids, "labels": labels, **shown}

    def _cut(
        self, index: int, record: Record, size: Size, tiles: np.ndarray, found: list[tuple[str, bool]] | None
    ) -> list[tuple[int, int]] | None:
        """Decode the images of a sample and cut them into `tiles`, the sample's part of the pack's.

        Args:
            found: receives what each image is called in the vision cache, and whether it is there; such a one is not
                decoded. None: there is no cache.

        Returns:
            (width, height) of each image in pixels; None when one of the images is broken and may be skipped.
        """
        if len(record.images) != len(size.grids):
            raise record.error(
                "images",
                f"planned with {len(size.grids)} pictures, found {len(record.images)}: "
                "the file changed after it was measured; start again",
            )
        pixels, whole, end = [], True, 0
        for i, (picture, grid) in enumerate(zip(record.images, size.grids, strict=True)):
            start, end = end, end + num_tiles(grid)
            name, kept = "", False
            try:
                if found is not None and self.vision_cache is not None:
                    name = self.vision_cache.name(picture, grid)
                    kept = self.vision_cache.holds(name, grid)
                image = None if kept else self.images.decode(picture)
                width_height = self.images.size(picture) if image is None else image.size
            except ImageError as error:
                problem = record.image_error(i, str(error))
                if index not in self._lost:  # each epoch meets it again
                    self._bad.add(problem)
                    self._lost.add(index)
                    logger.warning("%s; nothing is learned from this sample", problem)
                tiles[start:end] = PAD_COLOUR[0]
                whole = False
                if found is not None:
                    found.append(("", False))
                continue
            now = tile_grid(width_height, len(record.images), self.candidates)
            if now != grid:
                raise record.image_error(
                    i,
                    f"planned as {grid[0]}×{grid[1]} tiles, but {picture.name} now gives {now[0]}×{now[1]}: "
                    "the image changed after it was measured; start again",
                )
            if image is not None:
                cut_tiles(image, grid, tiles[start:end])
            if found is not None:
                found.append((name, kept))
            pixels.append(width_height)
        return pixels if whole else None


def _nothing_learned(record: Record, size: Size, tokenizer: Tokenizer) -> Batch:
    """A sample of the planned length; boxes cannot be written without their picture, and leave another length."""
    input_ids = render(record.messages, size.grids, tokenizer).input_ids[: size.tokens]
    missing = size.tokens - len(input_ids)
    return {
        "input_ids": np.concatenate([input_ids, np.full(missing, tokenizer.eos_id, dtype=np.int64)]),
        "labels": np.full(size.tokens, IGNORE, dtype=np.int64),
    }


def _empty_sample(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "input_ids": np.array([tokenizer.bos_id], dtype=np.int64),
        "labels": np.array([IGNORE], dtype=np.int64),
    }
