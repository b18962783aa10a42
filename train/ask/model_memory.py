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
from vl2.quantised import kept_in, quantised_bytes


def inference_memory(config: VL2Config, dtype: str, frozen: str = "none") -> int:
    """Bytes that a loaded model takes.

    Args:
        dtype: stored type of the weights.
        frozen: what the language model's matrices are kept in, see vl2.quantised.
    """
    return sum(weight_bytes(build_model(config, 0), dtype, frozen).values())


def check_inference(model: str | Path, config: VL2Config, dtype: str, frozen: str = "none") -> None:
    """Refuse to load what does not fit into memory.

    Args:
        model: its name, for the error.
        config: what is in it.
        dtype: stored type of the weights.
        frozen: what the language model's matrices are kept in.

    Raises:
        UserError: with the figures and what would need less.
    """
    need = inference_memory(config, dtype, frozen)
    advice = "use a machine with more, or a smaller model" + (", or precision=bf16" if dtype == "float32" else "")
    advice += "" if frozen == "nf4" else ", or frozen=nf4"
    kinds = dtype if frozen == "none" else f"{dtype} and {frozen}"
    check_memory(need, f"{model} in {kinds} takes {gigabytes(need)} of weights", advice)


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


def weight_bytes(model: nn.Layer, dtype: str, frozen: str) -> dict[str, int]:
    """Bytes that each weight of a model takes while it is frozen, by its path.

    Args:
        model: with or without memory for its weights, and without adapters.
        dtype: stored type of the weights.
        frozen: what the language model's matrices are kept in; "none": as the others.
    """
    return {
        name: math.prod(parameter.shape) * item_bytes(dtype)
        if (kind := kept_in(name, frozen)) == "none"
        else quantised_bytes(kind, parameter.shape)
        for name, parameter in model.named_parameters()
    }
