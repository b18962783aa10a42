"""Checkpoint folders: written whole or not at all, checked by checksums, pruned.

run_dir/checkpoints/step-000003/    manifest.json (sha256 and bytes of every file) and the files
run_dir/checkpoints/.new-...        being written; left behind only by a crash, swept by the next save
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from train.room import gigabytes

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_folder(target: Path, write: Callable[[Path], None], *, manifest: bool = True) -> None:
    """Write a folder under a temporary name, sync it to disk with a manifest, and give it its name in one rename.

    Args:
        target: final place; a folder already there is replaced.
        write: fills the temporary folder it is given.
        manifest: with checksums, for which every file is read again.

    Raises:
        ValueError: the disk is full. Then, as after any other error, nothing new is there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (target.parent / f".{kind}-{target.name}" for kind in ("new", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        if manifest:
            described = {str(path.relative_to(temporary)): _describe(path) for path in files}
            (temporary / MANIFEST).write_text(json.dumps({"files": described}, indent=2) + "\n")
            files.append(temporary / MANIFEST)
        for path in [*files, *{path.parent for path in files}, temporary]:
            _sync(path)
    except BaseException as problem:
        written = sum(path.lstat().st_size for path in temporary.rglob("*") if path.is_file())
        shutil.rmtree(temporary, ignore_errors=True)
        kept = f"{temporary} could not be removed" if temporary.exists() else "nothing was kept"
        if isinstance(problem, OSError) and problem.errno in _FULL:
            free = gigabytes(shutil.disk_usage(target.parent).free)
            raise ValueError(
                f"{target}: the disk is full ({problem.strerror}) after {gigabytes(written)}; {kept}, and "
                f"{free} are free now. Free some space, or write to another disk"
            ) from problem
        raise
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_empty(folder: Path) -> None:
    """Refuse a place where something is already.

    Raises:
        ValueError: a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: there is something already; expected a new or empty folder, give another one")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder made by `write_folder`: a text, or None when every file is as it was written."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"no {MANIFEST}"
    try:
        files = json.loads(path.read_text())["files"]
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != expected["bytes"]:
            return f"{name} has {(folder / name).stat().st_size} bytes instead of {expected['bytes']}"
        if _sha256(folder / name) != expected["sha256"]:
            return f"the checksum of {name} is wrong"
    return None


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
        ValueError: when there is nothing whole to resume from.
    """
    place = run_dir if resume == "auto" else Path(resume)
    if not place.is_dir():
        hint = "there is no run there yet: start without resume" if resume == "auto" else "no such folder"
        raise ValueError(f"resume={resume}: nothing to resume from in {place}; {hint}")
    if resume != "auto" and _NAME.fullmatch(place.name):
        if reason := damage(place):
            raise ValueError(
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
    raise ValueError(
        f"resume={resume}: nothing to resume from in {place} ({detail}); "
        f"start without resume (overwrite=true replaces the run)"
    )


def prune(root: Path, keep: int) -> None:
    """Delete the oldest checkpoints until `keep` are left; 0 keeps all."""
    for folder in checkpoints(root)[:-keep] if keep > 0 else []:
        shutil.rmtree(folder)


def _describe(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
