"""What a run is, as far as resuming it must not change: base model, tokenizer, precision, what trains, and the plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import paddle
from paddle import nn

from data.plan import Plan
from train.config import TrainConfig
from vl2.tokenizer import Tokenizer
from vl2.weights import StoredModel

_PROBES = 64  # numbers taken of each weight


def model_fingerprint(model: nn.Layer) -> str:
    """sha256 hex of a model's config, and of names, shapes and evenly spaced numbers of its weights.

    A probe, so that 55 GB need not be read twice: it tells models and fine-tunes apart, not a flipped bit.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        flat, index = parameter.detach().reshape([-1]), paddle.to_tensor(_probed(parameter.shape))
        if parameter.dtype == paddle.float16:  # has no gather on CPU; its bits have
            values = paddle.gather(flat.view("int16"), index).view("float16").astype("float32")
        else:
            values = paddle.gather(flat, index).astype("float32")
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def stored_fingerprint(stored: StoredModel, dtype: str) -> str:
    """`model_fingerprint` of a checkpoint as it would be loaded in `dtype`, reading only the numbers it takes."""
    digest = hashlib.sha256(json.dumps(stored.skeleton.config.to_dict(), sort_keys=True).encode())
    for path, shape in stored.shapes.items():
        rounded = paddle.to_tensor(stored.numbers(path, _probed(shape))).astype(dtype).astype("float32")
        digest.update(f"{path}{list(shape)}".encode())
        digest.update(rounded.numpy().tobytes())
    return digest.hexdigest()


def _probed(shape: Sequence[int]) -> np.ndarray:
    """Evenly spaced positions in a flattened weight."""
    size = int(np.prod(shape))
    return np.unique(np.linspace(0, size - 1, min(size, _PROBES)).astype("int64"))


def identity(config: TrainConfig, *, fingerprint: str, tokenizer: Tokenizer, plan: Plan) -> dict[str, Any]:
    """The identity of a run as JSON values.

    Args:
        fingerprint: of the base model, taken before anything was changed in it.
    """
    lora = asdict(config.lora)
    return {
        "model": {"fingerprint": fingerprint, "path": config.model.path},
        "tokenizer": tokenizer.fingerprint,
        "settings": {
            "precision": config.precision,
            "lora.rank": lora["rank"],
            **({} if lora["rank"] == 0 else {f"lora.{key}": lora[key] for key in lora if key not in ("rank", "init")}),
            **({"trainable": config.trainable} if lora["rank"] == 0 else {}),
            "data.max_tiles": config.data.max_tiles,
        },
        "plan": dict(plan.settings),
    }


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What keeps `current` from going on where `saved` stopped, in words; empty when nothing does."""
    found = []
    if saved["model"]["fingerprint"] != current["model"]["fingerprint"]:
        found.append(f"the base model: it was {saved['model']['path']}, now it is {current['model']['path']}")
    if saved["tokenizer"] != current["tokenizer"]:
        found.append("the tokenizer")
    for part in ("settings", "plan"):
        before, now = saved[part], current[part]
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) == now.get(key):
                continue
            if key == "data":
                found.append("the data (other conversations, images or sizes)")
            else:
                found.append(f"{key}: it was {before.get(key)}, now it is {now.get(key)}")
    return found


def changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Settings that a resumed run may change, and that change its numbers from here on, in words.

    Args:
        saved: the configuration that the checkpoint holds, as nested dictionaries.
        current: that of this run, likewise.
    """

    def relevant(config: Mapping[str, Any]) -> dict[str, Any]:
        optim = {f"optim.{key}": value for key, value in config["optim"].items()}
        return {**optim, "epochs": config["epochs"], "max_steps": config["max_steps"]}

    before, now = relevant(saved), relevant(current)
    return [f"{key} was {before[key]}, now it is {now[key]}" for key in now if before.get(key) != now[key]]
