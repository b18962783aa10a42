"""A run's checkpoints: where they lie, the newest whole one, pruning, setting aside.

run_dir/checkpoints/step-000003/          a whole folder, see train.store.whole_folder
run_dir/checkpoints/aside-step-000004/    of an attempt that was given up for an older checkpoint; never looked at
run_dir/checkpoints/.pruned-step-000001/  on its way out
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from train.store.facts import read_fact
from train.store.names import CHECKPOINTS, CONFIG_FILE, STATE_FILE
from train.store.run_dir import read_marker
from train.store.run_state import CheckpointState
from train.store.whole_folder import damage, is_whole, put_back
from vl2.errors import UserError

_GOING = ".pruned-"
_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_path(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return root / f"step-{step:06d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder lies where a run's checkpoints do."""
    return folder.parent.name == CHECKPOINTS and _NAME.fullmatch(folder.name) is not None


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first; whether they are whole is not looked at."""
    found = [path for path in root.glob("step-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def find_checkpoint(resume: str, run_dir: Path) -> tuple[Path, CheckpointState, list[str]]:
    """The checkpoint that `resume` means.

    Args:
        resume: "auto" for the newest whole one of `run_dir`; else a checkpoint folder, or a run folder for its newest.
        run_dir: of this run.

    Returns:
        (the folder, its state, remarks on damaged checkpoints that were passed over).

    Raises:
        UserError: when there is nothing whole to resume from.
    """
    place = run_dir if resume == "auto" else Path(resume)
    if not place.is_dir():
        hint = "there is no run there yet: start without resume" if resume == "auto" else "no such folder"
        raise UserError(f"resume={resume}: nothing to resume from in {place}; {hint}")
    if resume != "auto" and _NAME.fullmatch(place.name):
        try:
            return place, read_state(place), []
        except UserError as problem:
            raise UserError(
                f"resume={resume}: this checkpoint is damaged ({problem}); resume=auto takes the newest whole"
            ) from problem
    remarks: list[str] = []
    put_back(place / CHECKPOINTS)
    for folder in reversed(checkpoints(place / CHECKPOINTS)):
        try:
            return folder, read_state(folder), remarks
        except UserError as problem:
            remarks.append(f"checkpoint {folder} is damaged ({problem}); passed over")
    detail = "; ".join(remarks) or "no checkpoint was written"
    raise UserError(
        f"resume={resume}: nothing to resume from in {place} ({detail}); "
        f"start without resume (overwrite=true replaces the run)"
    )


def read_state(folder: Path) -> CheckpointState:
    """The state of a whole checkpoint.

    Raises:
        UserError: a file that is not as it was written, or a state or configuration that cannot be read.
    """
    if reason := damage(folder):
        raise UserError(reason)
    read_config(folder)
    return read_fact(CheckpointState, folder / STATE_FILE)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that a checkpoint was written with, as nested dictionaries.

    Raises:
        UserError: not a table of settings.
    """
    path = folder / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as problem:
        first = str(problem).partition("\n")[0]
        raise UserError(f"{path}: cannot be read ({first})") from problem
    if not isinstance(config, Mapping) or not isinstance(config.get("optim"), Mapping):
        raise UserError(f"{path}: expected the settings of a run, `optim` among them")
    return dict(config)


def later_checkpoints(checkpoint: Path, run_dir: Path) -> list[Path]:
    """Checkpoints of `run_dir` after the one to go on from; none where that is another run's."""
    root = run_dir / CHECKPOINTS
    if checkpoint.resolve().parent != root.resolve():
        return []
    return [folder for folder in checkpoints(root) if int(folder.name.partition("-")[2]) > step_of(checkpoint)]


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint's name says."""
    return int(checkpoint.resolve().name.partition("-")[2])


def set_aside(folders: list[Path]) -> list[Path]:
    """Rename checkpoints so that neither resuming nor pruning sees them; returns their new places."""
    places = []
    for folder in folders:
        names = (f"aside{f'-{i}' if i > 1 else ''}-{folder.name}" for i in range(1, 10**6))
        place = next(folder.with_name(name) for name in names if not folder.with_name(name).exists())
        folder.rename(place)
        places.append(place)
    return places


def prune(root: Path, keep: int, best: int | None = None) -> None:
    """Delete what is older than the newest `keep` whole checkpoints; 0 keeps all.

    Damaged ones do not count, so the newest whole one always stays.

    Args:
        best: step of a checkpoint that stays whatever its age.
    """
    for left in root.glob(f"{_GOING}*"):  # by a kill in the middle of it
        shutil.rmtree(left, ignore_errors=True)
    whole = 0
    for folder in reversed(checkpoints(root)):
        if keep > 0 and whole >= keep:
            if step_of(folder) != best:
                going = folder.with_name(f"{_GOING}{folder.name}")  # at once: no half of a checkpoint has its name
                folder.rename(going)
                shutil.rmtree(going)
        elif is_whole(folder):
            whole += 1


def chosen_checkpoint(run: str, checkpoint: str) -> str:
    """The folder that `checkpoint=` means of a run.

    Args:
        run: folder, as it was typed.
        checkpoint: best, last, or a number of steps; empty: the run itself.

    Raises:
        UserError: there is no such checkpoint; says which there are.
    """
    if not checkpoint:
        return run
    said, there = f"checkpoint={checkpoint}", checkpoints(Path(run) / CHECKPOINTS)
    if not there:
        raise UserError(f"{said}: {run} holds no checkpoints; expected the folder of a run, or no checkpoint=")
    steps = f"there are the steps {', '.join(str(step_of(folder)) for folder in there)}"
    if checkpoint == "last":
        whole = [folder for folder in there if damage(folder, checksums=False) is None]
        if not whole:
            raise UserError(f"{said}: no checkpoint of {run} is whole ({damage(there[-1], checksums=False)})")
        return str(whole[-1])
    if checkpoint == "best":
        marker = read_marker(Path(run))
        if marker is None or marker.best is None:
            raise UserError(f"{said}: {run} kept no best checkpoint (eval.every and eval.best keep one); {steps}")
        step = marker.best.step
    elif checkpoint.isdecimal():
        step = int(checkpoint)
    else:
        raise UserError(f"{said}: expected best, last or a number of optimizer steps; {steps}")
    found = checkpoint_path(Path(run) / CHECKPOINTS, step)
    if found not in there:
        raise UserError(f"{said}: {found} is not there; {steps}")
    return str(found)
