"""Settings that an earlier version wrote, in today's words: the config.yaml of a run and of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def in_todays_words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings with today's keys; what they do not say counts as its default.

    optim.vision_lr_scale: 0.1  ->  optim.groups.vision.lr_scale: 0.1
    wandb.mode: disabled        ->  log: []

    Args:
        settings: as a run's config.yaml holds them.
    """
    today = dict(settings)
    wandb = settings.get("wandb")
    if isinstance(wandb, Mapping) and wandb.get("mode") == "disabled":
        today |= {"wandb": {**wandb, "mode": "auto"}, "log": []}
    optim = settings.get("optim")
    if isinstance(optim, Mapping) and "vision_lr_scale" in optim:
        rest = {name: value for name, value in optim.items() if name != "vision_lr_scale"}
        scale = optim["vision_lr_scale"]
        own = {"vision": {"lr_scale": scale, "weight_decay": None}} if scale != 1.0 else {}
        today["optim"] = {**rest, "groups": own}
    return today
