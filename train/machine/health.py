"""What `doctor` finds of driver, cards, memory and disk: a line each, and an exit code for what must be mended.

Found without importing Paddle, which may be what is broken.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from train.machine.cards import Card, free_bytes, read_cards
from train.machine.devices import CONTEXT_BYTES, Machine, choose_device
from train.machine.disk import NCCL_SHARED_BYTES, shared_memory_room
from train.machine.environment import OldDriverError, driver_problem, driver_report, installed, nvidia_smi, paddle_build
from train.machine.memory import free_ram, gigabytes
from vl2.errors import UserError

DRIVER, PADDLE, CARD, COMPUTING = 3, 4, 5, 6  # exit codes: what is at fault
# Of DeepSeek-VL2-Tiny, the smallest of the published models.
_TINY_BYTES = 6_741_002_880


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line about one thing."""

    part: str
    words: str
    code: int = 0  # exit code of a fault, 0 of what is right
    note: bool = False  # no fault, but something to know

    def __str__(self) -> str:
        mark = f"FAULT {self.code}" if self.code else "note" if self.note else "ok"
        return f"{mark:8} {self.part:14} {self.words}"


def look_at_machine(
    machine: Machine,
    device: str,
    environ: Mapping[str, str] = os.environ,
    smi: Callable[..., str | None] = nvidia_smi,
    report: Callable[[], str | None] = driver_report,
) -> list[Finding]:
    """Driver, cards, Paddle, memory and disk.

    Args:
        machine: from `find_machine`.
        device: that was asked for.
        environ: whose CUDA_VISIBLE_DEVICES to tell of; for tests.
        smi: runs nvidia-smi; for tests.
        report: the table of nvidia-smi; for tests.
    """
    cards = read_cards(machine.driver or "")
    found = [_driver(machine, smi, report), *_cards(machine, cards, smi), *_visible(machine, environ)]
    if found[0].code == 0:  # a fault of the driver is said once
        found.append(_paddle(machine, device))
    if ram := free_ram():
        found.append(Finding(part="memory", words=f"{gigabytes(ram.num_bytes)} available ({ram.where})"))
    return [*found, *_shared_memory(machine), *_disk(environ)]


def _driver(machine: Machine, smi: Callable[..., str | None], report: Callable[[], str | None]) -> Finding:
    if machine.driver is None:
        if machine.gpus:
            return Finding(part="driver", words=f"{machine.gpus} device files, but {driver_problem()}", code=DRIVER)
        return Finding(part="driver", words="no NVIDIA GPU, and no driver: all that follows is about the CPU")
    table = report() or ""
    try:
        build = paddle_build(table, smi("--query-gpu=compute_cap", "--format=csv,noheader"))
    except OldDriverError as problem:
        return Finding(part="driver", words=str(problem), code=DRIVER)
    version = re.search(r"Driver Version:\s*(\S+)\s+CUDA Version:\s*(\S+)", table)
    told = f"{version[1]}, runs CUDA {version[2]}" if version else "works"
    return Finding(part="driver", words=f"{told}; the build of Paddle for it is {build}")


def _cards(machine: Machine, cards: tuple[Card, ...], smi: Callable[..., str | None]) -> list[Finding]:
    query = "--query-gpu=index,compute_cap,memory.total"
    told = re.findall(r"^(\d+), ([\d.]+), (\d+)$", smi(query, "--format=csv,noheader,nounits") or "", re.MULTILINE)
    facts = {int(index): (capability, int(total) * 2**20) for index, capability, total in told}
    free, found = free_bytes(smi), []
    for card in cards:
        words, note = f"GPU {card.index}: {card.name}", False
        if card.index in facts:
            capability, total = facts[card.index]
            words += (
                f", compute capability {capability}, {gigabytes(free.get(card.index, 0))} of {gigabytes(total)} free"
            )
            if float(capability) < 8:
                words, note = f"{words}; it has no bfloat16: give precision=fp16", True
        if card.instances:
            words += f"; cut into {len(card.instances)} instances: CUDA_VISIBLE_DEVICES={card.instances[0]} takes one"
        busy = _is_used(machine, card) and free.get(card.index, CONTEXT_BYTES) < CONTEXT_BYTES
        if busy and not card.instances:
            others = ",".join(str(other.index) for other in cards if free.get(other.index, 0) >= CONTEXT_BYTES)
            leave = f", or leave it out with CUDA_VISIBLE_DEVICES={others}" if others else ""
            words += f"; other processes fill it (nvidia-smi names them): end them{leave}"
        found.append(Finding(part="card", words=words, code=CARD if busy and not card.instances else 0, note=note))
    return found


def _is_used(machine: Machine, card: Card) -> bool:
    """Whether a run would take the card."""
    names = (card.uuid, *card.instances)
    return machine.visible is None or any(
        name == str(card.index) or any(known.startswith(name) for known in names) for name in machine.visible
    )


def _visible(machine: Machine, environ: Mapping[str, str]) -> list[Finding]:
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is None or machine.visible is None:
        return []
    said = f"CUDA_VISIBLE_DEVICES={value}"
    if machine.hidden:
        return [Finding(part="visible", words=f"{said} hides every GPU; unset it to take them", note=True)]
    typed = [name.strip() for name in value.split(",")]
    if ignored := typed[len(machine.visible) :]:
        left = ",".join(machine.visible)
        return [
            Finding(part="visible", words=f"{said}: no card is called {ignored[0]}, CUDA reads up to {left}", note=True)
        ]
    return [Finding(part="visible", words=f"{said}: {machine.usable_gpus} of {machine.gpus} cards")]


def _paddle(machine: Machine, device: str) -> Finding:
    build = "paddlepaddle-gpu" if machine.gpu_paddle else "paddlepaddle"
    try:
        chosen = choose_device(device, machine)
    except UserError as problem:
        return Finding(part="paddle", words=str(problem), code=PADDLE)
    return Finding(part="paddle", words=f"{build} {installed(build)}; runs take the {chosen.upper()}")


def _shared_memory(machine: Machine) -> list[Finding]:
    room = shared_memory_room()
    if room is None:
        return []
    little = machine.usable_gpus > 1 and room < NCCL_SHARED_BYTES
    advice = ": several GPUs talk without it, slower; start the container with --shm-size=1g" if little else ""
    return [Finding(part="shared memory", words=f"/dev/shm has {gigabytes(room)} free{advice}", note=little)]


def _disk(environ: Mapping[str, str]) -> list[Finding]:
    cache = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    places, found = {"here": Path.cwd(), "cache of the hub": cache}, []
    for what, place in places.items():
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        little = free < _TINY_BYTES
        advice = f", less than Tiny's {gigabytes(_TINY_BYTES)}" if little else ""
        found.append(Finding(part="disk", words=f"{what} ({place}): {gigabytes(free)} free{advice}", note=little))
    return found
