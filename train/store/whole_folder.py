"""Checkpoint folders: written whole or not at all, checked by checksums, pruned.

run_dir/checkpoints/step-000003/    manifest.json (sha256 and bytes of every file) and the files
run_dir/checkpoints/.new-...        being written; left behind only by a crash, swept by the next save
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from train.machine.memory import gigabytes
from vl2.errors import UserError

MANIFEST = "manifest.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_folder(target: Path, write: Callable[[Path], None], *, manifest: bool = True) -> None:
    """Write a folder under a temporary name, sync it to disk with a manifest, and give it its name in one rename.

    Args:
        target: final place; a folder already there is replaced.
        write: fills the temporary folder it is given.
        manifest: with checksums, for which every file is read again.

    Raises:
        UserError: the disk is full. Then, as after any other error, nothing new is there.
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
            raise UserError(
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
        UserError: a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: there is something already; expected a new or empty folder, give another one")


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
