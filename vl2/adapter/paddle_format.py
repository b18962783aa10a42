"""lora_config.json of PaddleNLP: what it says of each module, and ours in its words.

Source: paddlenlp.peft (LoRAConfig, LoRAModel.from_pretrained) of 3.0.0b4, which reads safetensors only through an index
and only with the format "np"; PaddleMIX names the modules of DeepSeek-VL2 as the official code does. One rank and one
alpha for all modules: a smaller rank is filled up with zeros, another scaling goes into B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from paddlenlp.peft import LoRAConfig

from vl2.adapter.foreign import Declaration, Names
from vl2.adapter.formats import PADDLE_CONFIG, PADDLE_SHARD
from vl2.adapter.module_patterns import Expression, matched
from vl2.adapter.peft_format import number, official_pattern
from vl2.adapter.values import alpha, dropout, flag, rank, refuse, texts
from vl2.json_object import read_json_object
from vl2.lora_settings import LoRASettings

PADDLE_NAMES = Names(lambda module, letter: f"{module}.lora_{letter}", transposed=False)

# Keys that do not change what a trained adapter computes.
_WITHOUT_EFFECT = {
    *("base_model_name_or_path", "dtype", "head_dim", "lora_plus_scale", "merge_weights", "scaling", "use_quick_lora"),
}
_READ = {
    *("r", "lora_alpha", "lora_dropout", "rslora", "target_modules", "tensor_parallel_degree", "trainable_modules"),
}


def common_settings(settings: LoRASettings) -> LoRASettings:
    """The nearest settings with one rank and one alpha: those of a group of the largest rank."""
    largest = max(settings.groups, key=settings.rank_of)
    return LoRASettings(
        groups=settings.groups,
        rank=settings.rank_of(largest),
        alpha=settings.alpha_of(largest),
        dropout=settings.dropout,
        rslora=settings.rslora,
    )


def paddle_config(settings: LoRASettings, base: str, whole: Sequence[str] = ()) -> dict[str, Any]:
    """lora_config.json for these settings, which must have one rank and one alpha.

    Args:
        settings: from `common_settings`.
        base: name or folder of the base model.
        whole: paths of the parameters that the adapter holds whole, but for the two rows, which always are.
    """
    config = LoRAConfig(
        r=settings.rank,
        lora_alpha=number(settings.alpha),  # type: ignore[arg-type]  # annotated int, used as a number
        lora_dropout=settings.dropout,
        target_modules=[official_pattern(group) for group in settings.groups],
        rslora=settings.rslora,
        trainable_modules=[re.escape(path) for path in whole] or None,
        # PaddleMIX loads the base in this type to merge; in bfloat16 most of the addition would be lost.
        dtype="float32",
        base_model_name_or_path=base,
    )
    return {**config.to_dict(), "scaling": config.scaling}


def paddle_index(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The index that PaddleNLP looks for, with all tensors in one shard."""
    size = sum(array.nbytes for array in tensors.values())
    return {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(tensors, PADDLE_SHARD)}


def read_paddle_config(folder: Path, modules: Sequence[str], parameters: Sequence[str]) -> Declaration:
    """Read lora_config.json.

    Args:
        folder: of the adapter.
        modules: official names of the base's Linears.
        parameters: paths of the parameters that an adapter may hold whole.

    Raises:
        UserError: another method than plain LoRA, or a value that cannot be; names the key.
    """
    path = folder / PADDLE_CONFIG
    document = read_json_object(path)
    if (degree := document.get("tensor_parallel_degree")) not in (None, -1, 0, 1):
        refuse(path, "tensor_parallel_degree", degree, "merge its parts first")
    for key, value in document.items():
        if key not in _READ and key not in _WITHOUT_EFFECT and value:
            refuse(path, key, value)
    targets = document.get("target_modules")
    listed = [targets] if isinstance(targets, str) else targets
    patterns = texts(path, "target_modules", listed, "a list of regular expressions")
    found = matched(path, [Expression("target_modules", pattern) for pattern in patterns], modules)
    wholes = texts(path, "trainable_modules", document.get("trainable_modules") or [], "a list of regular expressions")
    whole = matched(path, [Expression("trainable_modules", pattern) for pattern in wholes], parameters)
    for pattern, names in zip(wholes, whole, strict=True):
        if not names:
            refuse(path, "trainable_modules", [pattern], "no weight of this model has such a name")
    return Declaration(
        path=path,
        targets=frozenset().union(*found),
        ranks={},
        alphas={},
        rank=rank(path, "r", document.get("r")),
        alpha=alpha(path, "lora_alpha", document.get("lora_alpha")),
        dropout=dropout(path, "lora_dropout", document.get("lora_dropout")),
        rslora=flag(path, "rslora", document.get("rslora")),
        whole=frozenset().union(*whole),
    )
