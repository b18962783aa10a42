"""Where trained weights come from, and what an export was made of: the facts that lie beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Of an adapter or of fully fine-tuned weights."""

    recipe: str
    rehearsal: bool  # trained on nano in place of the recipe's model
    base: str  # the base model as it was typed: a folder, or a name on the hub
    base_path: str  # that folder, absolute; empty for a name on the hub, and in format 1
    base_fingerprint: str  # of the base in `precision`
    init: Literal["weights", "random"]  # the base's weights are its folder's, or drawn from `seed`
    seed: int
    max_tiles: int  # most local tiles of an image in training
    exif: Literal["ignore", "rotate"] = "ignore"  # what training did with the EXIF orientation of pictures
    precision: Literal["bf16", "fp16", "fp32"]
    frozen: Literal["none", "nf4", "int8"] = "none"  # what the base's matrices were kept in, see vl2.quantised
    step: int | None  # optimizer steps made, in a checkpoint; None: the end of the run
    versions: dict[str, str]  # of the packages

    @staticmethod
    def from_format_1(document: Mapping[str, Any]) -> dict[str, Any]:
        """It knew no base_path, and left out the step of a finished run."""
        return {"base_path": "", "step": None, **document}


def absolute_folder(model: str) -> str:
    """`Provenance.base_path` of what was typed: found again from whatever folder a later command is typed in."""
    return str(Path(model).absolute()) if Path(model).is_dir() else ""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """export.json: what an export was made of, what was verified, what it cost."""

    run: str  # the folder that was exported, as typed
    base: str  # folder of the base model
    kind: Literal["base", "adapter", "weights"]  # what had been trained
    adapter: Literal["peft", "paddle"] | None  # files of an adapter alone; None: merged weights
    layout: Literal["hf", "paddle"] | None  # of merged weights
    dtype: str  # Paddle's names, several joined by "/"
    frozen: Literal["none", "nf4", "int8"] = "none"  # what the base's matrices were kept in while it was trained
    rehearsal: bool
    recipe: str  # empty where nothing is known of a run
    step: int | None = None  # optimizer steps made, of a checkpoint; None: what the run ended with
    versions: dict[str, str]
    verified: dict[str, int | float]
    cost: dict[str, float] | None  # gigabytes and seconds
    exif: Literal["ignore", "rotate"] = "ignore"  # what is to be done with the EXIF orientation of pictures

    @staticmethod
    def from_format_1(document: Mapping[str, Any]) -> dict[str, Any]:
        """It left out what does not apply."""
        return {"adapter": None, "layout": None, "cost": None, **document}
