"""How much memory a model takes, from its config alone: weights, and what training adds to them.

These are the bytes that are certain. Activations and caches come to them, and depend on the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from paddle import nn

from train.machine.memory import check_memory, gigabytes
from vl2.config import VL2Config
from vl2.dtypes import item_bytes
from vl2.parameters import build_model


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes that a model takes in one process, before activations."""

    frozen: int  # weights that are only read
    trained: int  # weights that learn, their gradients and Adam's moments
    exchanged: int = 0  # copies of gradients on their way to the other processes

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it together."""
        return self.frozen + self.trained + self.exchanged

    def __str__(self) -> str:
        parts = [
            (self.frozen, "of frozen weights"),
            (self.trained, "of trained weights with their gradients and Adam's moments"),
            (self.exchanged, "of gradients on their way to the other processes"),
        ]
        return " and ".join(f"{gigabytes(size)} {what}" for size, what in parts if size)


def inference_memory(config: VL2Config, dtype: str) -> MemoryNeed:
    """Memory that loading a model takes.

    Args:
        dtype: stored type of the weights.
    """
    return MemoryNeed(frozen=sum(weight_sizes(build_model(config, 0)).values()) * item_bytes(dtype), trained=0)


def check_inference(model: str | Path, config: VL2Config, dtype: str) -> None:
    """Refuse to load what does not fit into memory.

    Args:
        model: its name, for the error.
        config: what is in it.
        dtype: stored type of the weights.

    Raises:
        UserError: with the figures and what would need less.
    """
    need = inference_memory(config, dtype)
    advice = "use a machine with more, or a smaller model" + (", or precision=bf16" if dtype == "float32" else "")
    check_memory(need.num_bytes, f"{model} in {dtype} takes {need}", advice)


def weight_sizes(model: nn.Layer) -> dict[str, int]:
    """How many numbers each weight of a model has, by its path."""
    return {name: math.prod(parameter.shape) for name, parameter in model.named_parameters()}
