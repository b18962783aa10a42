"""Which kind of adapter lies in a folder, by the names of its files, and what it says about where it comes from.

own      lora_config.json with our entry, peft_model.safetensors            what a run writes, stacked experts
peft     adapter_config.json, adapter_model.safetensors                     PEFT (PyTorch)
paddle   lora_config.json, peft_model.safetensors.index.json and its shards, PaddleNLP, PaddleMIX
         or lora_model_state.pdparams
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vl2.adapter.values import shown, table, text, texts
from vl2.checkpoint.pdparams import locate_arrays
from vl2.checkpoint.tensor_files import StoredTensor, read_header
from vl2.errors import UserError
from vl2.json_object import parse_json_object, read_json_object

OWN, PEFT, PADDLE = "own", "peft", "paddle"
PADDLE_CONFIG, PEFT_CONFIG = "lora_config.json", "adapter_config.json"
OWN_FILE, PEFT_FILE = "peft_model.safetensors", "adapter_model.safetensors"
PADDLE_INDEX, PADDLE_SHARD = "peft_model.safetensors.index.json", "peft_model-00001-of-00001.safetensors"
# Our entry: in lora_config.json of an own adapter, in the header of the weights of one written for others.
ENTRY = "vl2"
# What PaddleNLP's save_pretrained writes: its arrays are found without unpickling it. PyTorch's is not read at all.
PADDLE_PICKLE, PEFT_PICKLE = "lora_model_state.pdparams", "adapter_model.bin"


def adapter_format(folder: str | Path) -> str | None:
    """own, peft or paddle; None when there is no adapter in the folder.

    Raises:
        UserError: a configuration that is no JSON object.
    """
    folder = Path(folder)
    if (folder / PEFT_CONFIG).is_file():
        return PEFT
    if (folder / PADDLE_CONFIG).is_file():
        return OWN if ENTRY in read_json_object(folder / PADDLE_CONFIG) else PADDLE
    return None


def adapter_metadata(folder: str | Path) -> dict[str, Any]:
    """What is known of an adapter's origin without reading its weights.

    Returns:
        The metadata of the run that made it (base, base_fingerprint, max_tiles, rehearsal, ...); of a foreign adapter
        only `base`, which may be empty.

    Raises:
        UserError: no adapter there, or files that cannot be read.
    """
    folder = Path(folder)
    form = adapter_format(folder)
    if form is None:
        raise UserError(f"{folder}: no {PADDLE_CONFIG} or {PEFT_CONFIG} there; expected the folder of an adapter")
    config = folder / (PEFT_CONFIG if form == PEFT else PADDLE_CONFIG)
    document = read_json_object(config)
    if form == OWN:
        entry = document[ENTRY]
        if not isinstance(entry, dict) or not isinstance(entry.get("metadata"), dict):
            raise UserError(f"{config}: its entry {ENTRY!r} was not written here")
        return entry["metadata"]
    for file in {tensor.path for tensor in adapter_tensors(folder, form).values()}:
        if file.name == PADDLE_PICKLE:
            continue
        entry = read_header(file)[1].get(ENTRY)
        if entry is not None:
            return parse_json_object(entry, f"{file}: the entry {ENTRY!r} of its header")
    return {"base": text(config, "base_model_name_or_path", document.get("base_model_name_or_path"))}


def adapter_tensors(folder: Path, form: str) -> dict[str, StoredTensor]:
    """Every tensor of an adapter, whatever its name.

    Raises:
        UserError: no weights there, a shard that is missing, a file that is not whole, or one that is never unpickled.
    """
    if form == PADDLE and not (folder / PADDLE_INDEX).is_file() and (folder / PADDLE_PICKLE).is_file():
        return locate_arrays(folder / PADDLE_PICKLE)
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder, form):
        tensors.update(read_header(file)[0])
    return tensors


def _weight_files(folder: Path, form: str) -> list[Path]:
    if form == PADDLE and (folder / PADDLE_INDEX).is_file():
        index = folder / PADDLE_INDEX
        places = table(index, "weight_map", read_json_object(index).get("weight_map"), "a table of tensors to files")
        names = sorted(set(texts(index, "weight_map", list(places.values()), "a table of tensors to files")))
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index}: weight_map names {shown(outside[0])}; expected files of this folder")
    else:
        names = [PEFT_FILE if form == PEFT else OWN_FILE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and (folder / PEFT_PICKLE).is_file():
        raise UserError(
            f"{folder}: {PEFT_PICKLE} is a pickle, which may run code and is not read; save the adapter as safetensors"
        )
    if missing or not names:
        raise UserError(f"{folder}: no {', '.join(missing) or 'shard in ' + PADDLE_INDEX} there")
    return [folder / name for name in names]
