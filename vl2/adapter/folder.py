"""An adapter on disk: written as a run does, read from any of the three formats, put on its base.

A run writes the factors as safetensors under PaddleNLP's names, experts stacked, and lora_config.json. The readers are
our own and strict: PaddleNLP's accepts a half-missing, wrongly shaped adapter without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from paddle import nn

from vl2.adapter.foreign import Adapter, Piece, open_foreign, untuned_modules
from vl2.adapter.formats import (
    ENTRY,
    OWN,
    OWN_FILE,
    PADDLE,
    PADDLE_CONFIG,
    PEFT,
    adapter_format,
    adapter_metadata,
    adapter_tensors,
)
from vl2.adapter.paddle_format import PADDLE_NAMES, read_paddle_config
from vl2.adapter.peft_format import PEFT_NAMES, read_peft_config
from vl2.adapter.rows import ROWS, changed_rows, in_type_of
from vl2.adapter.slots import UNTUNED, difference, factor_shapes, slots
from vl2.adapter.values import alpha, dropout, flag, rank, table, text, texts
from vl2.checkpoint.tensor_files import write_safetensors
from vl2.errors import UserError
from vl2.json_object import read_json_object
from vl2.lora import VL2LoRAModel, apply_lora
from vl2.lora_settings import LoRASettings
from vl2.parameters import set_parameter

_LATER = {"rslora": False}  # settings that adapters of an earlier version were made without


def save_adapter(
    lora_model: VL2LoRAModel,
    folder: str | Path,
    metadata: Mapping[str, Any],
    factors: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write the factors and lora_config.json into an existing folder.

    Args:
        lora_model: its factors are written in float32.
        folder: not made safe against interruption here, see train.store.whole_folder.
        metadata: JSON values to find again in `Adapter.metadata`.
        factors: values they had at some time, by the names of `VL2LoRAModel.factors`; None: what they are now.
    """
    folder = Path(folder)
    if factors is None:
        factors = {name: p.numpy() for name, p in lora_model.factors().items()}
    write_safetensors(folder / OWN_FILE, factors, dict.fromkeys(factors, "float32"))
    document = {
        **lora_model.lora_config.to_dict(),  # what PaddleNLP reads
        "scaling": lora_model.lora_config.scaling,
        ENTRY: {"settings": asdict(lora_model.settings), "metadata": dict(metadata)},
    }
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / PADDLE_CONFIG).write_text(text + "\n", encoding="utf-8")


def open_adapter(folder: str | Path, model: nn.Layer) -> Adapter:
    """Look at an adapter of any format; every name and shape is checked against the model, no weights are read.

    Args:
        folder: of the adapter.
        model: its base, a DeepseekVL2 with or without factors; weights need not be in memory.

    Raises:
        UserError: no adapter there, settings that cannot be read here, or weights that do not fit the settings and
            the model; lists the names.
    """
    folder = Path(folder)
    metadata = adapter_metadata(folder)
    form = adapter_format(folder)
    if form != OWN:
        read, names = (read_peft_config, PEFT_NAMES) if form == PEFT else (read_paddle_config, PADDLE_NAMES)
        found, tensors = slots(model), adapter_tensors(folder, str(form))
        rows = {name: tensors.pop(name) for name in ROWS if form == PADDLE and name in tensors}
        if lines := difference({name: t.shape for name, t in rows.items()}, {n: getattr(model, n).shape for n in rows}):
            raise UserError("\n".join([f"{folder}: the adapter and the base model do not fit", *lines]))
        declared = read(folder, (*found, *UNTUNED))
        return replace(open_foreign(folder, tensors, declared, names, found, metadata), rows=rows)
    stored, settings = adapter_tensors(folder, OWN), _own_settings(folder)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if lines := difference(shapes, factor_shapes(settings, slots(model))):
        where = folder / OWN_FILE
        raise UserError("\n".join([f"{where}: the adapter does not fit the model and its LoRA groups", *lines]))
    pieces = {name: (Piece(tensor),) for name, tensor in stored.items()}
    return Adapter(folder=folder, settings=settings, metadata=metadata, shapes=shapes, pieces=pieces)


