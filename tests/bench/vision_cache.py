"""What a vision cache saves of a step, by hand: `bash launch.sh bench vision_cache [nano|mid] [--steps 5]`.

Trains the same steps three times in this process: without a cache, with one that is empty, and with one that has every
picture. A pack has one picture of three tiles, as in `bench memory`. Of steps and of calls of the tower (the
projector's with them) the fastest count; the losses of all three runs are compared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tests.bench.memory import arguments_of, write_data, write_model
from train.config.load import load_config
from train.run.training import train
from vl2.model import DeepseekVL2


def main(arguments: list[str]) -> None:
    """Entry script."""
    parser = argparse.ArgumentParser(
        prog="bash launch.sh bench vision_cache", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("model", nargs="?", default="mid", choices=("nano", "mid"))
    parser.add_argument("--steps", type=int, default=5, help="timed of each run (default 5)")
    asked = parser.parse_args(arguments)
    tower = _time_tower()
    found = {}
    with tempfile.TemporaryDirectory(prefix="bench-vision-cache-") as name:
        folder = Path(name)
        model, data = write_model(folder, asked.model), write_pictures(write_data(folder), asked.steps + 1)
        cached = f"data.vision_cache={folder / 'cache'}"
        for run, keys in {"without": (), "filling": (cached,), "with": (cached,)}.items():
            tower.clear()
            lines = _train(
                arguments_of(
                    model,
                    data,
                    folder / run,
                    (
                        *keys,
                        f"max_steps={asked.steps + 1}",
                        "packs_per_step=1",
                        "save_steps=0",
                        "recompute=0",
                        "data.order=file",
                    ),
                )
            )
            seconds = [line["seconds"] for line in lines][1:]  # the first one warms up
            losses = [line["loss"] for line in lines]
            found[run] = {"seconds": min(seconds), "losses": losses, "calls": len(tower)}
            if run == "without":
                share = min(tower) / min(seconds)
    same = found["with"].pop("losses") == found["filling"].pop("losses") == found["without"].pop("losses")
    for run, numbers in found.items():
        print(f"{asked.model} {run:8} {numbers['seconds']:.3f} s a step, {numbers['calls']} calls of the tower")
    saved = 1 - found["with"]["seconds"] / found["without"]["seconds"]
    print(f"  the tower takes {share:.1%} of a step, the cache saves {saved:.1%}")
    print(f"  the losses are {'the same' if same else 'NOT the same'}")
    print(json.dumps({"model": asked.model, **found, "tower_share": share, "saved_share": saved, "same_losses": same}))


def write_pictures(data: Path, count: int) -> Path:
    """Give so many rows a picture of their own each, and leave the others out."""
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    rows = [rows[i % len(rows)] for i in range(count)]
    random = np.random.default_rng(0)
    for i, row in enumerate(rows):
        name = f"{i}.png"
        Image.fromarray(random.integers(0, 256, (384, 768, 3), dtype=np.uint8)).save(data.parent / name)
        row["images"] = [name]
    path = data.with_name("pictures.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _train(command: list[str]) -> list[dict]:
    config = load_config(command)
    with contextlib.redirect_stdout(io.StringIO()):
        code = train(config)
    assert code == 0, f"exit code {code}"
    metrics = Path(config.run_dir, "metrics.jsonl").read_text("utf-8")
    return [line for line in map(json.loads, metrics.splitlines()) if "loss" in line]


def _time_tower() -> list[float]:
    """Has every look at tiles note its seconds, in the list that is given back."""
    seconds: list[float] = []
    see = DeepseekVL2.see

    def timed(self, tiles):
        start = time.perf_counter()
        yield from see(self, tiles)
        seconds.append(time.perf_counter() - start)

    DeepseekVL2.see = timed  # type: ignore[method-assign]
    return seconds
