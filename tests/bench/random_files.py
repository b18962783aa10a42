"""A checkpoint without its numbers: names, shapes and shards from a config, and files that are filled at random.

Nothing here holds more than a block of a tensor, so the size of the model does not matter.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vl2.checkpoint.layouts import official_shapes
from vl2.checkpoint.tensor_files import safetensors_header
from vl2.config import VL2Config
from vl2.parameters import build_model, initial_kind

BYTES_PER_NUMBER = 2  # bfloat16, as everything published
_BLOCK = 1 << 20  # numbers drawn at once: 2 MB stay in the processor's cache
_ONE = 0x3F80  # 1.0 in bfloat16
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ROUTED = re.compile(r"(.*\.mlp)\.(?:experts\.(\d+)\.(\w+)|gate)\..*")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a checkpoint."""

    file: str
    shapes: Mapping[str, tuple[int, ...]]  # official names, in the order of the file

    @property
    def num_bytes(self) -> int:
        """Of the numbers; the header comes to that."""
        return sum(map(tensor_bytes, self.shapes.values()))

    def header(self) -> bytes:
        """What the file begins with."""
        return safetensors_header({name: ("bfloat16", shape) for name, shape in self.shapes.items()}, {"format": "pt"})


def tensor_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in bfloat16."""
    return math.prod(shape) * BYTES_PER_NUMBER


def tensor_shapes(config: VL2Config) -> dict[str, tuple[int, ...]]:
    """Official name -> shape ([out, in]) of every tensor, in the order of the official modules."""
    shapes = official_shapes(build_model(config, image_token_id=0))
    names = list(shapes)
    first_of_mlp: dict[str, int] = {}

    def place(index: int) -> tuple[int, float, int]:
        # There the experts of a layer come one by one, then the router; here the router, all gates and ups, all downs.
        routed = _ROUTED.fullmatch(names[index])
        if not routed:
            return index, 0, 0
        mlp, expert, projection = routed.groups()
        start = first_of_mlp.setdefault(mlp, index)
        return (start, int(expert), _PROJECTIONS.index(projection)) if expert else (start, math.inf, index)

    order = sorted([(*place(i), i) for i in range(len(names))])
    return {names[i]: shapes[names[i]] for *_, i in order}


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], *, shard_bytes: int, second_stage: int | None = None
) -> tuple[Shard, ...]:
    """Spread tensors over files as the published checkpoints do.

        shard_bytes 10, tensors of 4 6 3 9 2 bytes    4 6 | 3 9 | 2       a shard ends with the tensor that fills it

    Args:
        shapes: official names and shapes, in order.
        shard_bytes: a shard that has so many bytes is closed.
        second_stage: decoder layer that begins a shard whatever the last one holds.
    """
    stage = f"language.model.layers.{second_stage}."
    stage_start = next((name for name in shapes if name.startswith(stage)), None)
    groups: list[dict[str, tuple[int, ...]]] = []
    size = shard_bytes
    for name, shape in shapes.items():
        if size >= shard_bytes or name == stage_start:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += tensor_bytes(shape)
    files = [f"model-{i + 1:05d}-of-{len(groups):06d}.safetensors" for i in range(len(groups))]
    return tuple(Shard(file=file, shapes=group) for file, group in zip(files, groups))


def draw(name: str, shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """The numbers of one tensor, block by block, as bits of bfloat16; a function of (seed, name, shape).

    Norms are 1 and biases 0. Everything else has random sign, mantissa and lowest bit of the exponent:

        bits   s 0111100e mmmmmmm      |x| in [2^-7, 2^-5), mean 0, standard deviation 0.0189

    which is as wide as the models' initialisation (0.02) and as fast as random bytes.
    """
    rest, kind = math.prod(shape), initial_kind(name, len(shape))
    random = np.random.SFC64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    while rest:
        count = min(rest, _BLOCK)
        if kind == "random":
            bits = random.random_raw(-(-count // 4)).view(np.uint16)[:count]  # 64 bits are four numbers
            bits &= 0x80FF
            bits |= 0x3C00
        else:
            bits = np.full(count, _ONE if kind == "ones" else 0, np.uint16)
        yield bits
        rest -= count


def write_shard(path: Path, shard: Shard, *, seed: int, holes: bool = False) -> None:
    """Write one shard.

    Args:
        path: file to write.
        shard: its tensors.
        seed: see `draw`.
        holes: leave the numbers out: the file has its size, takes no space on the disk, and reads as zeros.
    """
    header = shard.header()
    with path.open("wb") as file:
        file.write(header)
        if holes:
            file.truncate(len(header) + shard.num_bytes)
            return
        for name, shape in shard.shapes.items():
            for bits in draw(name, shape, seed):
                file.write(bits.data)
