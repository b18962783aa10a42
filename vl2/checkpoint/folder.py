"""A checkpoint's folder: which files hold its tensors; one, shards with an index, or PaddleNLP's .pdparams."""

from __future__ import annotations

import json
from pathlib import Path

from vl2.checkpoint.pdparams import locate_arrays
from vl2.checkpoint.tensor_files import StoredTensor, read_header
from vl2.errors import UserError

INDEX_FILE = "model.safetensors.index.json"


SINGLE_FILE = "model.safetensors"


PDPARAMS_FILE = "model_state.pdparams"  # PaddleNLP's name of old


def checkpoint_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder, single file or sharded.

    Raises:
        UserError: no weights, a missing shard, a file that is not whole, or an index that other shards are meant by.
    """
    index, single, pickled = folder / INDEX_FILE, folder / SINGLE_FILE, folder / PDPARAMS_FILE
    if index.is_file():
        return _sharded_tensors(index)
    if single.is_file():
        return read_header(single)[0]
    if pickled.is_file():
        return locate_arrays(pickled)
    raise UserError(f"{folder}: no {SINGLE_FILE}, no {INDEX_FILE} and no {PDPARAMS_FILE} there")


def _sharded_tensors(index: Path) -> dict[str, StoredTensor]:
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = sorted(set(map(str, places.values())))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{index}: expected an index with a weight_map of tensors to files ({error!r})") from error
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index.parent}: {index.name} names shards that are not there: {', '.join(missing)}; fetch them again"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        found = read_header(index.parent / file)[0]
        wrong = [name for name in found if places.get(name) != file]
        wrong += [name for name, place in places.items() if place == file and name not in found]
        if wrong:
            raise UserError(
                f"{index.parent / file}: not the shard that {index.name} describes: {len(wrong)} tensors are in one "
                f"and not in the other ({'; '.join(wrong[:5])}); index and shards must come from one checkpoint"
            )
        tensors.update(found)
    return tensors
