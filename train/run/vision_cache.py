"""The vision cache of a run: what it is called, what it will take, and whether the tower is needed at all."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from data.dataset import Dataset
from data.images.files import ImageError
from data.images.reader import ImageReader
from data.record import Record
from data.size_table import state_key
from data.vision_cache import VisionCache
from train.ask.questions import questions_of
from train.config.schema import TrainConfig
from train.config.trains import trained_groups
from train.machine.memory import gigabytes
from train.run.build_data import Data
from train.run.say import say
from vl2.checkpoint.fingerprint import vision_fingerprint
from vl2.checkpoint.model_folder import ModelFolder
from vl2.dtypes import DTYPE_OF_SETTING
from vl2.errors import UserError
from vl2.tiles import MAX_CROPPED_IMAGES, Grid, Resolution, tile_grid

_CUT = 1  # of how a picture becomes tiles; another number where the tiles become others
_NUMPY_TYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}

Needed = set[tuple[int, Grid]]
"""Pictures by the first 8 bytes of their states, and grids."""


@dataclass(frozen=True, kw_only=True)
class RunCache:
    """The vision cache that a run uses."""

    cache: VisionCache | None  # None: it uses none
    is_whole: bool  # has every picture of the run, which needs no tower then


def open_vision_cache(config: TrainConfig, folder: ModelFolder, data: Data) -> RunCache:
    """Open the folder of data.vision_cache for the tower of this run, and say what it will take.

    Args:
        config: of the run.
        folder: of the base model.
        data: of the run.

    Raises:
        UserError: data.vision_cache is no folder.
    """
    if not config.data.vision_cache:
        return RunCache(cache=None, is_whole=False)
    cache = vision_cache(config, folder, data.images)
    if cache.folder.exists() and not cache.folder.is_dir():
        raise UserError(f"data.vision_cache={cache.folder}: expected a folder, or none yet; found a file")
    problem = cache.prepare()
    contents, seen = cache.known()
    needed, there, num_bytes, missing_bytes = _needed(data), 0, 0, 0
    for key, grid in needed:
        num_bytes += cache.num_bytes(grid)
        if f"{contents.get(key)}-{grid[0]}x{grid[1]}" in seen:
            there += 1
        else:
            missing_bytes += cache.num_bytes(grid)
    is_whole = there == len(needed) and config.model.init != "random"
    say(f"vision cache {cache.place}: {_words(len(needed), there, num_bytes, missing_bytes, cache.folder, is_whole)}")
    if problem:
        what = "what is there is read, and nothing is added" if seen else "the run goes on without"
        say(f"warning: vision cache {cache.place}: {problem}; {what}", sys.stderr)
    return RunCache(cache=cache, is_whole=is_whole)


def vision_cache(config: TrainConfig, folder: ModelFolder, images: ImageReader) -> VisionCache:
    """The cache of a run's tower, by all that its numbers depend on; nothing is written or read."""
    model, on_gpu = folder.config, paddle.get_device().startswith("gpu")
    stored = DTYPE_OF_SETTING[config.precision]
    computed = stored if on_gpu else "float32"
    projected = "projector" not in trained_groups(config)
    if config.model.init == "random":
        tower = f"random numbers of seed {config.seed} for {model.vision} and {model.projector}"
    else:
        tower = vision_fingerprint(folder.weights, stored, projected=projected)
    about = {
        "tower": tower,
        "projector": projected,
        "stored": stored,
        "computed": f"{computed} on a {'GPU' if on_gpu else 'CPU'}{' with TF32' if on_gpu and config.tf32 else ''}",
        "cut": _CUT,
    }
    side = -(-model.vision.grid // model.projector.downsample_ratio)
    shape = (side**2, model.projector.n_embed) if projected else (model.vision.grid**2, model.vision.width)
    return VisionCache(
        folder=Path(config.data.vision_cache), about=about, shape=shape, dtype=_NUMPY_TYPES[computed], images=images
    )


def _needed(data: Data) -> Needed:
    """All pictures that a run looks at, with their grids."""
    needed: Needed = set()
    for rows in (data.dataset, data.validation):
        if rows is not None:
            needed |= _shown(rows)
    for record in data.questions:  # the first question of a conversation of three pictures may show one, cropped
        if len(record.images) > MAX_CROPPED_IMAGES:
            needed.update(_asked(record, data.images, data.candidates))
    return needed


def _shown(rows: Dataset) -> Needed:
    table = np.unique(np.column_stack([rows.picture_keys, rows.sizes.grids.astype(np.uint64)]), axis=0)
    return {(key, (columns, lines)) for key, columns, lines in table.tolist()}


def _asked(record: Record, images: ImageReader, candidates: tuple[Resolution, ...]) -> Iterator[tuple[int, Grid]]:
    try:
        for question in questions_of(record, images):
            for image in question.images:
                key = int.from_bytes(state_key(images.state(image))[:8], "little")
                yield key, tile_grid(images.size(image), len(question.images), candidates)
    except ImageError:  # it is said where it is asked
        return


def _words(pictures: int, there: int, num_bytes: int, missing_bytes: int, folder: Path, is_whole: bool) -> str:
    text = f"{pictures:,} pictures, {gigabytes(num_bytes)}"
    if is_whole:
        return f"{text}, all there: the vision tower is not loaded"
    text += f"; {there:,} are there" if there else ""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    share = missing_bytes / free if free else float("inf")
    text += f"; {gigabytes(missing_bytes)} to be written, {share:.1%} of the {gigabytes(free)} free there"
    return text + (": what finds no room is not kept" if share > 1 else "")
