"""What is served, by name: a base model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from data.images.reader import ImageReader
from train.ask.load import Loaded, load
from train.config.serve_schema import ServeConfig
from train.store.checkpoints import chosen_checkpoint


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model that requests can name."""

    name: str
    loaded: Loaded

    def use(self) -> None:
        """Let the model in memory compute as this one."""


def load_models(config: ServeConfig) -> dict[str, Served]:
    """Load what is served."""
    loaded = load(chosen_checkpoint(config.model, config.checkpoint), config.precision, config.base, config.check)
    images = ImageReader(exif=loaded.images.exif, max_pixels=config.max_pixels)
    loaded = dataclasses.replace(loaded, images=images)
    name = config.name or Path(config.model).resolve().name
    return {name: Served(name=name, loaded=loaded)}
