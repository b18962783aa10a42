"""What a run is, as far as resuming it must not change: base model, tokenizer, precision, what trains, and the plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.dataset import Dataset
from data.plan import Plan
from train.config.earlier import in_todays_words
from train.config.fields import list_keys
from train.config.schema import OptimConfig, TrainConfig
from train.store.run_state import Identity
from vl2.tokenizer import Tokenizer

_MAY_CHANGE = ("rank", "init", "plus_scale")  # keys of `lora` that are not compared, or by themselves


def identity(config: TrainConfig, *, fingerprint: str, tokenizer: Tokenizer, plan: Plan) -> Identity:
    """The identity of a run.

    Args:
        fingerprint: of the base model, taken before anything was changed in it.
    """
    lora = asdict(config.lora)
    return Identity(
        model_fingerprint=fingerprint,
        model_path=config.model.path,
        tokenizer=tokenizer.fingerprint,
        settings={
            "precision": config.precision,
            "lora.rank": lora["rank"],
            **({} if lora["rank"] == 0 else {f"lora.{key}": lora[key] for key in lora if key not in _MAY_CHANGE}),
            **({"trainable": config.trainable} if lora["rank"] == 0 else {}),
            "data.max_tiles": config.data.max_tiles,
            "model.frozen": config.model.frozen,
            **({} if config.data.exif == "ignore" else {"data.exif": config.data.exif}),
        },
        plan=dict(plan.settings),
    )


def fingerprint_of_records(dataset: Dataset, tokenizer: Tokenizer) -> str:
    """The fingerprint of a data set as it was computed before there were columns, for the checkpoints of that time.

    Every record is read for it. Empty where the data is such as could not be read then.
    """
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for record, size in zip(dataset.records, dataset.sizes, strict=True):
        if record.boxes or any(image.kind != "file" for image in record.images):
            return ""
        messages = [[m.role, m.content, m.plain] for m in record.messages]
        images = [[Path(image.name).name, Path(image.name).stat().st_size] for image in record.images]
        digest.update(json.dumps([messages, images, size.tokens, size.supervised, size.grids]).encode())
    return digest.hexdigest()


def differences(saved: Identity, current: Identity) -> list[str]:
    """What keeps `current` from going on where `saved` stopped, in words; empty when nothing does.

    A setting that came after `saved` was written had its default then.
    """
    found = []
    if saved.model_fingerprint != current.model_fingerprint:
        found.append(f"the base model: it was {saved.model_path}, now it is {current.model_path}")
    if saved.tokenizer != current.tokenizer:
        found.append("the tokenizer")
    defaults = {spec.name: spec.default for spec in list_keys(TrainConfig) if spec.name in current.settings}
    for before, now in (({**defaults, **saved.settings}, current.settings), (saved.plan, current.plan)):
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
        optim = {f"optim.{key}": value for key, value in {**asdict(OptimConfig()), **config["optim"]}.items()}
        plus = {"lora.plus_scale": config.get("lora", {}).get("plus_scale", 1.0)}
        return {**optim, **plus, **{key: config[key] for key in ("epochs", "max_steps") if key in config}}

    before, now = relevant(in_todays_words(saved)), relevant(current)
    changed = [key for key in now if key in before and before[key] != now[key]]
    return [f"{key} was {before[key]}, now it is {now[key]}" for key in changed]
