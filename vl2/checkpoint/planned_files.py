"""The files of a checkpoint that is to be written: names, headers and sizes are planned before the first byte.

A plan keeps the files, order and metadata of the checkpoint it comes from: what did not change is byte-identical.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vl2.checkpoint.folder import SINGLE_FILE, Checkpoint
from vl2.checkpoint.layouts import Layout
from vl2.dtypes import item_bytes, safetensors_name

MAX_SHARD_BYTES = 5 * 10**9
# The `format` that readers of a layout want: Transformers asks for pt, PaddleNLP for np (it refuses pd).
FORMAT_OF: dict[Layout, str] = {"hf": "pt", "paddle": "np"}


class Wanted(NamedTuple):
    """How a tensor shall lie in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's values."""
        return int(np.prod(self.shape, dtype=np.int64)) * item_bytes(self.dtype)


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One safetensors file."""

    name: str
    header: bytes  # with its length in front
    tensors: tuple[str, ...]  # in the order of their values

    def write(self, folder: Path, values: Callable[[str], np.ndarray], done: Callable[[int], None]) -> None:
        """Write the file, one tensor in memory at a time.

        Args:
            folder: existing folder.
            values: the values of a tensor by name, of the planned shape and type (16-bit floats as any 16-bit type).
            done: told the bytes of each tensor that was written.
        """
        with (folder / self.name).open("wb") as file:
            file.write(self.header)
            for name in self.tensors:
                array = np.ascontiguousarray(values(name))  # of a transposed view the wrong bytes would be written
                file.write(array.data)
                done(array.nbytes)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All files of a checkpoint."""

    files: tuple[PlannedFile, ...]
    index: bytes | None  # model.safetensors.index.json, where there are shards
    num_bytes: int  # of all of them


def plan_like(checkpoint: Checkpoint, wanted: Mapping[str, Wanted], layout: Layout) -> Plan:
    """The same files, order and metadata as a checkpoint's, with other types or shapes where they are wanted.

    Args:
        checkpoint: of safetensors files.
        wanted: what shall be written of each of its tensors.
        layout: what shall be written; the `format` of a header is set only where that changes.
    """
    files, stored = [], checkpoint.tensors
    for path, header in checkpoint.headers.items():
        names = sorted(header.tensors, key=lambda name: stored[name].offset)
        same = all(wanted[name] == (stored[name].dtype, stored[name].shape) for name in names)
        raw = header.raw if same else None
        files.append(_plan_file(path.name, header.metadata, list(header.tensors), names, wanted, layout, raw))
    index = checkpoint.index
    total = sum(want.num_bytes for want in wanted.values())
    if index is not None and total != sum(tensor.num_bytes for tensor in stored.values()):
        document = json.loads(index)
        metadata = document.get("metadata")
        document["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
        index = _json_text(document)
    return _plan(files, index, total)


def plan_new(wanted: Mapping[str, Wanted], layout: Layout) -> Plan:
    """Files for tensors that come from none: one, or shards of at most 5 GB and their index."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, want in wanted.items():
        if size and size + want.num_bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += want.num_bytes
    total = sum(want.num_bytes for want in wanted.values())
    count = len(shards)
    titles = [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:06d}.safetensors" for i in range(count)]
    files = [
        _plan_file(title, {"format": ""}, names, names, wanted, layout, None) for title, names in zip(titles, shards)
    ]
    if count == 1:
        return _plan(files, None, total)
    weight_map = {name: title for title, names in zip(titles, shards) for name in names}
    return _plan(files, _json_text({"metadata": {"total_size": total}, "weight_map": weight_map}), total)


def _plan(files: Sequence[PlannedFile], index: bytes | None, values_bytes: int) -> Plan:
    total = values_bytes + sum(len(file.header) for file in files) + len(index or b"")
    return Plan(files=tuple(files), index=index, num_bytes=total)


def _plan_file(
    title: str,
    metadata: Mapping[str, str],
    order: Sequence[str],
    names: Sequence[str],
    wanted: Mapping[str, Wanted],
    layout: Layout,
    raw: bytes | None,
) -> PlannedFile:
    """One file; `order` is that of the header's entries, `names` that of the values."""
    if raw is None or not _says(metadata, layout):
        offsets, start = {}, 0
        for name in names:
            offsets[name] = [start, start + wanted[name].num_bytes]
            start = offsets[name][1]
        if not _says(metadata, layout):
            metadata = {**metadata, "format": FORMAT_OF[layout]}
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        for name in order:
            want = wanted[name]
            kind = safetensors_name(want.dtype)
            header[name] = {"dtype": kind, "shape": list(want.shape), "data_offsets": offsets[name]}
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
    return PlannedFile(name=title, header=len(raw).to_bytes(8, "little") + raw, tensors=tuple(names))


def _says(metadata: Mapping[str, str], layout: Layout) -> bool:
    """Whether a header's metadata may stay as it is."""
    found = metadata.get("format")
    return found == FORMAT_OF[layout] or (found is None and layout == "hf") or (found == "pd" and layout == "paddle")


def _json_text(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
