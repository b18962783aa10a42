"""Free memory of this machine, RAM and GPU, and the refusal of what does not fit, with both figures.

Asked before anything is loaded or written. Knows nothing of models: `train.ask.model_memory` says what one takes.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from train.machine.environment import nvidia_smi
from vl2.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FreeMemory:
    """Memory that can still be had."""

    num_bytes: int
    where: str  # in words, for messages


def check_memory(
    num_bytes: int, what: str, advice: str, free: FreeMemory | None = None, *, estimated: bool = False
) -> None:
    """Refuse to load what does not fit into memory.

    Args:
        num_bytes: needed at the least.
        what: what needs them, figures included.
        advice: what would need less.
        free: what can be had; None: look at this process's device.
        estimated: the bytes are not certain.

    Raises:
        UserError: with the bytes needed and the bytes available.
    """
    free = free or find_free_memory()
    if free is not None and num_bytes > free.num_bytes:
        raise UserError(
            f"no room in memory: {what}, {gigabytes(num_bytes)} {'in all' if estimated else 'at the least'}, and "
            f"{gigabytes(free.num_bytes)} are available ({free.where}); {advice}"
        )


def gigabytes(num_bytes: float) -> str:
    """Bytes in words: 10^9 bytes are a GB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def find_free_memory() -> FreeMemory | None:
    """Memory of Paddle's current device that can still be had; None where the system does not tell."""
    import paddle

    kind, _, index = paddle.get_device().partition(":")
    return free_gpu_memory(int(index)) if kind == "gpu" else free_ram()


def free_gpu_memory(
    index: int,
    environ: Mapping[str, str] = os.environ,
    smi: Callable[..., str | None] = nvidia_smi,
) -> FreeMemory | None:
    """Free memory of one GPU.

    Args:
        index: Paddle's number of it, which counts those that CUDA_VISIBLE_DEVICES leaves.
        environ: for tests.
        smi: runs nvidia-smi; for tests.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    listed = [name.strip() for name in visible.split(",")] if visible else []
    name = listed[index] if index < len(listed) else str(index)
    free = re.match(r"\d+", smi("-i", name, "--query-gpu=memory.free", "--format=csv,noheader,nounits") or "")
    return FreeMemory(num_bytes=int(free[0]) * 2**20, where=f"GPU {name}, by nvidia-smi") if free else None


def free_ram(root: Path = Path("/")) -> FreeMemory | None:
    """Available RAM: what the system has, or what the control groups of this process leave when that is less.

    Args:
        root: of the file system, for tests.
    """
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:  # not Linux
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    limits = [FreeMemory(num_bytes=int(found[1]) * 1024, where="RAM, MemAvailable")] if found else []
    return min([*limits, *_control_groups(root)], key=lambda free: free.num_bytes, default=None)


def _control_groups(root: Path) -> list[FreeMemory]:
    """What each limited control group of this process, and each above it, still grants."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            base, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, cache = root / "sys/fs/cgroup/memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inside = Path(path.strip("/"))
        for folder in (inside, *inside.parents):
            granted, used = _number(base / folder / limit), _number(base / folder / usage)
            if granted is not None and used is not None:
                # Pages of files that nobody uses go when memory is wanted.
                freed = _number(base / folder / "memory.stat", cache) or 0
                left = max(granted - used + freed, 0)
                limits.append(FreeMemory(num_bytes=left, where=f"RAM, limit {gigabytes(granted)} of the container"))
    return limits


def _number(file: Path, name: str | None = None) -> int | None:
    """The number in a file, or the one after `name`; None where there is none ("max")."""
    try:
        text = file.read_text()
    except OSError:
        return None
    found = re.search(rf"^{name} (\d+)" if name else r"^(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else None


def peak_memory_gb() -> float:
    """Most memory this process has held so far, in GB (10^9 bytes): its GPU's, or its resident set on CPU."""
    import paddle

    if paddle.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
