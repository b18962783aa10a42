"""An adapter on disk: the factors as safetensors under PaddleNLP's names, and lora_config.json.

The reader is our own and strict: PaddleNLP's accepts a half-missing, wrongly shaped adapter without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import paddle
from paddle import nn

from vl2.lora import LoRASettings, VL2LoRAModel, apply_lora
from vl2.weights import read_header, write_safetensors

ADAPTER_FILE = "peft_model.safetensors"
ADAPTER_CONFIG = "lora_config.json"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What lora_config.json says."""

    settings: LoRASettings  # groups, ranks, scaling
    metadata: Mapping[str, Any]  # of the run that made it: base, base_fingerprint, rehearsal, ...


def save_adapter(lora_model: VL2LoRAModel, folder: str | Path, metadata: Mapping[str, Any]) -> None:
    """Write the factors and lora_config.json into an existing folder.

    Args:
        lora_model: its factors are written in float32.
        folder: not made safe against interruption here, see train.checkpoint.
        metadata: JSON values to find again in `AdapterConfig.metadata`.
    """
    folder = Path(folder)
    factors = {name: p.numpy() for name, p in lora_model.factors().items()}
    write_safetensors(folder / ADAPTER_FILE, factors, dict.fromkeys(factors, "float32"))
    document = {
        **lora_model.lora_config.to_dict(),  # what PaddleNLP reads
        "scaling": lora_model.lora_config.scaling,
        "vl2": {"settings": asdict(lora_model.settings), "metadata": dict(metadata)},
    }
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """Read lora_config.json.

    Raises:
        ValueError: when it is missing, or was not written by `save_adapter`.
    """
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no {ADAPTER_CONFIG} there; expected the folder of an adapter")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        entry = document["vl2"]
        settings = LoRASettings(**{**entry["settings"], "groups": tuple(entry["settings"]["groups"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the configuration of an adapter made here ({error!r})") from error
    return AdapterConfig(settings=settings, metadata=entry["metadata"])


def load_factors(lora_model: VL2LoRAModel, folder: str | Path) -> None:
    """Set all factors of a model from an adapter; nothing is changed unless every name and shape fits.

    Raises:
        ValueError: listing the missing, unknown and wrongly shaped names.
    """
    path = Path(folder) / ADAPTER_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {ADAPTER_FILE} there")
    stored, factors = read_header(path)[0], lora_model.factors()
    wrong = [
        f"{name} is {list(stored[name].shape)}, expected {list(p.shape)}"
        for name, p in factors.items()
        if name in stored and list(stored[name].shape) != list(p.shape)
    ]
    missing = [name for name in factors if name not in stored]
    unknown = [name for name in stored if name not in factors]
    lines = [
        f"  {title} ({len(names)}): {'; '.join(names[:10])}" + (" ..." if len(names) > 10 else "")
        for title, names in (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
        if names
    ]
    if lines:
        raise ValueError("\n".join([f"{path}: the adapter does not fit the model and its LoRA groups", *lines]))
    for name, parameter in factors.items():
        parameter.set_value(paddle.to_tensor(stored[name].read()).astype("float32"))


def load_adapter(model: nn.Layer, folder: str | Path, *, base_fingerprint: str | None = None) -> VL2LoRAModel:
    """Put an adapter on its base model.

    Args:
        model: a DeepseekVL2, changed in place.
        folder: of the adapter.
        base_fingerprint: of `model`; compared with the adapter's when given.

    Raises:
        ValueError: when the adapter was trained on another base, or does not fit.
    """
    config = read_adapter_config(folder)
    expected = config.metadata.get("base_fingerprint")
    if base_fingerprint is not None and expected is not None and base_fingerprint != expected:
        raise ValueError(
            f"{folder}: this adapter was trained on another base model ({config.metadata.get('base')}, fingerprint "
            f"{expected[:12]}; the model given has {base_fingerprint[:12]})"
        )
    lora_model = apply_lora(model, config.settings)
    load_factors(lora_model, folder)
    lora_model.eval()
    return lora_model
