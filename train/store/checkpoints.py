"""A run's checkpoints: where they lie, the newest whole one, pruning.

run_dir/checkpoints/step-000003/    a whole folder, see train.store.whole_folder
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from train.store.whole_folder import damage
from vl2.errors import UserError

_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_path(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return root / f"step-{step:06d}"


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first; whether they are whole is not looked at."""
    found = [path for path in root.glob("step-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def find_checkpoint(resume: str, run_dir: Path) -> tuple[Path, list[str]]:
    """The checkpoint that `resume` means.

    Args:
        resume: "auto" for the newest whole one of `run_dir`; else a checkpoint folder, or a run folder for its newest.
        run_dir: of this run.

    Returns:
        (the folder, remarks on damaged checkpoints that were passed over).

    Raises:
        UserError: when there is nothing whole to resume from.
    """
    place = run_dir if resume == "auto" else Path(resume)
    if not place.is_dir():
        hint = "there is no run there yet: start without resume" if resume == "auto" else "no such folder"
        raise UserError(f"resume={resume}: nothing to resume from in {place}; {hint}")
    if resume != "auto" and _NAME.fullmatch(place.name):
        if reason := damage(place):
            raise UserError(
                f"resume={resume}: this checkpoint is damaged ({reason}); resume=auto takes the newest whole"
            )
        return place, []
    remarks: list[str] = []
    for folder in reversed(checkpoints(place / "checkpoints")):
        reason = damage(folder)
        if reason is None:
            return folder, remarks
        remarks.append(f"checkpoint {folder} is damaged ({reason}); passed over")
    detail = "; ".join(remarks) or "no checkpoint was written"
    raise UserError(
        f"resume={resume}: nothing to resume from in {place} ({detail}); "
        f"start without resume (overwrite=true replaces the run)"
    )


def prune(root: Path, keep: int) -> None:
    """Delete the oldest checkpoints until `keep` are left; 0 keeps all."""
    for folder in checkpoints(root)[:-keep] if keep > 0 else []:
        shutil.rmtree(folder)
