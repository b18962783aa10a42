"""A checkpoint's files: which hold its tensors; one, shards with an index, or PaddleNLP's .pdparams. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vl2.checkpoint.pdparams import locate_arrays
from vl2.checkpoint.tensor_files import Header, StoredTensor, read_header, shown
from vl2.errors import UserError
from vl2.json_object import parse_json_object

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PDPARAMS_FILE = "model_state.pdparams"  # PaddleNLP's name of old


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where each tensor of a checkpoint lies; every header was read once."""

    tensors: Mapping[str, StoredTensor]
    headers: Mapping[Path, Header]  # of its safetensors files, in the order of their names; none of a .pdparams
    index: bytes | None = None  # model.safetensors.index.json as it stands, where there are shards

    @property
    def dtype(self) -> str:
        """The type that most tensors are stored in."""
        kinds = [tensor.dtype for tensor in self.tensors.values()]
        return max(sorted(set(kinds)), key=kinds.count, default="bfloat16")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Find all tensors of a checkpoint folder, single file or sharded.

    Raises:
        UserError: no weights, a missing shard, a file that is not whole, or an index that other shards are meant by.
    """
    index, single, pickled = folder / INDEX_FILE, folder / SINGLE_FILE, folder / PDPARAMS_FILE
    if index.is_file():
        return _read_shards(index)
    if single.is_file():
        header = read_header(single)
        return Checkpoint(tensors=header.tensors, headers={single: header})
    if pickled.is_file():
        return Checkpoint(tensors=locate_arrays(pickled), headers={})
    raise UserError(f"{folder}: no {SINGLE_FILE}, no {INDEX_FILE} and no {PDPARAMS_FILE} there")


def read_weight_map(index: Path) -> tuple[bytes, dict[str, str]]:
    """The index of a sharded checkpoint: as it stands, and the file of each tensor.

    Raises:
        UserError: no index, or one that names files outside of its folder.
    """
    raw = index.read_bytes()
    places = parse_json_object(raw, str(index)).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{index}: weight_map is {shown(places)}; expected a table of tensors to files")
    for name, file in places.items():
        # Shards lie beside their index: a name with a folder in it would have us read from anywhere.
        if not isinstance(file, str) or not file or file in (".", "..") or set(file) & {"/", "\\", "\0"}:
            raise UserError(
                f"{index}: expected the name of a file beside it for {shown(name)}, found {shown(file)}; weights are "
                "read from the model's own folder alone"
            )
    return raw, places


def _read_shards(index: Path) -> Checkpoint:
    raw, places = read_weight_map(index)
    files = sorted(set(places.values()))
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index.parent}: {index.name} names shards that are not there: {', '.join(map(shown, missing))}; "
            "fetch them again"
        )
    tensors: dict[str, StoredTensor] = {}
    headers: dict[Path, Header] = {}
    for file in files:
        path = index.parent / file
        headers[path] = header = read_header(path)
        wrong = [name for name in header.tensors if places.get(name) != file]
        wrong += [name for name, place in places.items() if place == file and name not in header.tensors]
        if wrong:
            raise UserError(
                f"{path}: not the shard that {index.name} describes: {len(wrong)} tensors are in one "
                f"and not in the other ({'; '.join(map(shown, wrong[:5]))}); index and shards must come from one "
                "checkpoint"
            )
        tensors.update(header.tensors)
    return Checkpoint(tensors=tensors, headers=headers, index=raw)
