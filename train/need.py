"""How much memory a model takes, from its config alone: weights, and what training adds to them.

These are the bytes that are certain. Activations and caches come to them, and depend on the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from paddle import nn

from train.build import STORED, lora_settings, trained_names
from train.config import TrainConfig
from train.hub import resolve_model
from train.room import check_memory, gigabytes
from vl2.config import VL2Config
from vl2.lora import plan_factors
from vl2.published import published
from vl2.weights import build_model

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Trainable weights, gradients and Adam's two moments, all float32.
TRAINED_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one process."""

    frozen: int  # weights that are only read
    trained: int  # weights that learn, their gradients and Adam's moments

    @property
    def num_bytes(self) -> int:
        """Of both."""
        return self.frozen + self.trained

    def __str__(self) -> str:
        parts = [
            (self.frozen, "of frozen weights"),
            (self.trained, "of trained weights with their gradients and Adam's moments"),
        ]
        return " and ".join(f"{gigabytes(size)} {what}" for size, what in parts if size)


def inference_need(config: VL2Config, dtype: str) -> Need:
    """What loading a model takes.

    Args:
        dtype: stored type of the weights, Paddle's name.
    """
    return Need(frozen=sum(_sizes(build_model(config, 0)).values()) * ITEM_BYTES[dtype], trained=0)


def training_need(model: VL2Config, config: TrainConfig) -> Need:
    """What training a model takes, in each process.

    Raises:
        ValueError: a LoRA group that matches nothing in this model.
    """
    skeleton = build_model(model, 0)
    sizes = _sizes(skeleton)
    if config.lora.rank == 0:
        learned = sum(sizes[name] for name in trained_names(sizes, config.trainable))
        frozen = sum(sizes.values()) - learned
    else:
        frozen = sum(sizes.values())
        learned = sum(report.parameters for report in plan_factors(skeleton, lora_settings(config)))
    return Need(frozen=frozen * ITEM_BYTES[STORED[config.precision]], trained=learned * TRAINED_BYTES)


def check_training(config: TrainConfig, num_processes: int) -> None:
    """Refuse to train what does not fit into memory; a published model even before it is fetched.

    Args:
        num_processes: that share the memory: those of this machine on a CPU, 1 on a GPU.

    Raises:
        ValueError: with the figures and what would need less.
    """
    known = published(config.model.path)
    model = VL2Config.from_folder(known.config.parent if known else resolve_model(config.model.path))
    need = training_need(model, config)
    each = f", in each of {num_processes} processes" if num_processes > 1 else ""
    advice = "use a machine with more, or a smaller model"
    if config.lora.rank == 0:
        advice += ", or train adapters instead of all weights (lora.rank=8)"
    if config.precision == "fp32":
        advice += ", or precision=bf16"
    what = f"training {config.model.path} takes {need}{each}"
    check_memory(need.num_bytes * num_processes, what, advice)


def check_inference(model: str | Path, dtype: str) -> None:
    """Refuse to load what does not fit into memory.

    Args:
        model: folder, or name of a published model.
        dtype: stored type of the weights, Paddle's name.

    Raises:
        ValueError: with the figures and what would need less.
    """
    known = published(model)
    need = inference_need(VL2Config.from_folder(known.config.parent if known else model), dtype)
    advice = "use a machine with more, or a smaller model" + (", or precision=bf16" if dtype == "float32" else "")
    check_memory(need.num_bytes, f"{model} in {dtype} takes {need}", advice)


def _sizes(model: nn.Layer) -> dict[str, int]:
    return {name: math.prod(parameter.shape) for name, parameter in model.named_parameters()}
