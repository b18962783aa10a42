"""The model of cost against the clock, by hand: `bash launch.sh bench cost [--repeats 7]`.

LoRA steps of nano and of the model of `bench step` (mha and mla) on 1024 tokens with one image of three tiles, with and
without recomputation, against what train.run.cost says at this machine's rates: products of 2048 x 2048 and copies of
64 MB, timed between the steps, and the smallest operation. The fastest of each counts. With OMP_NUM_THREADS=1 in front
it is the process's own time, which other work on the machine disturbs less. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle

from tests.bench.step import IMAGE_ID, batch, model_config
from train.config.load import load_config
from train.config.schema import NANO
from train.run.cost import pack_cost, processor
from vl2.config import VL2Config
from vl2.lora import apply_lora
from vl2.lora_settings import LoRASettings
from vl2.parameters import init_model

clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
GROUPS = ("attention", "experts", "shared_experts")


def main(arguments: list[str]) -> None:
    """Entry script."""
    parser = argparse.ArgumentParser(prog="bash launch.sh bench cost", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each (default 7)")
    parser.add_argument("--model", nargs="+", default=["nano", "mha", "mla"], choices=("nano", "mha", "mla"))
    asked = parser.parse_args(arguments)
    found = []
    for name in asked.model:
        for recompute in (0, 1):
            numbers = compare(name, recompute, asked.repeats)
            found.append(numbers)
            computed, measured = numbers["computed"], numbers["measured"]
            print(f"{name:5} recompute={recompute}  computed {computed:.3f} s, measured {measured:.3f} s", end="")
            print(
                f"  {computed / measured:.2f}  {numbers['gflop']:.0f} GFLOP, {numbers['gb']:.1f} GB moved", flush=True
            )
    print(json.dumps(found))


def compare(name: str, recompute: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step of one model, computed and measured."""
    config = VL2Config.from_folder(NANO) if name == "nano" else VL2Config.from_dict(model_config(name, "mid"))
    model = apply_lora(init_model(config, IMAGE_ID, seed=0), LoRASettings(groups=GROUPS, rank=8))
    model.set_recompute(recompute)
    model.train()
    data = batch()
    ids, vocabulary = data["input_ids"], config.language.vocab_size
    data["input_ids"] = np.where(ids == IMAGE_ID, IMAGE_ID, 10 + ids % (vocabulary - 10))
    data["labels"] = np.where(data["labels"] < 0, -100, data["labels"] % vocabulary)
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=[p for p in model.factors().values() if not p.stop_gradient])

    def step() -> None:
        loss_sum, count = model.loss(data)
        (loss_sum / count).backward()
        optimizer.step()
        optimizer.clear_grad()

    step()  # warms up
    square, rates, copies, seconds = paddle.randn([2048, 2048]), [], [], []
    for _ in range(repeats):
        rates.append(2 * 2048.0**3 / min(timed(lambda: paddle.matmul(square, square)) for _ in range(2)))
        copies.append(copy_rate())
        seconds.append(timed(step))
    rates_of_machine = max(rates), max(copies), smallest_operation()
    settings = {"rehearse": "false", "device": "cpu", "precision": "fp32", "model.init": "random", "model.path": NANO}
    run = load_config(
        ["conf=sft_tiny", f"lora.groups=[{','.join(GROUPS)}]", f"recompute={recompute}"]
        + [f"{key}={value}" for key, value in settings.items()]
    )
    cost = pack_cost(config, run, on_gpu=False)
    work = cost.of([len(ids)], tiles=len(data["tiles"]), supervised=int((data["labels"] >= 0).sum())) + cost.update
    return {
        "model": name,
        "recompute": recompute,
        "computed": processor(*rates_of_machine).seconds(work),
        "measured": min(seconds),
        "gflop": work.flops / 1e9,
        "gb": work.num_bytes / 1e9,
        "launches": work.launches,
        "rates": rates_of_machine,
    }


def copy_rate() -> float:
    """Bytes a second that a copy reads and writes."""
    source, target = np.ones(2**24, np.float32), np.zeros(2**24, np.float32)
    return 2 * source.nbytes / min(timed(lambda: np.copyto(target, source)) for _ in range(3))


def smallest_operation() -> float:
    """Seconds of an operation on one number, which are those of the host."""
    one = paddle.ones([1])

    def many() -> None:
        for _ in range(1000):
            paddle.add(one, one)

    return min(timed(many) for _ in range(5)) / 1000


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = clock()
    work()
    return clock() - start
