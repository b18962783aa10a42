"""Which devices this machine has, and whether the installed Paddle can use them; found without importing Paddle."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from train.machine.environment import detect_build, driver_report, installed, paddle_wheel
from vl2.errors import UserError

_BUS_ID = re.compile(r"\b[0-9A-F]{8}:[0-9A-F]{2}:[0-9A-F]{2}\.[0-9A-F]\b")  # nvidia-smi's table has one a GPU


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Accelerators of this machine, as the probes saw them."""

    gpus: int  # NVIDIA GPUs that are there, whether or not they work
    driver: str | None = None  # what nvidia-smi prints; None where it is missing or fails
    gpu_paddle: bool = False  # whether the installed Paddle is a GPU build
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
    report: Callable[[], str | None] = driver_report,
    device_files: str = "/dev/nvidia[0-9]*",
) -> Machine:
    """Looks at device files, nvidia-smi and the installed packages; the arguments are for tests."""
    driver = report()
    listed = len(_BUS_ID.findall(driver or ""))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return Machine(
        gpus=max(len(glob.glob(device_files)), listed),
        driver=driver,
        gpu_paddle=installed("paddlepaddle-gpu") is not None,
        visible=None if visible is None else tuple(v for v in visible.split(",") if v.strip() not in ("", "-1")),
    )


def gpu_install_line(build: str | None = None) -> str:
    """The command that puts the pinned GPU Paddle in the place of a CPU one."""
    wheel = " ".join(paddle_wheel(build or detect_build()))
    return f"{sys.executable} -m pip uninstall -y paddlepaddle && {sys.executable} -m pip install {wheel}"


def gpu_fault(machine: Machine) -> str | None:
    """Why Paddle cannot use the machine's GPU and the line that mends it; None when it can, or when there is none."""
    if not machine.gpus or machine.hidden:
        return None
    there = f"this machine has {machine.gpus} NVIDIA GPU{'s' if machine.gpus > 1 else ''}"
    otherwise = "or give device=cpu to go on without"
    if machine.driver is None:
        return f"{there}, but nvidia-smi is missing or fails: install or reload the NVIDIA driver, {otherwise}"
    if not machine.gpu_paddle:
        return f"{there}, but Paddle is a CPU build: `{gpu_install_line()}`, {otherwise}"
    return None


def choose_device(device: str, machine: Machine) -> str:
    """`cpu` or `gpu` for `auto`, `cpu` or `gpu`.

    Raises:
        UserError: a GPU is there but cannot be used, or `gpu` is asked for and there is none.
    """
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


def use_device(device: str) -> str:
    """Makes `cpu` or `gpu` Paddle's device in this process and returns Paddle's name of it (`cpu`, `gpu:1`).

    Raises:
        UserError: Paddle sees no GPU although the machine has one (driver older than the build, container without
            access).
    """
    chosen = choose_device(device, find_machine())
    import paddle

    if chosen == "cpu":
        paddle.set_device("cpu")
        return "cpu"
    try:
        count = paddle.device.cuda.device_count()
        if not count:
            raise RuntimeError("it counts 0 GPUs")
        paddle.set_device(f"gpu:{os.environ.get('FLAGS_selected_gpus', '0').split(',')[0]}")
    except (RuntimeError, OSError, ValueError) as problem:
        first = str(problem).strip().splitlines()[-1]
        raise UserError(
            f"Paddle cannot use this machine's GPU ({first}): update the NVIDIA driver, or install the build that fits "
            f"it (`{gpu_install_line()}`), or give device=cpu to go on without"
        ) from problem
    return paddle.device.get_device()


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
