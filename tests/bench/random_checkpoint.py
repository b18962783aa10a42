"""`bash launch.sh bench random_checkpoint tiny`: a checkpoint with a published model's names, shapes and files.

The numbers are drawn. For trying out loading, training and export at real size without a download.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tests.bench.random_files import Shard, plan_shards, tensor_bytes, tensor_shapes, write_shard
from train.config.conf_files import groups
from train.config.load import model_folder
from train.config.schema import NANO
from train.machine.disk import check_disk
from train.machine.memory import gigabytes
from train.store.whole_folder import check_empty, write_folder
from vl2.checkpoint.folder import INDEX_FILE
from vl2.checkpoint.model_folder import check_vocabulary
from vl2.checkpoint.published import PROCESSOR_CONFIG, SHARD_BYTES, published
from vl2.config import VL2Config
from vl2.tokenizer import Tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is asked for."""

    model: str  # name of a published model on the hub, or a folder with a config.json
    out: Path
    numbers: str  # random, holes or none
    tokenizer: Path
    seed: int


def read_arguments(arguments: list[str]) -> Order:
    """The arguments of the command, names of conf/model resolved."""
    parser = argparse.ArgumentParser(
        prog="bash launch.sh bench random_checkpoint", description="Writes a checkpoint of random numbers at real size."
    )
    parser.add_argument("model", help=f"{', '.join(groups()['model'])}, or a folder with a config.json")
    parser.add_argument("--out", type=Path, help="new folder to write (default outputs/random/NAME)")
    parser.add_argument(
        "--numbers",
        default="random",
        choices=("random", "holes", "none"),
        help="random: drawn; holes: exact headers and sizes over zeros that take no disk space; none: print names, "
        "types, shapes, bytes and files, write nothing",
    )
    parser.add_argument(
        "--tokenizer", type=Path, default=NANO, help="folder whose tokenizer is copied (default nano's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the numbers (default 0)")
    asked = parser.parse_args(arguments)
    out = asked.out or Path("outputs", "random", Path(asked.model).name)
    return Order(
        model=model_folder(asked.model), out=out, numbers=asked.numbers, tokenizer=asked.tokenizer, seed=asked.seed
    )


def main(arguments: list[str]) -> int:
    """Entry script."""
    order = read_arguments(arguments)
    shards = shards_of(order.model)
    if order.numbers == "none":
        print("\n".join(listing(shards)))
    else:
        write(order, shards)
        print(f"written to {order.out}")
    print(summary(shards))
    return 0


def shards_of(model: str) -> tuple[Shard, ...]:
    """The files of a checkpoint.

    Args:
        model: name of a published model on the hub, or a folder with a config.json.

    Raises:
        ValueError: neither of them.
    """
    known = published(model)
    shapes = tensor_shapes(VL2Config.from_folder(_config_folder(model)))
    return plan_shards(shapes, shard_bytes=SHARD_BYTES, second_stage=known.second_stage if known else None)


def write(order: Order, shards: tuple[Shard, ...]) -> None:
    """Write the folder, under another name until it is whole.

    Raises:
        ValueError: `out` holds something, the disk has no room, or tokenizer and model do not fit.
    """
    out, source, tokenizer = order.out, _config_folder(order.model), order.tokenizer
    check_empty(out)
    check_vocabulary(Tokenizer.from_folder(tokenizer), VL2Config.from_folder(source), str(tokenizer))
    holes = order.numbers == "holes"
    if not holes:
        check_disk(out, sum(shard.num_bytes for shard in shards), f"the checkpoint {out.name}")

    def fill(folder: Path) -> None:
        shutil.copyfile(source / "config.json", folder / "config.json")
        processor = source / "processor_config.json"
        shutil.copyfile(processor if processor.is_file() else PROCESSOR_CONFIG, folder / "processor_config.json")
        for name in _TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
        (folder / "README.md").write_text(_readme(order), encoding="utf-8")
        index = {
            "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
            "weight_map": {name: shard.file for shard in shards for name in sorted(shard.shapes)},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for shard in tqdm(shards, desc="write", unit="file", disable=None):
            write_shard(folder / shard.file, shard, seed=order.seed, holes=holes)

    write_folder(out, fill, manifest=False)


def listing(shards: tuple[Shard, ...]) -> list[str]:
    """A line a tensor: name, type, shape, bytes, file; separated by tabs."""
    return [
        f"{name}\tBF16\t{list(shape)}\t{tensor_bytes(shape)}\t{shard.file}"
        for shard in shards
        for name, shape in shard.shapes.items()
    ]


def summary(shards: tuple[Shard, ...]) -> str:
    """The files and their sums."""
    shapes = [shape for shard in shards for shape in shard.shapes.values()]
    lines = [
        f"{shard.file}  {len(shard.shapes)} tensors, {gigabytes(shard.num_bytes + len(shard.header()))}"
        for shard in shards
    ]
    total = sum(shard.num_bytes for shard in shards)
    numbers = sum(map(math.prod, shapes)) / 1e9
    return "\n".join([*lines, f"{len(shapes)} tensors, {numbers:.2f} B numbers in bfloat16, {gigabytes(total)}"])


def _config_folder(model: str) -> Path:
    known = published(model)
    return known.config.parent if known else Path(model)


def _readme(order: Order) -> str:
    numbers = f"Random numbers (seed {order.seed})" if order.numbers == "random" else "Zeros that take no disk space"
    return (
        f"# Not a trained model\n\n{numbers} under the names, shapes and files of {order.model}, with a tokenizer\n"
        "that may be another model's: for trying out loading, training and export at real size.\n"
    )