def _own_settings(folder: Path) -> LoRASettings:
    path = folder / PADDLE_CONFIG
    where = f"{ENTRY}.settings"
    entry = table(path, where, read_json_object(path)[ENTRY].get("settings"), "the settings of an adapter made here")
    entry = {**_LATER, **entry}
    if strange := entry.keys() ^ {field.name for field in fields(LoRASettings)}:
        raise UserError(
            f"{path}: not the configuration of an adapter made here ({where} has or lacks {', '.join(sorted(strange))})"
        )
    ranks, alphas = (table(path, f"{where}.{key}", entry[key], "a table of groups") for key in ("ranks", "alphas"))
    try:
        return LoRASettings(
            groups=tuple(texts(path, f"{where}.groups", entry["groups"], "a list of groups")),
            rank=rank(path, f"{where}.rank", entry["rank"]),
            alpha=alpha(path, f"{where}.alpha", entry["alpha"]),
            dropout=dropout(path, f"{where}.dropout", entry["dropout"]),
            ranks={group: rank(path, f"{where}.ranks.{group}", value) for group, value in ranks.items()},
            alphas={group: alpha(path, f"{where}.alphas.{group}", value) for group, value in alphas.items()},
            rslora=flag(path, f"{where}.rslora", entry["rslora"]),
        )
    except UserError as error:
        if str(error).startswith(str(path)):
            raise
        raise UserError(f"{path}: {error}") from error


def load_factors(lora_model: VL2LoRAModel, adapter: Adapter) -> None:
    """Set the factors of a model from an adapter; nothing is changed unless every name and shape fits.

    Modules that a foreign adapter leaves out of a group keep their A, and their B, which is zero in a new model.

    Raises:
        UserError: listing the missing, unknown and wrongly shaped names.
    """
    factors = lora_model.factors()
    if lines := difference(adapter.shapes, {name: p.shape for name, p in factors.items()}):
        raise UserError("\n".join([f"{adapter.folder}: the adapter does not fit the model's LoRA groups", *lines]))
    for name, parameter in factors.items():
        parameter.set_value(adapter.factor(name, parameter.numpy()))


def load_adapter(
    model: nn.Layer,
    folder: str | Path,
    *,
    base_fingerprint: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> VL2LoRAModel:
    """Put an adapter on its base model.

    Args:
        model: a DeepseekVL2, changed in place.
        folder: of the adapter, in any format.
        base_fingerprint: of `model`; compared with the adapter's where both are known.
        say: told what the adapter does not tune of its groups, and what it replaces of the base.

    Raises:
        UserError: when the adapter was trained on another base, or does not fit.
    """
    check_base(folder, base_fingerprint)
    adapter = open_adapter(folder, model)
    lora_model = apply_lora(model, adapter.settings)
    load_factors(lora_model, adapter)
    for name, row in changed_rows(adapter, lambda path: getattr(model, path)).items():
        set_parameter(model, name, in_type_of(getattr(model, name), row))
        say(f"{folder}: the adapter has a trained {name}, which replaces the base's")
    if untuned := untuned_modules(adapter):
        say(f"{untuned}; they compute as in the base")
    lora_model.eval()
    return lora_model


def check_base(folder: str | Path, base_fingerprint: str | None) -> None:
    """Refuse an adapter that says it was trained on another base; one trained elsewhere says nothing.

    Raises:
        UserError: with both fingerprints.
    """
    metadata = adapter_metadata(folder)
    expected = text(Path(folder), "base_fingerprint of its metadata", metadata.get("base_fingerprint"))
    if base_fingerprint and expected and base_fingerprint != expected:
        raise UserError(
            f"{folder}: this adapter was trained on another base model ({metadata.get('base')}, fingerprint "
            f"{expected[:12]}; the model given has {base_fingerprint[:12]})"
        )
