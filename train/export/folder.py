"""What lies in an export's folder: the weights' files as the base has them, the base's other files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.ask.processor import PROCESSOR_CONFIG, exif_in_force, processor_document, resolutions_in_force
from train.ask.source import Source
from train.export.merge import Merge
from train.store.checkpoints import is_checkpoint
from train.store.names import EXPORT_REPORT
from train.store.overwrite import is_export
from train.store.run_dir import check_place
from train.store.whole_folder import MANIFEST, strangers
from vl2.checkpoint.folder import INDEX_FILE
from vl2.checkpoint.layouts import Layout, official_parts
from vl2.checkpoint.planned_files import Plan, Wanted, plan_like, plan_new
from vl2.errors import UserError
from vl2.json_object import read_json_object

# Weights of any kind: those of the base are not copied.
_WEIGHTS = (".safetensors", ".index.json", ".pdparams", ".bin", ".pt", ".pth")
# Written anew.
_OWN_FILES = ("config.json", "processor_config.json", EXPORT_REPORT, MANIFEST)


def plan_export(merge: Merge, layout: Layout) -> Plan:
    """The files of an export: those of the base, when they are safetensors files."""
    base = merge.base
    pieces = {part.name: part for _, parts in official_parts(base.skeleton, layout) for part in parts}
    wanted = {}
    for _, part in base.named_parts():
        shape = base.tensors[part.name].shape
        turned = part.transposed != pieces[part.name].transposed
        wanted[part.name] = Wanted(merge.dtype_of(part.name), tuple(reversed(shape)) if turned else shape)
    if base.checkpoint and base.checkpoint.headers:
        return plan_like(base.checkpoint, wanted, layout)
    return plan_new(wanted, layout)


def write_weights(folder: Path, merge: Merge, plan: Plan, layout: Layout, done: Callable[[int], None]) -> None:
    """Write the planned files, one tensor in memory at a time.

    Args:
        folder: existing folder.
        merge: the values.
        plan: from `plan_export`.
        layout: the one that was planned.
        done: told the bytes of each tensor that was written.
    """
    mine = {part.name: (path, part) for path, part in merge.base.named_parts()}
    pieces = {part.name: part for _, parts in official_parts(merge.base.skeleton, layout) for part in parts}

    def values(name: str) -> np.ndarray:
        array = merge.rounded(*mine[name])
        return array.T if pieces[name].transposed else array

    for file in plan.files:
        file.write(folder, values, done)
    if plan.index is not None:
        (folder / INDEX_FILE).write_bytes(plan.index)


def write_companions(folder: Path, source: Source, merge: Merge) -> None:
    """Write everything beside the weights.

    Tokenizer, licence and so on as the base has them; config and processor with the resolutions of the training.
    """
    for file in sorted(source.base.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name not in _OWN_FILES:
            shutil.copyfile(file, folder / file.name)
    config = merge.base.skeleton.config
    document = _with_dtype(config.raw, merge.dtype_name) if merge.dtype else dict(config.raw)
    candidates = [list(c) for c in resolutions_in_force(source, config)]
    if candidates != [list(c) for c in config.candidate_resolutions]:
        document["candidate_resolutions"] = candidates
    _write_json(folder / "config.json", document, source.base / "config.json")
    processor = source.base / PROCESSOR_CONFIG
    if processor.is_file() or exif_in_force(source) == "rotate":
        _write_json(folder / PROCESSOR_CONFIG, processor_document(source, config), processor)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with `torch_dtype` set wherever it stands, in the language model's part too."""
    changed = {key: _with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return {**changed, "torch_dtype": dtype} if "torch_dtype" in config else changed


def _write_json(target: Path, document: Mapping[str, Any], original: Path) -> None:
    """Write JSON; where it says what the original says, the original's bytes."""
    if original.is_file() and read_json_object(original) == document:
        shutil.copyfile(original, target)
    else:
        target.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_out(out: Path, source: Source, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is an earlier export and may be replaced.

    Raises:
        UserError: saying what to do.
    """
    check_place(out, f"out={out}")
    place = out.resolve()
    for folder in filter(None, (source.base, source.trained)):
        if folder.resolve().is_relative_to(place):
            raise UserError(f"out={out}: what is to be exported lies there ({folder}); give another folder")
    if any(is_checkpoint(folder) for folder in (place, *place.parents)):
        raise UserError(f"out={out}: lies in a checkpoint, which its run may delete; give a folder beside it")
    if not out.exists() or not any(out.iterdir()):
        return
    if not is_export(out):
        raise UserError(f"out={out}: there are files that no export wrote; give another folder")
    if not overwrite:
        raise UserError(f"out={out}: there is an export already; give overwrite=true to replace it, or another out=")
    if foreign := strangers(out):
        raise UserError(
            f"out={out}: {', '.join(foreign[:5])}: not written by the export that would be replaced; move it away, or "
            "give another out="
        )
