"""A model's folder, opened once and passed on: however many ask, each of its files is read once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vl2.checkpoint.folder import Checkpoint, read_checkpoint
from vl2.checkpoint.stored_model import StoredModel, find_weights
from vl2.config import VL2Config
from vl2.errors import UserError
from vl2.parameters import build_model
from vl2.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """What lies in a model's folder. Weights are looked for only when they are asked for: there may be none."""

    path: Path
    config: VL2Config
    tokenizer: Tokenizer

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The files of its weights, not compared with the config.

        Raises:
            UserError: there are none, or one is not whole.
        """
        return read_checkpoint(self.path)

    @cached_property
    def weights(self) -> StoredModel:
        """Its weights; every name and shape fits the config.

        Raises:
            UserError: when they do not.
        """
        return find_weights(self.path, build_model(self.config, self.tokenizer.image_id), self.checkpoint)


def open_folder(path: str | Path) -> ModelFolder:
    """Read the config and the tokenizer of a model's folder.

    Raises:
        UserError: when one is missing, broken, or they do not belong together.
    """
    path = Path(path)
    config, tokenizer = VL2Config.from_folder(path), Tokenizer.from_folder(path)
    check_vocabulary(tokenizer, config, str(path))
    return ModelFolder(path=path, config=config, tokenizer=tokenizer)


def check_vocabulary(tokenizer: Tokenizer, config: VL2Config, where: str) -> None:
    """Refuse a tokenizer with ids that the embedding has no row for.

    Raises:
        UserError: with both numbers.
    """
    if tokenizer.num_rows > config.language.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {len(tokenizer)} entries, up to the id {tokenizer.num_rows - 1}, but "
            f"language_config.vocab_size is {config.language.vocab_size}; tokenizer.json and config.json must belong "
            "together"
        )
