"""What a `model=` folder holds: a base model, an export, an adapter, a run or one of its checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.store.hub import resolve_model
from train.store.names import ADAPTER, EXPORT_REPORT, WEIGHTS, WEIGHTS_METADATA
from vl2.adapter.formats import PADDLE_CONFIG, PEFT_CONFIG, adapter_format, adapter_metadata
from vl2.checkpoint.folder import checkpoint_tensors
from vl2.dtypes import WEIGHT_DTYPES
from vl2.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a `model=` folder turned out to hold."""

    kind: str  # base (also an export), adapter, or weights (a full fine-tune)
    base: Path  # folder of the base model
    trained: Path | None = None  # folder of the adapter or of the trained weights
    about: dict[str, Any] = field(default_factory=dict)  # metadata of the run that made it

    @property
    def rehearsal(self) -> bool:
        """Whether this comes from a rehearsal on nano."""
        return bool(self.about.get("rehearsal"))


def find_source(folder: str | Path, base: str = "") -> Source:
    """Tell what lies in a folder: a checkpoint in the official layout, an adapter, a run, or a run's checkpoint.

    Args:
        folder: to look into.
        base: base model of what was trained; empty: the one it names.

    Raises:
        UserError: when it is none of these, or the base of an adapter cannot be found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a base model, a run, an adapter or an export")
    for trained in (folder, folder / ADAPTER, folder / WEIGHTS):
        if adapter_format(trained):
            about = adapter_metadata(trained)
            return Source(kind="adapter", base=_base_of(trained, about, base), trained=trained, about=about)
        if (trained / WEIGHTS_METADATA).is_file():
            about = json.loads((trained / WEIGHTS_METADATA).read_text(encoding="utf-8"))
            return Source(kind="weights", base=_base_of(trained, about, base), trained=trained, about=about)
    if base:
        raise UserError(f"base={base}: {folder} holds neither an adapter nor trained weights that would need a base")
    if (folder / "config.json").is_file():
        report = folder / EXPORT_REPORT
        about = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
        return Source(kind="base", base=folder, about=about)
    hint = ""
    if (folder / "checkpoints").is_dir():
        hint = "; the run is not finished: give one of its checkpoints, or finish it with resume=auto"
    raise UserError(
        f"{folder}: neither a model (config.json) nor an adapter ({PADDLE_CONFIG}, {PEFT_CONFIG}) "
        f"nor a run (adapter/){hint}"
    )


def _base_of(trained: Path, about: dict[str, Any], given: str) -> Path:
    if given:
        return resolve_model(given)
    name = about.get("base")
    if not name:
        raise UserError(f"{trained}: this adapter does not name its base model; give base=FOLDER")
    problem = "no config.json"
    try:
        base = resolve_model(name)
        if (base / "config.json").is_file():
            return base
    except ValueError as error:
        problem = str(error)
    raise UserError(
        f"{trained}: was trained on the base model {name}, which is not there now ({problem}); give base=FOLDER"
    )


def stored_dtype(folder: Path) -> str:
    """The type that most weights of a checkpoint are stored in; bfloat16 when there are none."""
    try:
        stored = checkpoint_tensors(folder)
    except ValueError:
        return "bfloat16"
    kinds = [tensor.dtype for tensor in stored.values()]
    most = max(set(kinds), key=kinds.count, default="bfloat16")
    return most if most in WEIGHT_DTYPES else "bfloat16"
