"""Prints how many packs mixed samples take, how full they are, and how long planning and measuring take.

By hand: `bash launch.sh bench packing`.
"""

from __future__ import annotations

import argparse
import math
import time

from data.measure import measure
from data.plan import make_plan
from data.record import Record
from tests.data.test_plan import CANDIDATES, mixed_sizes
from tests.places import NANO_BPE
from vl2.prompt import Message
from vl2.tokenizer import Tokenizer

MAX_TOKENS = 4096


def main(arguments: list[str]) -> None:
    """Entry script: prints one line a case."""
    parser = argparse.ArgumentParser(
        prog="bash launch.sh bench packing", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[2_000, 100_000], help="how many are packed")
    parser.add_argument("--records", type=int, default=10_000, help="how many are measured")
    asked = parser.parse_args(arguments)
    print(
        f"{'samples':>8} {'max_tiles_per_pack':>18} {'packs':>6} {'least':>6} {'ratio':>6} {'fill':>6} {'seconds':>8}"
    )
    for count in asked.samples:
        sizes = mixed_sizes(count, seed=0)
        least = math.ceil(sum(size.tokens for size in sizes) / MAX_TOKENS)
        for max_tiles in (32, 20):
            start = time.perf_counter()
            plan = make_plan(
                sizes, max_tokens=MAX_TOKENS, max_tiles_per_pack=max_tiles, packs_per_step=8, epochs=1, seed=0
            )
            seconds = time.perf_counter() - start
            columns = f"{count:>8} {max_tiles:>18} {plan.num_packs:>6} {least:>6}"
            print(f"{columns} {plan.num_packs / least:>6.4f} {plan.fill:>6.4f} {seconds:>8.2f}")

    messages = (Message("user", "What is it? " * 30), Message("assistant", "A mixture of experts. " * 30))
    records = [Record(messages=messages, images=(), source="bench", row=i) for i in range(asked.records)]
    for workers in (1, None):
        start = time.perf_counter()
        sizes_or_none = measure(records, Tokenizer.from_folder(NANO_BPE), CANDIDATES, workers=workers)
        seconds = time.perf_counter() - start
        tokens = sum(size.tokens for size in sizes_or_none if size)
        print(
            f"measuring {asked.records} records of {tokens // asked.records} tokens, workers={workers}: {seconds:.2f} s"
        )
