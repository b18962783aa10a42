"""The NVIDIA cards of this machine as nvidia-smi lists them, which of them CUDA_VISIBLE_DEVICES leaves, and their room.

Found without importing Paddle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from train.machine.environment import nvidia_smi

_CARD = re.compile(r"^GPU (\d+): (.+?) \(UUID: (GPU-[\w-]+)\)", re.MULTILINE)
_INSTANCE = re.compile(r"^ +MIG .*\(UUID: (MIG-[\w/-]+)\)")


@dataclass(frozen=True, kw_only=True)
class Card:
    """One line of `nvidia-smi -L`, and the lines of the instances that the card is cut into."""

    index: int  # in the order of the bus, as nvidia-smi counts
    name: str
    uuid: str  # GPU-...
    instances: tuple[str, ...] = ()  # MIG-..., where the card is cut up


def read_cards(listing: str) -> tuple[Card, ...]:
    """The cards in what `nvidia-smi -L` prints.

    GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-...)
      MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-...)
    """
    cards = []
    for block in re.split(r"^(?=GPU \d+: )", listing, flags=re.MULTILINE):
        if found := _CARD.match(block):
            instances = tuple(line[1] for text in block.splitlines() if (line := _INSTANCE.match(text)))
            cards.append(Card(index=int(found[1]), name=found[2], uuid=found[3], instances=instances))
    return tuple(cards)


def visible_devices(value: str | None, cards: Sequence[Card]) -> tuple[str, ...] | None:
    """What CUDA_VISIBLE_DEVICES leaves, as CUDA reads it: up to the first name that no card has.

        None    -> None: all of them        "0,1"       -> ("0", "1")
        "", -1  -> (): none                 "0,9,1"     -> ("0",) with two cards
                                            "GPU-5d5b"  -> ("GPU-5d5b",): the beginning of a UUID will do

    Args:
        value: of the variable, None where it is not set.
        cards: of the machine; none: nvidia-smi does not tell, and names are believed.
    """
    if value is None:
        return None
    numbers = {str(card.index) for card in cards}
    names = [name for card in cards for name in (card.uuid, *card.instances)]
    left: list[str] = []
    for name in (text.strip() for text in value.split(",")):
        if name.isdigit():
            known = not cards or name.lstrip("0").rjust(1, "0") in numbers
        else:
            known = name.startswith(("GPU-", "MIG-")) and (not cards or _begins(names, name))
        if not known:
            break
        left.append(name)
    return tuple(left)


def _begins(names: Sequence[str], name: str) -> bool:
    """Whether a device's name begins like this; MIG-GPU-.../7/0 is what older drivers call an instance."""
    return any(known.startswith(name) for known in names) or name.startswith("MIG-GPU-")


def free_bytes(smi: Callable[..., str | None] = nvidia_smi) -> dict[int, int]:
    """Free memory of each card by its index; empty where nvidia-smi does not tell."""
    said = smi("--query-gpu=index,memory.free", "--format=csv,noheader,nounits") or ""
    return {int(index): int(free) * 2**20 for index, free in re.findall(r"^(\d+), (\d+)$", said, re.MULTILINE)}
