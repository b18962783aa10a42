"""Which devices this machine has, and whether the installed Paddle can use them; found without importing Paddle."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from train.machine.cards import free_bytes, read_cards, visible_devices
from train.machine.environment import (
    TWO_PADDLES,
    card_listing,
    detect_build,
    driver_problem,
    has_two_paddles,
    installed,
    paddle_wheel,
)
from train.machine.memory import FreeMemory, free_gpu_memory, gigabytes
from vl2.errors import UserError

# CUDA's context, cuBLAS and Paddle's own code take about this much of a card before the first number lies there.
CONTEXT_BYTES = 10**9
# What makes Paddle's kernels for GPUs add up in a fixed order: the backward passes of flash attention, by cuDNN's flag
# (get_num_split in phi/kernels/gpu/flash_attn_grad_kernel.cu), and of the embedding (embedding_grad_kernel.cu).
FIXED_ORDER = {"FLAGS_cudnn_deterministic": True, "FLAGS_embedding_deterministic": 1}
_OTHERWISE = "or give device=cpu to go on without"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Accelerators of this machine, as the probes saw them."""

    gpus: int  # NVIDIA GPUs that nvidia-smi lists; where it does not work, device files: they are there but broken
    driver: str | None = None  # what `nvidia-smi -L` prints; None where it is missing or fails
    gpu_paddle: bool = False  # whether the installed Paddle is a GPU build
    two_paddles: bool = False  # whether a CPU build is installed beside it
    visible: tuple[str, ...] | None = None  # the GPUs that CUDA_VISIBLE_DEVICES leaves; None where it is not set

    @property
    def hidden(self) -> bool:
        """Whether somebody has turned the GPUs off for this process."""
        return self.visible == ()

    @property
    def usable_gpus(self) -> int:
        """GPUs that this process may use, 0 where there is none."""
        return self.gpus if self.visible is None else min(self.gpus, len(self.visible))


def find_machine(
    environ: Mapping[str, str] = os.environ,
    listing: Callable[[], str | None] = card_listing,
    device_files: str = "/dev/nvidia[0-9]*",
) -> Machine:
    """Looks at nvidia-smi, device files and the installed packages; the arguments are for tests.

    A container that may use one of eight cards shows the device files of all eight: they count only where nvidia-smi,
    which lists the one, does not work.
    """
    driver = listing()
    cards = read_cards(driver or "")
    return Machine(
        gpus=len(glob.glob(device_files)) if driver is None else len(cards),
        driver=driver,
        gpu_paddle=installed("paddlepaddle-gpu") is not None,
        two_paddles=has_two_paddles(),
        visible=visible_devices(environ.get("CUDA_VISIBLE_DEVICES"), cards),
    )


def install_line(build: str | None = None) -> str:
    """The command that puts the pinned Paddle for this machine in the place of whatever is there.

    Args:
        build: cpu, cu126 ...; None: the one that fits this machine.
    """
    pip, wheel = f"{sys.executable} -m pip", " ".join(paddle_wheel(build or detect_build()))
    return f"{pip} uninstall -y paddlepaddle paddlepaddle-gpu && {pip} install {wheel}"


def gpu_fault(machine: Machine) -> str | None:
    """Why Paddle cannot use the machine's GPU and the line that mends it; None when it can, or when there is none."""
    if machine.hidden:
        return None
    if not machine.gpus:
        if not machine.gpu_paddle:
            return None
        return (
            "Paddle is a GPU build, but no NVIDIA GPU is to be seen here: start the container with --gpus all, or "
            f"install the CPU build (`{install_line('cpu')}`), {_OTHERWISE}"
        )
    there = f"this machine has {machine.gpus} NVIDIA GPU{'s' if machine.gpus > 1 else ''}"
    if machine.driver is None:
        return f"{there}, but {driver_problem()}, {_OTHERWISE}"
    if not machine.gpu_paddle:
        return f"{there}, but Paddle is a CPU build: `{install_line()}`, {_OTHERWISE}"
    return None


def choose_device(device: str, machine: Machine) -> str:
    """`cpu` or `gpu` for `auto`, `cpu` or `gpu`.

    Raises:
        UserError: two Paddles are installed, a GPU is there but cannot be used, or `gpu` is asked for in vain.
    """
    if machine.two_paddles:
        build = None if machine.gpus else "cpu"
        raise UserError(f"{TWO_PADDLES}: `{install_line(build)}`")
    if device == "cpu":
        return "cpu"
    fault = gpu_fault(machine)
    if fault:
        raise UserError(fault)
    if machine.usable_gpus:
        return "gpu"
    if device == "gpu":
        reason = "CUDA_VISIBLE_DEVICES hides every GPU" if machine.hidden else "no NVIDIA GPU found"
        raise UserError(f"device=gpu, but {reason}: neither /dev/nvidia* nor nvidia-smi shows one; give device=cpu")
    return "cpu"


