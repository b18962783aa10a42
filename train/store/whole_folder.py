"""Folders that are written whole or not at all, and checked by a manifest with the checksum of every file.

target/          manifest.json (sha256 and bytes of every file) and the files
.new-target/     being written; left behind only by a crash, swept by the next one of that name
.old-target/     what it replaces, for the moment between two renames; put back where a crash fell into it
.lock-target     while it is written
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from train.machine.memory import gigabytes
from train.store.facts import read_fact, write_fact
from train.store.lock import hold
from vl2.errors import UserError

MANIFEST = "manifest.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# For people: whoever edits them breaks nothing.
_TEXTS = (".md",)


@dataclass(frozen=True, kw_only=True)
class ManifestEntry:
    """One file of a folder, as its manifest has it."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json: what `write_folder` wrote, by path in the folder."""

    files: dict[str, ManifestEntry]


def write_folder(target: Path, write: Callable[[Path], None], *, manifest: bool = True) -> None:
    """Write a folder under a temporary name, sync it to disk with a manifest, and give it its name in one rename.

    Args:
        target: final place; a folder already there is replaced, a symbolic link followed.
        write: fills the temporary folder it is given.
        manifest: with checksums, for which every file is read again.

    Raises:
        UserError: the disk is full, or another process writes there now. Then, as after any other error, nothing new
            is there.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with hold(target.parent / f".lock-{target.name}", str(target)):
        temporary, old = (target.parent / f".{kind}-{target.name}" for kind in ("new", "old"))
        put_back(target.parent, target.name)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            if manifest:
                described = {path.relative_to(temporary).as_posix(): _describe(path) for path in files}
                write_fact(temporary / MANIFEST, Manifest(files=described))
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
    if manifest:
        _whole[target] = _stamps(target, described)


def put_back(parent: Path, name: str = "*") -> None:
    """Give folders their names back that a crash left without, between the two renames that replace them.

    Args:
        parent: of the folders.
        name: of one of them; all.
    """
    for old in parent.glob(f".old-{name}"):
        target = old.with_name(old.name.removeprefix(".old-"))
        if not target.exists():
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                old.rename(target)


def check_empty(folder: Path) -> None:
    """Refuse a place where something is already.

    Raises:
        UserError: a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: there is something already; expected a new or empty folder, give another one")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        UserError: there is none, or it is not one of ours.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: no {MANIFEST}")
    manifest = read_fact(Manifest, folder / MANIFEST)
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise UserError(f"{folder / MANIFEST}: files names {name!r}, which is outside of the folder")
    return manifest


def damage(folder: Path, *, inside: str = "", checksums: bool = True) -> str | None:
    """What is wrong with a folder made by `write_folder`: a text, or None when every file is as it was written.

    Args:
        folder: with a manifest.
        inside: look only at the files of that folder in it.
        checksums: read every file; False looks at sizes only.
    """
    try:
        files = read_manifest(folder).files
    except UserError as problem:
        return str(problem).removeprefix(f"{folder}: ").removeprefix(f"{folder}/")
    for name, expected in files.items():
        path = folder / name
        if path.suffix in _TEXTS or (inside and PurePosixPath(name).parts[0] != inside):
            continue
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected.bytes:
                return f"{name} has {path.stat().st_size} bytes instead of {expected.bytes}"
            if checksums and _sha256(path) != expected.sha256:
                return f"the checksum of {name} is wrong"
        except OSError as problem:  # a bad block, or a file that this user may not read
            return f"{name} cannot be read ({problem.strerror})"
    return None


def is_whole(folder: Path) -> bool:
    """`damage` finds nothing; a folder that this process found whole before and that has not changed is not read."""
    folder = folder.resolve()
    known = _whole.get(folder)
    try:
        if known is not None and known == _stamps(folder, read_manifest(folder).files):
            return True
        if damage(folder) is None:
            _whole[folder] = _stamps(folder, read_manifest(folder).files)
            return True
    except (OSError, UserError):
        pass
    return False


def strangers(folder: Path) -> list[str]:
    """Files in a folder made by `write_folder` that are not in its manifest, by their path in it.

    Raises:
        UserError: no manifest of ours.
    """
    known = {*read_manifest(folder).files, MANIFEST}
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return sorted(name for name in found if name not in known)


# Folders that this process wrote or found whole, with sizes and times of their files.
_whole: dict[Path, tuple] = {}


def _stamps(folder: Path, files: dict[str, ManifestEntry]) -> tuple:
    stats = [(name, (folder / name).stat()) for name in (*files, MANIFEST)]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)


def _describe(path: Path) -> ManifestEntry:
    return ManifestEntry(bytes=path.stat().st_size, sha256=_sha256(path))


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
