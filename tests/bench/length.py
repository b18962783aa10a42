"""Seconds a token of LoRA steps on longer and longer packs, by hand: `bash launch.sh bench length`.

The model of `bench step`, every layer recomputed, on packs of one conversation of 1,024 tokens with its image, of
two, four and eight: all sizes in turns, so that what else the machine does meets all of them. With `--one TOKENS` also
a step on a single conversation of that length. The last line is JSON: seconds a thousand tokens of each size, best of
all turns, by how much the worst size exceeds the best one, peak memory, and seconds of the single conversation.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np

from tests.bench import step
from vl2.lora import VL2LoRAModel


def pack(conversations: int, tokens: int) -> dict[str, np.ndarray]:
    """A pack of so many conversations of `step.batch`, each with other pictures."""
    one = step.batch(tokens)
    rng = np.random.default_rng(conversations)
    tiles = [rng.integers(0, 256, one["tiles"].shape, np.uint8) for _ in range(conversations)]
    return {name: np.concatenate([array] * conversations) for name, array in one.items()} | {
        "tiles": np.concatenate(tiles)
    }


def seconds_of(lora: VL2LoRAModel, data: dict[str, np.ndarray]) -> float:
    """Of one forward and backward; the optimizer's part does not depend on the pack."""
    start = time.perf_counter()
    loss_sum, count = lora.model.loss(data)
    (loss_sum / count).backward()
    taken = time.perf_counter() - start
    for factor in lora.factors().values():
        factor.clear_gradient()
    return taken


def main(arguments: list[str]) -> None:
    """Entry script."""
    parser = argparse.ArgumentParser(prog="bash launch.sh bench length", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("attention", nargs="?", default="mha", choices=("mha", "mla"))
    parser.add_argument("--size", default="mid", choices=step.SIZES, help="of the model (default mid)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a conversation (default 1024)")
    parser.add_argument("--conversations", type=int, nargs="+", default=[1, 2, 4, 8], help="of a pack (1 2 4 8)")
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the best counts (default 3)")
    parser.add_argument("--one", type=int, default=0, help="tokens of a single conversation, after the others")
    asked = parser.parse_args(arguments)
    lora = step.build(asked.attention, asked.size)
    lora.set_recompute(1)
    lora.train()
    packs = {num: pack(num, asked.tokens) for num in asked.conversations}
    best = dict.fromkeys(packs, float("inf"))
    seconds_of(lora, packs[min(packs)])  # warms up
    for _ in range(asked.repeats):
        for num, data in packs.items():
            best[num] = min(best[num], seconds_of(lora, data))
    found: dict[str, float] = {str(num * asked.tokens): 1000 * best[num] / (num * asked.tokens) for num in packs}
    for tokens, seconds in found.items():
        print(f"{tokens:>6} tokens: {seconds:.2f} s a thousand")
    found["excess"] = max(found.values()) / min(found.values()) - 1
    print(f"the worst takes {100 * found['excess']:.0f} % more than the best")
    if asked.one:
        found["one"] = seconds_of(lora, pack(1, asked.one))
        print(f"one conversation of {asked.one} tokens: {found['one']:.1f} s")
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"peak {found['peak_mb']:.0f} MB")
    print(json.dumps(found))
