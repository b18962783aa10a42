"""The vision cache: a batch has the same numbers of its pictures, however they came there."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data import vision_cache
from data.images.reader import DEFAULT_READER
from data.images.ref import ImageRef
from data.vision_cache import VisionCache, num_distinct
from tests.data.test_packs import build, damage, opened  # noqa: F401  # a fixture
from vl2.projector import distinct_tiles


class Tower:
    """Makes two rows of three numbers of each tile, and counts the tiles."""

    def __init__(self):
        self.tiles = 0

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        self.tiles += len(tiles)
        means = tiles.astype(np.float32).reshape(len(tiles), 6, -1).mean(axis=2)
        return means.reshape(len(tiles), 2, 3)


def cache_in(folder: Path, **about: str) -> VisionCache:
    cache = VisionCache(folder=folder, about=about, shape=(2, 3), dtype="float32", images=DEFAULT_READER)
    assert cache.prepare() == ""
    return cache


def all_seen(packs) -> tuple[list[np.ndarray], int]:
    """What a model gets of the pictures of each pack, and how many tiles the tower saw for it."""
    tower, found = Tower(), []
    for index in range(len(packs)):
        batch = packs.complete(packs[index], tower)
        assert not {"names", "kept"} & set(batch)
        if "grids" in batch:
            assert "tiles" not in batch
            found.append(batch["seen"])
    return found, tower.tiles


def plainly_seen(packs) -> list[np.ndarray]:
    """The same of packs without a cache."""
    batches = (packs[index] for index in range(len(packs)))
    return [
        Tower()(batch["tiles"][distinct_tiles(batch["tiles"], [tuple(grid) for grid in batch["grids"]])[0]])
        for batch in batches
        if "grids" in batch
    ]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return len(found) == len(expected) > 0 and all(map(np.array_equal, found, expected))


def files_of(cache: VisionCache) -> list[Path]:
    return sorted(path for path in (cache.place / "seen").rglob("*") if path.is_file())


@pytest.fixture
def filled(opened, tmp_path):  # noqa: F811
    """A cache that has all pictures, the packs that filled it, and what is right."""
    cache = cache_in(tmp_path / "cache", tower="a")
    packs = build(opened, vision_cache=cache)
    expected = plainly_seen(build(opened))
    found, tiles = all_seen(packs)
    assert same(found, expected) and tiles > 0
    return cache, packs, expected


def test_pictures_that_are_there_are_neither_decoded_nor_seen(filled, monkeypatch):
    _cache, packs, expected = filled
    monkeypatch.setattr(type(DEFAULT_READER), "decode", lambda *_: pytest.fail("decoded"))
    found, tiles = all_seen(packs)
    assert same(found, expected) and tiles == 0


def test_one_file_a_picture_and_grid_by_content(filled, opened, tmp_path):  # noqa: F811
    cache, *_ = filled
    grids = {
        (image.name, grid)
        for row in zip(opened.records, opened.sizes, strict=True)
        for image, grid in zip(row[0].images, row[1].grids)
    }
    assert len(files_of(cache)) == len(grids)
    name = opened.records[1].images[0].name
    other = shutil.copy(name, tmp_path / "copy.png")
    grid = opened.sizes[1].grids[0]
    assert cache.name(ImageRef(kind="file", name=other), grid) == cache.name(opened.records[1].images[0], grid)
    turned = dataclasses.replace(cache, images=dataclasses.replace(DEFAULT_READER, exif="rotate"))
    assert turned.name(ImageRef(kind="file", name=other), grid) != cache.name(ImageRef(kind="file", name=other), grid)
    contents, seen = cache.known()
    assert len(seen) == len(grids) and len(contents) >= 3


def test_another_tower_has_another_folder(filled, opened, tmp_path):  # noqa: F811
    cache, _packs, expected = filled
    before = files_of(cache)
    foreign = cache_in(tmp_path / "cache", tower="b")
    found, tiles = all_seen(build(opened, vision_cache=foreign))
    assert same(found, expected) and tiles > 0
    assert files_of(cache) == before and len(files_of(foreign)) == len(before)


@pytest.mark.parametrize("broken", ["flipped", "short", "empty"])
def test_a_damaged_file_is_computed_again_and_said(filled, caplog, broken):
    cache, packs, expected = filled
    path = files_of(cache)[0]
    whole = path.read_bytes()
    path.write_bytes({"flipped": bytes([whole[0] ^ 1]) + whole[1:], "short": whole[:-20], "empty": b""}[broken])
    found, tiles = all_seen(packs)
    assert same(found, expected) and tiles > 0
    assert f"{path} is damaged; the picture is seen again" in caplog.text
    assert path.read_bytes() == whole


def test_a_folder_that_is_removed_meanwhile(filled):
    cache, packs, expected = filled
    batches = [packs[index] for index in range(len(packs))]
    shutil.rmtree(cache.folder)
    tower = Tower()
    found = [packs.complete(batch, tower) for batch in batches]
    assert same([batch["seen"] for batch in found if "seen" in batch], expected) and tower.tiles > 0


@pytest.mark.parametrize(
    ("number", "word"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "it cannot be written to")]
)
def test_where_nothing_can_be_written(opened, tmp_path, monkeypatch, caplog, number, word):  # noqa: F811
    """Said once; what is half written is gone, and the run goes on with the same numbers."""
    cache = cache_in(tmp_path / "cache", tower="a")
    packs = build(opened, vision_cache=cache, max_tokens=1070)

    def full(self: Path, data: bytes) -> int:
        self.open("wb").close()
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(vision_cache.Path, "write_bytes", full)
    found, _tiles = all_seen(packs)
    assert same(found, plainly_seen(build(opened, max_tokens=1070)))
    assert caplog.text.count("vision cache") == 1 and word in caplog.text
    assert files_of(cache) == []
    fresh = dataclasses.replace(cache)
    assert fresh.prepare() == word and not fresh.writable


def test_a_read_only_folder_is_read(filled, caplog):
    cache, packs, expected = filled
    cache.writable = False
    files_of(cache)[0].unlink()
    left = files_of(cache)
    found, tiles = all_seen(packs)
    assert same(found, expected) and 0 < tiles < sum(map(len, expected))
    assert files_of(cache) == left and not caplog.text


def test_a_broken_picture_is_not_kept(opened, tmp_path):  # noqa: F811
    """With on_bad_record=skip a plain picture is shown in its place, which nobody else may get."""
    damage(opened)
    cache = cache_in(tmp_path / "cache", tower="a")
    options = {"on_bad_record": "skip", "max_bad": 1}
    found, _ = all_seen(build(opened, vision_cache=cache, **options))
    assert same(found, plainly_seen(build(opened, **options)))
    assert len(cache.known()[1]) == 2


def test_half_written_files_are_swept_when_they_are_old(filled):
    cache, *_ = filled
    young, old = (files_of(cache)[0].parent / name for name in (".young.1", ".old.1"))
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert not any(name.startswith(".") for name in cache.known()[1])
    assert young.exists() and not old.exists()


def test_bytes_of_a_picture():
    cache = VisionCache(folder=Path("x"), about={}, shape=(196, 1280), dtype="uint16", images=DEFAULT_READER)
    assert [num_distinct(grid) for grid in ((1, 1), (2, 1), (3, 3))] == [1, 3, 10]
    assert cache.num_bytes((2, 1)) == 3 * 196 * 1280 * 2 + 16
