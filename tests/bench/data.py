"""Prints how long data takes before and between steps, beside what its two libraries take alone for the same work.

By hand: `bash launch.sh bench data`, with `rows=...` and `pictures=...` for fewer; the last line is one JSON object.

Everything is measured in one run: first open and measuring against the tokenizer's own batch encoding with threads on
all cores, the second start up to the plan, ten more rows, memory over epochs of building packs, and pictures through
the run's loader against bare Pillow in as many processes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from data.dataset import Dataset, open_dataset
from data.images.reader import ImageReader
from data.measurer import Measurer
from data.packs import PackDataset
from data.plan import Plan, make_plan
from data.settings import ReadSettings, SourceSettings
from tests.places import NANO_BPE
from vl2.tokenizer import Tokenizer

MAX_TOKENS = 4096
WORDS = 4000  # different ones in the texts, as letters at random: nothing is encoded quicker for being common
CHARACTERS = 400  # of a conversation
PHOTOGRAPH = (1600, 1200)  # pixels
EPOCHS = 3
SAMPLED = 2000  # packs of each epoch that are built: memory that grows shows within a few hundred

Found = TypeVar("Found")


def main(arguments: list[str]) -> None:
    """Entry script."""
    parser = argparse.ArgumentParser(prog="bash launch.sh bench data", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="KEY=NUMBER", help="rows=1000000 pictures=2000")
    asked = {"rows": 1_000_000, "pictures": 2000}
    for setting in parser.parse_args(arguments).settings:
        key, _, number = setting.partition("=")
        if key not in asked or not number.isdecimal():
            parser.error(f"{setting}: expected one of {', '.join(f'{key}=NUMBER' for key in asked)}")
        asked[key] = int(number)
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        found = {**bench_text(Path(name), asked["rows"]), **bench_pictures(Path(name), asked["pictures"])}
    print(json.dumps(found))


def bench_text(folder: Path, rows: int) -> dict[str, float]:
    """Rows of text alone."""
    file = write_rows(folder / "rows.jsonl", rows)
    tokenizer = Tokenizer.from_folder(NANO_BPE)
    found: dict[str, float] = {"rows": rows}

    def start() -> tuple[Dataset, Plan]:
        dataset = open_(file, folder / "cache", tokenizer)
        return dataset, plan_of(dataset)

    found["first_seconds"], dataset = timed(lambda: open_(file, folder / "cache", tokenizer))
    say(f"{rows:,} rows of {file.stat().st_size // rows} bytes: opened and measured in {found['first_seconds']:.1f} s")
    found["bare_seconds"] = in_child(functools.partial(encode_bare, file))
    found["ratio"] = found["first_seconds"] / found["bare_seconds"]
    say(f"encode_batch_fast of the same texts alone: {found['bare_seconds']:.1f} s, ratio {found['ratio']:.2f}")

    found["second_seconds"], (dataset, plan) = timed(start)
    say(f"second start to the plan of {plan.num_packs:,} packs, {plan.fill:.2%} full: {found['second_seconds']:.1f} s")

    packs = PackDataset(dataset.records, plan, dataset.sizes, tokenizer, [(384, 384)])
    memory = [anonymous_megabytes()]
    for _ in range(EPOCHS):
        for index in np.linspace(0, len(packs) - 1, min(SAMPLED, len(packs))).astype(int).tolist():
            packs[index]
        memory.append(anonymous_megabytes())
    found["rss_anon_mb"], found["growth_mb"] = max(memory), memory[-1] - memory[1]
    say(f"memory of its own, MB, before and after each of {EPOCHS} epochs: {', '.join(f'{mb:.0f}' for mb in memory)}")

    write_rows(file, 10, mode="a", seed=1)
    with counted() as measured:
        found["ten_more_seconds"], _ = timed(lambda: open_(file, folder / "cache", tokenizer))
    found["ten_more_rows"] = sum(measured)
    say(f"ten more rows: {found['ten_more_rows']} measured, {found['ten_more_seconds']:.1f} s")
    return found


def bench_pictures(folder: Path, count: int) -> dict[str, float]:
    """Rows with a photograph each: headers, and packs from the loader."""
    file = write_pictures(folder, count)
    tokenizer = Tokenizer.from_folder(NANO_BPE)
    candidates = [(384 * w, 384 * h) for w in range(1, 10) for h in range(1, 10) if w * h <= 9]
    workers = len(os.sched_getaffinity(0))
    found: dict[str, float] = {"pictures": count}
    paths = sorted(folder.glob("*.jpg"))
    found["header_seconds"], dataset = timed(lambda: open_(file, folder / "cache", tokenizer, candidates))
    grid = dataset.sizes[0].grids[0]
    start = sum(os.times()[:4])
    found["bare_pillow_seconds"], _ = timed(lambda: decode_bare(paths, (384 * grid[0], 384 * grid[1]), workers))
    found["bare_pillow_cpu_seconds"] = sum(os.times()[:4]) - start
    plan = plan_of(dataset)
    packs = PackDataset(dataset.records, plan, dataset.sizes, tokenizer, candidates)
    start = sum(os.times()[:4])
    found["loader_seconds"], built = timed(lambda: sum(1 for _ in load(packs, workers)))
    found["loader_cpu_seconds"] = sum(os.times()[:4]) - start
    found["loader_share"] = found["bare_pillow_seconds"] / found["loader_seconds"]
    found["second_header_seconds"], _ = timed(lambda: open_(file, folder / "cache", tokenizer, candidates))
    say(
        f"{count:,} photographs of {PHOTOGRAPH[0]}x{PHOTOGRAPH[1]}: headers {found['header_seconds']:.2f} s, again "
        f"{found['second_header_seconds']:.2f} s; {built} packs from the loader {found['loader_seconds']:.1f} s, bare "
        f"Pillow {found['bare_pillow_seconds']:.1f} s in {workers} processes, {found['loader_share']:.2f} of it; "
        f"work of all processes {found['loader_cpu_seconds']:.1f} s and {found['bare_pillow_cpu_seconds']:.1f} s"
    )
    return found


@contextmanager
def counted() -> Iterator[list[int]]:
    """Numbers of rows that are measured meanwhile, a chunk each; few enough for this process to measure them itself."""
    numbers: list[int] = []
    original = Measurer.measure

    def count(self: Any, indices: np.ndarray, **options: Any) -> Any:
        numbers.append(len(indices))
        return original(self, indices, **options)

    Measurer.measure = count  # type: ignore[method-assign]
    try:
        yield numbers
    finally:
        Measurer.measure = original  # type: ignore[method-assign]


def open_(file: Path, cache: Path, tokenizer: Tokenizer, candidates: Any = ((384, 384),)) -> Dataset:
    """The rows as a run opens them."""
    return open_dataset(
        [SourceSettings(path=str(file))],
        settings=ReadSettings(),
        tokenizer=tokenizer,
        candidates=candidates,
        images=ImageReader(),
        max_tokens=MAX_TOKENS,
        cache=cache,
    )


def plan_of(dataset: Dataset) -> Plan:
    """An epoch of packs as a run plans them."""
    return make_plan(
        dataset.sizes,
        max_tokens=MAX_TOKENS,
        max_tiles_per_pack=32,
        packs_per_step=8,
        seed=0,
        epochs=1,
        data_fingerprint=dataset.fingerprint,
    )


def load(packs: PackDataset, workers: int) -> Iterator[Any]:
    """All packs, through the loader of a run."""
    import paddle.io

    from train.run.pack_loader import PackLoader

    def fail(what: str) -> None:
        raise RuntimeError(what)

    order = paddle.io.BatchSampler(packs, batch_size=1)
    loader = PackLoader(packs, batch_sampler=order, num_workers=workers, on_worker_killed=fail)
    yield from loader
    loader.close()


def write_rows(file: Path, count: int, *, mode: str = "w", seed: int = 0) -> Path:
    """Conversations of random words, about CHARACTERS each with their braces."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randrange(2, 10))) for _ in range(WORDS)]
    with file.open(mode, encoding="utf-8") as out:
        for _ in range(count):
            text = " ".join(draw.choices(words, k=CHARACTERS // 8))
            question, answer = text[:120], text[120:]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


def write_pictures(folder: Path, count: int) -> Path:
    """Rows with a JPEG each, of the size and the detail of a photograph."""
    random_pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    picture = Image.fromarray(random_pixels).resize(PHOTOGRAPH, Image.Resampling.BICUBIC)
    picture.save(folder / "photograph.jpeg", quality=90)
    content = (folder / "photograph.jpeg").read_bytes()
    file = folder / "pictures.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for i in range(count):
            (folder / f"{i:06}.jpg").write_bytes(content)
            said = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Noise."}]
            out.write(json.dumps({"messages": said, "images": [f"{i:06}.jpg"]}) + "\n")
    return file


def encode_bare(file: Path) -> float:
    """Seconds that the tokenizer takes for the texts of a file, with its threads, and nothing else."""
    tokenizer = Tokenizer.from_folder(NANO_BPE)
    seconds = 0.0
    with file.open(encoding="utf-8") as lines:
        while texts := [
            message["content"] for _, line in zip(range(10_000), lines) for message in json.loads(line)["messages"]
        ]:
            seconds += timed(functools.partial(tokenizer.count_batch, texts))[0]
    return seconds


def decode_bare(paths: list[Path], size: tuple[int, int], workers: int) -> None:
    """Decode and resize pictures to their tiles and the global view, with Pillow alone."""
    with ProcessPoolExecutor(workers, get_context("fork")) as executor:
        list(executor.map(functools.partial(_decode_one, size=size), paths, chunksize=8))


def _decode_one(path: Path, size: tuple[int, int]) -> int:
    with Image.open(path) as image:
        picture = image.convert("RGB")
    shown = [ImageOps.pad(picture, to, color=(127, 127, 127)) for to in (size, (384, 384))]
    return sum(one.width for one in shown)


def in_child(work: Callable[[], float]) -> float:
    """Do something in a process of its own, whose threads and memory end with it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        return executor.submit(work).result()


def timed(work: Callable[[], Found]) -> tuple[float, Found]:
    """(seconds, what came out)."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def anonymous_megabytes() -> float:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def say(text: str) -> None:
    """One line at once."""
    print(text, flush=True)
    sys.stdout.flush()