def use_device(device: str, *, tf32: bool = False, deterministic: bool = False) -> str:
    """Makes `cpu` or `gpu` Paddle's device in this process and returns Paddle's name of it (`cpu`, `gpu:1`).

    Args:
        device: cpu, gpu or auto.
        tf32: whether products of float32 may lose digits on a GPU. The door's NVIDIA_TF32_OVERRIDE=0 forbids it to
            the libraries that do not look at Paddle's switches.
        deterministic: whether a GPU adds gradients up in a fixed order. A CPU always does.

    Raises:
        UserError: Paddle sees no GPU although the machine has one (driver older than the build, container without
            access), or other processes have filled it.
    """
    chosen = choose_device(device, find_machine())
    import paddle

    if chosen == "cpu":
        paddle.set_device("cpu")
        return "cpu"
    index = int(os.environ.get("FLAGS_selected_gpus", "0").split(",")[0])
    check_room(index)
    try:
        count = paddle.device.cuda.device_count()
        if not count:
            raise RuntimeError("it counts 0 GPUs")
        paddle.set_device(f"gpu:{index}")
    except (RuntimeError, OSError, ValueError) as problem:
        first = str(problem).strip().splitlines()[-1]
        raise UserError(
            f"Paddle cannot use this machine's GPU ({first}): update the NVIDIA driver, or install the build that fits "
            f"it (`{install_line()}`), {_OTHERWISE}"
        ) from problem
    allow_tf32(tf32)
    if deterministic:
        paddle.set_flags(FIXED_ORDER)
    return paddle.device.get_device()


def check_room(
    index: int,
    free: Callable[[int], FreeMemory | None] = free_gpu_memory,
    others: Callable[[], Mapping[int, int]] = free_bytes,
) -> None:
    """Refuse a card that other processes have filled, before CUDA fails on it.

    Args:
        index: Paddle's number of the card.
        free: its free memory; for tests.
        others: free memory of all cards; for tests.

    Raises:
        UserError: with the free memory, and the card that has most.
    """
    room = free(index)
    if room is None or room.num_bytes >= CONTEXT_BYTES:
        return
    emptiest, most = max(others().items(), key=lambda card: card[1], default=(0, 0))
    instead = f"take card {emptiest}, with {gigabytes(most)} (CUDA_VISIBLE_DEVICES={emptiest}), "
    raise UserError(
        f"GPU {index} has {gigabytes(room.num_bytes)} free ({room.where}): other processes fill it, nvidia-smi names "
        f"them; end them, {instead if most >= CONTEXT_BYTES else ''}{_OTHERWISE}"
    )


def allow_tf32(allowed: bool) -> None:
    """Whether Paddle's products of float32 may run in TF32, whose 10 bits Ampere and later cards take by default."""
    from paddle.base import core  # no public name sets it

    core.set_cublas_switch(allowed)
    core.set_cudnn_switch(allowed)


def check_precision(dtype: str) -> None:
    """Refuse bfloat16 on a card that has no products in it (V100, T4), before anything is loaded.

    Args:
        dtype: to compute in.

    Raises:
        UserError: naming the precision that the card has.
    """
    import paddle

    if dtype != "bfloat16" or not paddle.get_device().startswith("gpu"):
        return
    major, minor = paddle.device.cuda.get_device_capability()
    if major < 8:
        raise UserError(
            f"this GPU ({paddle.device.cuda.get_device_name()}) has compute capability {major}.{minor}, and bfloat16 "
            "needs 8.0 (Ampere) or later: give precision=fp16"
        )


def physical_cores() -> int:
    """Cores this process may use: hyper-threads of one core count once, a container's CPU quota caps."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(topology.read_text().strip() if topology.exists() else str(cpu))
    return max(1, min(len(siblings), _cpu_quota() or len(siblings)))


def _cpu_quota() -> int | None:
    """The CPUs that the control group grants, None for no limit."""
    limit = Path("/sys/fs/cgroup/cpu.max")
    if not limit.exists():
        return None
    quota, period = limit.read_text().split()
    return None if quota == "max" else max(1, round(int(quota) / int(period)))
