"""The optimizer's state in a checkpoint: one file, or one of each process that keeps a part of it.

    optimizer.safetensors                    without sharding
    optimizer-00000-of-00002.safetensors     of the first of two processes that share
    optimizer-00001-of-00002.safetensors

    checkpoints/.parts-step-000020/          where the others leave theirs for the first, which fills the folder

A parameter's state is in one file, under its structured name: any number of processes can go on from any number.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from train.store.names import OPTIMIZER_FILE
from vl2.checkpoint.tensor_files import StoredTensor, read_header, write_safetensors
from vl2.errors import UserError

_PARTS = re.compile(r"optimizer-(\d{5})-of-(\d{5})\.safetensors")
_POLL_SECONDS = 0.02


def part_name(index: int, degree: int) -> str:
    """The file of one of `degree` processes that share."""
    stem, dot, suffix = OPTIMIZER_FILE.partition(".")
    return OPTIMIZER_FILE if degree == 1 else f"{stem}-{index:05d}-of-{degree:05d}{dot}{suffix}"


def parts_folder(root: Path, step: int) -> Path:
    """Where the parts of a checkpoint wait for its first process.

    Args:
        root: folder of the run's checkpoints.
        step: optimizer steps made.
    """
    return root / f".parts-step-{step:06d}"


def leave_part(folder: Path, state: Mapping[str, np.ndarray], index: int, degree: int) -> None:
    """Write one process's part where the first one waits for it; it appears whole.

    Raises:
        UserError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / part_name(index, degree)
    unfinished = path.with_suffix(".new")
    try:
        write_part(unfinished, state)
        os.replace(unfinished, path)
    except OSError as problem:
        unfinished.unlink(missing_ok=True)
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: the disk is full ({problem.strerror}). Free some space") from problem
        raise


def write_part(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Write a part of the state, or all of it."""
    write_safetensors(path, state, dict.fromkeys(state, "float32"))


def take_parts(waiting: Path, folder: Path, degree: int, look: Callable[[], None]) -> None:
    """Move the parts of all processes but the first into a checkpoint's folder, each as soon as it is there.

    Args:
        waiting: `parts_folder`, on the disk of `folder`.
        folder: that is being written.
        degree: processes that share.
        look: raises where one of them is gone, whose part will not come.
    """
    for index in range(1, degree):
        part = waiting / part_name(index, degree)
        while not part.exists():
            look()
            time.sleep(_POLL_SECONDS)
        os.replace(part, folder / part.name)
    shutil.rmtree(waiting, ignore_errors=True)


def sweep_parts(root: Path) -> None:
    """Remove what an attempt that was killed while it saved left waiting. Before anybody saves."""
    for left in root.glob(".parts-step-*"):
        shutil.rmtree(left, ignore_errors=True)


def stored_state(folder: Path) -> dict[str, StoredTensor]:
    """Where each tensor of the optimizer's state lies in a checkpoint, whatever number of files it has.

    Raises:
        UserError: no file, a part that is missing, a tensor in two of them.
    """
    if (folder / OPTIMIZER_FILE).exists():
        return read_header(folder / OPTIMIZER_FILE)[0]
    parts = {path.name: path for path in folder.glob("optimizer-*") if _PARTS.fullmatch(path.name)}
    degree = max((int(_PARTS.fullmatch(name)[2]) for name in parts), default=1)  # type: ignore[index]
    expected = {part_name(index, degree) for index in range(degree)}
    if missing := sorted(expected - parts.keys()):
        raise UserError(f"{folder / missing[0]}: no such file; expected the optimizer's state of {degree} processes")
    if odd := sorted(parts.keys() - expected):
        raise UserError(f"{folder / odd[0]}: beside the optimizer's state of {degree} processes; expected one number")
    found: dict[str, StoredTensor] = {}
    for name in sorted(parts):
        tensors = read_header(parts[name])[0]
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{parts[name]}: {twice[0]} is in another part too")
        found |= tensors
    return found
