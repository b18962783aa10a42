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
import paddle
from paddle import nn

from vl2.adapter.foreign import Adapter, Piece, open_foreign, untuned_modules
from vl2.adapter.formats import (
    ENTRY,
    OWN,
    OWN_FILE,
    PADDLE_CONFIG,
    PEFT,
    adapter_format,
    adapter_metadata,
    adapter_tensors,
)
from vl2.adapter.paddle_format import PADDLE_NAMES, read_paddle_config
from vl2.adapter.peft_format import PEFT_NAMES, PEFT_PREFIX, read_peft_config
from vl2.adapter.slots import UNTUNED, difference, factor_shapes, slots
from vl2.adapter.values import alpha, dropout, flag, rank, table, text, texts
from vl2.adapter.weights import ROWS, in_words, replacing, take_weights, whole_parts
from vl2.checkpoint.layouts import Layout
from vl2.checkpoint.tensor_files import write_safetensors
from vl2.errors import UserError
from vl2.json_object import read_json_object
from vl2.lora import VL2LoRAModel, apply_lora
from vl2.lora_settings import LoRASettings
from vl2.parameter_groups import whole_parameters
from vl2.parameters import set_parameter

# Settings that adapters of an earlier version were made without.
_LATER = {"rslora": False, "pissa": False, "also_train": []}


def save_adapter(
    lora_model: VL2LoRAModel,
    folder: str | Path,
    metadata: Mapping[str, Any],
    trained: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write the factors, what else trains and lora_config.json into an existing folder.

    Args:
        lora_model: all is written in float32.
        folder: not made safe against interruption here, see train.store.whole_folder.
        metadata: JSON values to find again in `Adapter.metadata`.
        trained: values that factors and weights had at some time, by their paths; None: what they are now.
    """
    folder = Path(folder)
    if trained is None:
        trained = {name: p.numpy() for name, p in lora_model.model.named_parameters() if not p.stop_gradient}
    tensors = {**trained, **{name: p.numpy() for name, p in lora_model.starts().items()}}
    write_safetensors(folder / OWN_FILE, tensors, dict.fromkeys(tensors, "float32"))
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
        model: its base, a DeepseekVL2; weights need not be in memory. It may have factors where the adapter is ours.

    Raises:
        UserError: no adapter there, settings that cannot be read here, or weights that do not fit the settings and
            the model; lists the names.
    """
    folder = Path(folder)
    metadata = adapter_metadata(folder)
    form = adapter_format(folder)
    if form != OWN:
        return _open_foreign(folder, str(form), model, metadata)
    stored, settings = adapter_tensors(folder, OWN), _own_settings(folder)
    base = {name: p.shape for name, p in model.named_parameters()}
    factors = factor_shapes(settings, slots(model))
    whole = {name: tuple(base[name]) for name in whole_parameters(base, settings.also_train)}
    if lines := difference({name: tensor.shape for name, tensor in stored.items()}, {**factors, **whole}):
        where = folder / OWN_FILE
        raise UserError("\n".join([f"{where}: the adapter does not fit the model and its LoRA groups", *lines]))
    return Adapter(
        folder=folder,
        settings=settings,
        metadata=metadata,
        shapes=factors,
        pieces={name: (Piece(stored[name]),) for name in factors},
        weights={name: Piece(stored[name]) for name in whole},
    )


def _open_foreign(folder: Path, form: str, model: nn.Layer, metadata: Mapping[str, Any]) -> Adapter:
    found, tensors = slots(model), adapter_tensors(folder, form)
    layout: Layout = "hf" if form == PEFT else "paddle"
    modules, parameters = (*found, *UNTUNED), [*whole_parts(model, layout)]
    rows: tuple[str, ...] = ()
    if form == PEFT:
        declared, names, prefix = read_peft_config(folder, modules, parameters), PEFT_NAMES, PEFT_PREFIX
    else:
        declared, names, prefix = read_paddle_config(folder, modules, parameters), PADDLE_NAMES, ""
        rows = tuple(name for name in ROWS if name in tensors)
    weights = take_weights(folder, tensors, sorted({*declared.whole, *rows}), prefix, model, layout)
    return replace(open_foreign(folder, tensors, declared, names, found, metadata), weights=weights)


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
            pissa=flag(path, f"{where}.pissa", entry["pissa"]),
            also_train=tuple(texts(path, f"{where}.also_train", entry["also_train"], "a list of groups")),
        )
    except UserError as error:
        if str(error).startswith(str(path)):
            raise
        raise UserError(f"{path}: {error}") from error


def load_factors(lora_model: VL2LoRAModel, adapter: Adapter) -> None:
    """Set the factors of a model from an adapter, of PiSSA where they started too; all is looked at before.

    Modules that a foreign adapter leaves out of a group keep their A, and their B, which is zero in a new model.

    Raises:
        UserError: listing the missing, unknown and wrongly shaped names.
    """
    factors = {**lora_model.factors(), **lora_model.starts()}
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
    parameters = dict(model.named_parameters())
    weights = replacing(adapter, parameters.__getitem__)
    for name, piece in weights.items():
        set_parameter(model, name, paddle.to_tensor(piece.read()))  # float32, as it was trained
    if weights and not adapter.settings.also_train:
        say(f"{folder}: the adapter has its own {in_words([*weights])} in place of the base's")
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
