"""The vision cache of a run: what it is called, what it will take, and whether the tower is needed at all."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import PIL

import vl2
from data.dataset import Dataset
from data.images import pixels
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

# Of vl2: what decides the tiles of a picture, and the rounding of what the tower makes of them.
_DECIDING = (
    *("tiles", "vision", "projector", "attention", "plain_attention", "kernel_attention", "linear", "kernel_linear"),
    *("products", "stored_products", "bfloat16_products", "quantised", "casts"),
    *("compiled", "cpu_kernels", "weight_kernels", "ways"),
)
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
    found = look(config, folder, data)
    problem = found.cache.prepare()
    say(found.words())
    if problem:
        what = "what is there is read, and nothing is added" if found.there else "the run goes on without"
        say(f"warning: vision cache {found.cache.place}: {problem}; {what}", sys.stderr)
    return RunCache(cache=found.cache, is_whole=found.is_whole)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a vision cache has of a run's pictures."""

    cache: VisionCache
    pictures: int  # of the run, each with each of its grids
    there: int  # of them
    num_bytes: int  # that all take
    missing_bytes: int
    is_whole: bool  # and the tower is one that need not be loaded

    def words(self) -> str:
        """It in a line, with the share of the free disk that it will take."""
        text = f"vision cache {self.cache.place}: {self.pictures:,} pictures, {gigabytes(self.num_bytes)}"
        if self.is_whole:
            return f"{text}, all there: the vision tower is not loaded"
        text += f"; {self.there:,} are there" if self.there else ""
        place = self.cache.folder.absolute()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        share = self.missing_bytes / free if free else float("inf")
        text += f"; {gigabytes(self.missing_bytes)} to be written, {share:.1%} of the {gigabytes(free)} free there"
        return text + (": what finds no room is not kept" if share > 1 else "")


def look(config: TrainConfig, folder: ModelFolder, data: Data) -> Found:
    """Find out what data.vision_cache has of a run's pictures; nothing is written.

    Raises:
        UserError: it is no folder.
    """
    cache = vision_cache(config, folder, data.images)
    if cache.folder.exists() and not cache.folder.is_dir():
        raise UserError(f"data.vision_cache={cache.folder}: expected a folder, or none yet; found a file")
    contents, seen = cache.known()
    sizes = {pair: cache.num_bytes(pair[1]) for pair in _needed(data)}
    missing = [size for (key, grid), size in sizes.items() if f"{contents.get(key)}-{grid[0]}x{grid[1]}" not in seen]
    return Found(
        cache=cache,
        pictures=len(sizes),
        there=len(sizes) - len(missing),
        num_bytes=sum(sizes.values()),
        missing_bytes=sum(missing),
        is_whole=not missing and config.model.init != "random",
    )


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
        "stored": stored if config.model.frozen == "none" else f"{stored}, matrices in int8",
        "computed": f"{computed} on a {'GPU' if on_gpu else 'CPU'}{' with TF32' if on_gpu and config.tf32 else ''}",
        "code": _code(),
        "libraries": {"paddle": paddle.__version__, "pillow": PIL.__version__},
    }
    side = -(-model.vision.grid // model.projector.downsample_ratio)
    shape = (side**2, model.projector.n_embed) if projected else (model.vision.grid**2, model.vision.width)
    return VisionCache(
        folder=Path(config.data.vision_cache), about=about, shape=shape, dtype=_NUMPY_TYPES[computed], images=images
    )


def _code() -> str:
    """Hash of the code that makes tiles of a picture, and numbers of tiles: another version may round differently."""
    digest = hashlib.sha256(Path(pixels.__file__).read_bytes())
    for name in _DECIDING:
        digest.update(Path(vl2.__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


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
