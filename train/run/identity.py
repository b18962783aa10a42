"""What a run is, as far as resuming it must not change: base model, tokenizer, precision, what trains, and the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from data.plan import Plan
from train.config.schema import TrainConfig
from vl2.tokenizer import Tokenizer


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
