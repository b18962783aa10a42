"""Sums numbers over processes as a training step does, for `doctor`: whether the cards of a machine reach each other.

Run by the launcher: `python -m train.door.ranks DEVICE ... python -m train.door.cli train.door.exchange DEVICE`.
"""

from __future__ import annotations

import time

import paddle
import paddle.distributed as dist

from train.machine.devices import use_device

_NUMBERS = 2**24  # 64 MB of float32


def main(arguments: list[str]) -> int:
    """Entry script: 0 the sum is right in every process, 1 it is not."""
    device = use_device(arguments[0])
    dist.init_parallel_env()
    ranks = dist.get_world_size()
    numbers = paddle.full([_NUMBERS], float(dist.get_rank() + 1))
    started = time.perf_counter()
    dist.all_reduce(numbers)
    right = bool((numbers == ranks * (ranks + 1) / 2).all())
    if dist.get_rank() == 0:
        rate = _NUMBERS * 4 / (time.perf_counter() - started) / 1e9
        print(f"{ranks} processes, {device.partition(':')[0]}: 64 MB at {rate:.2f} GB/s, the first time", flush=True)
    return 0 if right else 1
