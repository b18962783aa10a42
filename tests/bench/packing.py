"""Prints how many packs mixed samples take, how full they are, and how long planning takes.

By hand: `bash launch.sh bench packing`.
"""

from __future__ import annotations

import argparse
import math
import time

from data.plan import make_plan
from data.sizes import Sizes
from tests.data.test_plan import mixed_sizes

MAX_TOKENS = 4096


def main(arguments: list[str]) -> None:
    """Entry script: prints one line a case."""
    parser = argparse.ArgumentParser(
        prog="bash launch.sh bench packing", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[2_000, 100_000], help="how many are packed")
    asked = parser.parse_args(arguments)
    print(
        f"{'samples':>8} {'max_tiles_per_pack':>18} {'packs':>6} {'least':>6} {'ratio':>6} {'fill':>6} {'seconds':>8}"
    )
    for count in asked.samples:
        sizes = Sizes.of(mixed_sizes(count, seed=0))
        least = math.ceil(int(sizes.tokens.sum()) / MAX_TOKENS)
        for max_tiles in (32, 20):
            start = time.perf_counter()
            plan = make_plan(
                sizes, max_tokens=MAX_TOKENS, max_tiles_per_pack=max_tiles, packs_per_step=8, epochs=1, seed=0
            )
            seconds = time.perf_counter() - start
            columns = f"{count:>8} {max_tiles:>18} {plan.num_packs:>6} {least:>6}"
            print(f"{columns} {plan.num_packs / least:>6.4f} {plan.fill:>6.4f} {seconds:>8.2f}")
