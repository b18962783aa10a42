"""How much memory a model takes to answer, from its config alone: its weights; caches come to them.

What training takes, `train.run.memory` says.
"""

from __future__ import annotations

import math
from pathlib import Path

from paddle import nn

from train.machine.memory import check_memory, gigabytes
from vl2.config import LanguageConfig, VL2Config
from vl2.dtypes import item_bytes
from vl2.parameters import build_model


def inference_memory(config: VL2Config, dtype: str) -> int:
    """Bytes that a loaded model takes.

    Args:
        dtype: stored type of the weights.
    """
    return sum(weight_sizes(build_model(config, 0)).values()) * item_bytes(dtype)


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
    check_memory(need, f"{model} in {dtype} takes {gigabytes(need)} of weights", advice)


def cached_numbers(language: LanguageConfig) -> int:
    """How many numbers are kept of a token while an answer grows: of MLA its compressed row, else keys and values."""
    if language.use_mla:
        width = (language.kv_lora_rank or 0) + language.qk_rope_head_dim
    else:
        width = 2 * language.num_key_value_heads * language.head_dim
    return language.num_hidden_layers * width


def weight_sizes(model: nn.Layer) -> dict[str, int]:
    """How many numbers each weight of a model has, by its path."""
    return {name: math.prod(parameter.shape) for name, parameter in model.named_parameters()}
