"""Whether the files of the Hugging Face cache are what the hub says they are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from vl2.errors import UserError

_READ_BYTES = 1 << 20


def verify_checksums(folder: Path, *, weights: bool = True) -> None:
    """Compare the files of a snapshot with the hub's checksums, which huggingface_hub (it looks at sizes) does not.

    In its cache a file is a link to a blob named by the hub's ETag: the sha256 of a large file, git's sha1 of a small
    one.  What was found good is remembered beside the blobs.  Folders of another kind carry no checksums.

    Args:
        folder: of the snapshot.
        weights: False leaves out the safetensors, which take minutes.

    Raises:
        UserError: naming the file, which is removed, so that the next try fetches it again.
    """
    links = {path: path.resolve() for path in sorted(folder.iterdir()) if path.is_symlink() and path.is_file()}
    links = {path: blob for path, blob in links.items() if weights or path.suffix != ".safetensors"}
    blobs = {path: blob for path, blob in links.items() if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", blob.name)}
    unchecked = [path.name for path in links if path.suffix == ".safetensors" and path not in blobs]
    if unchecked:
        print(f"warning: the hub gave no checksum for {some(unchecked)}", file=sys.stderr)
    marker = folder.parents[1] / ".verified.json"
    good = _read_marker(marker)
    todo = {path: blob for path, blob in blobs.items() if good.get(blob.name) != _stamp(blob)}
    if not todo:
        return
    total = sum(blob.stat().st_size for blob in todo.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Checksums", file=sys.stderr) as bar:
        for path, blob in todo.items():
            stamp = _stamp(blob)
            found = _checksum(blob, bar)
            if found != blob.name:
                path.unlink(missing_ok=True)
                blob.unlink(missing_ok=True)
                raise UserError(
                    f"{path}: wrong checksum, expected {blob.name}, found {found}; the file was removed, "
                    "start again to fetch it anew"
                )
            good[blob.name] = stamp
            _write_marker(marker, good)


def _checksum(blob: Path, bar: tqdm) -> str:
    """Of the kind its name is: sha256, or sha1 over git's header and the content."""
    if len(blob.name) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    for chunk in _chunks(blob):
        digest.update(chunk)
        bar.update(len(chunk))
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            yield chunk


def _stamp(blob: Path) -> list[int]:
    """What changes when a blob is fetched again."""
    stat = blob.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _read_marker(marker: Path) -> dict[str, list[int]]:
    try:
        return dict(json.loads(marker.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # none yet, or half written: everything is checked


def _write_marker(marker: Path, good: dict[str, list[int]]) -> None:
    with contextlib.suppress(OSError):  # a cache that others own: checked again next time
        marker.write_text(json.dumps(good), encoding="utf-8")


def some(names: list[str]) -> str:
    """The first five names and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
