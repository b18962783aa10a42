"""Builds the model of a training run from its configuration: base model, and what trains of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import paddle
from paddle import nn

from train.ask.load import load_with_bar
from train.config.schema import TrainConfig
from train.run.say import say
from train.run.state import trainable_parameters
from train.store.hub import resolve_model
from vl2.adapter.folder import check_base, load_factors, open_adapter
from vl2.adapter.foreign import untuned_modules
from vl2.adapter.rows import changed_rows
from vl2.checkpoint.model_folder import ModelFolder, open_folder
from vl2.dtypes import DTYPE_OF_SETTING
from vl2.errors import UserError
from vl2.lora import GroupReport, apply_lora
from vl2.lora_settings import LoRASettings
from vl2.model import DeepseekVL2
from vl2.parameters import init_model, train_parameters
from vl2.tiles import Resolution

# In a part's folder of the checkpoint, but never computed with, or never to be trained.
_NEVER_TRAINED = ("vision.attn_pool.", ".e_score_correction_bias")
PART_PREFIXES = {
    "vision": ("vision.",),
    "projector": ("projector.", "image_newline", "view_seperator"),
    "language": ("language.",),
}


def open_base(config: TrainConfig) -> ModelFolder:
    """The base model's folder; fetched first, where the model is given by its name on the hub.

    Raises:
        UserError: a model that cannot be had, no config.json or tokenizer in its folder.
    """
    return open_folder(resolve_model(config.model.path))


def build_base(config: TrainConfig, folder: ModelFolder) -> DeepseekVL2:
    """The base model, all weights frozen and stored in the run's precision.

    Raises:
        UserError: a folder without weights, or with missing, unknown or wrongly shaped tensors.
    """
    dtype = DTYPE_OF_SETTING[config.precision]
    if config.model.init == "random":
        model = init_model(folder.config, folder.tokenizer.image_id, seed=config.seed, dtype=dtype)
    else:
        model = load_with_bar(folder, dtype)
    if paddle.get_device().startswith("gpu"):
        model.compute_dtype = dtype
    model.set_recompute(config.recompute)
    return model


def make_trainable(
    model: DeepseekVL2, config: TrainConfig, *, candidates: tuple[Resolution, ...], base_fingerprint: str
) -> tuple[nn.Layer, tuple[GroupReport, ...]]:
    """Add the adapters, or with lora.rank 0 unfreeze parts.

    Args:
        model: from `build_base`, changed in place.
        candidates: resolutions in force, which an export writes down.
        base_fingerprint: of `model`; an adapter to start from must have been trained on it.

    Returns:
        (the VL2LoRAModel or the model itself, reports of the LoRA groups).

    Raises:
        UserError: a group that matches nothing, or an adapter (lora.init) that does not fit.
    """
    model.config = dataclasses.replace(model.config, candidate_resolutions=candidates)
    if config.lora.rank == 0:
        train_parameters(model, trained_names((name for name, _ in model.named_parameters()), config.trainable))
        return model, ()
    settings = lora_settings(config)
    lora_model = apply_lora(model, settings, seed=config.seed)
    if config.lora.init:
        check_base(config.lora.init, base_fingerprint)
        adapter = open_adapter(config.lora.init, model)
        check_settings(adapter.settings, settings, config.lora.init)
        if rows := changed_rows(adapter, lambda path: getattr(model, path)):
            raise UserError(
                f"lora.init={config.lora.init}: it has trained {' and '.join(rows)} too, which a run's adapter "
                f"does not hold; merge it with `export run={config.lora.init}` and train on that"
            )
        load_factors(lora_model, adapter)
        if untuned := untuned_modules(adapter):
            say(f"note: lora.init: {untuned}; they start anew", sys.stderr)
    return lora_model, lora_model.reports


def trained_names(names: Iterable[str], parts: Sequence[str]) -> list[str]:
    """Those of a model's parameters that train when `parts` of it do."""
    prefixes = tuple(prefix for part in parts for prefix in PART_PREFIXES[part])
    return [name for name in names if name.startswith(prefixes) and not any(word in name for word in _NEVER_TRAINED)]


def lora_settings(config: TrainConfig) -> LoRASettings:
    """The adapters that a configuration with lora.rank > 0 asks for."""
    return LoRASettings(
        groups=tuple(config.lora.groups),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        ranks=dict(config.lora.ranks),
        alphas=dict(config.lora.alphas),
        rslora=config.lora.rslora,
    )


def check_settings(adapter: LoRASettings, run: LoRASettings, folder: str) -> None:
    """Refuse to start from an adapter whose factors would mean something else under this run's settings.

    Raises:
        UserError: with the keys to give.
    """

    def meaning(settings: LoRASettings) -> dict[str, tuple[int, float]]:
        return {group: (settings.rank_of(group), settings.scaling_of(group)) for group in settings.groups}

    if meaning(adapter) == meaning(run):
        return
    keys = [f"lora.groups=[{','.join(adapter.groups)}] lora.rank={adapter.rank} lora.alpha={adapter.alpha:g}"]
    keys += [f"lora.rslora={str(adapter.rslora).lower()}"] if adapter.rslora != run.rslora else []
    keys += [f"lora.ranks.{group}={rank}" for group, rank in adapter.ranks.items()]
    keys += [f"lora.alphas.{group}={alpha:g}" for group, alpha in adapter.alphas.items()]
    raise UserError(
        f"lora.init={folder}: this adapter has other groups, ranks or scalings than the run and would be another one "
        f"there; give {' '.join(keys)}"
    )


@dataclass(frozen=True, kw_only=True)
class PartCount:
    """Numbers in one part of the model."""

    part: str  # vision, projector (with the two learned rows) or language
    trainable: int
    frozen: int
    stored_bytes: int  # of both


def count_parts(model: nn.Layer) -> tuple[PartCount, ...]:
    """Trainable and frozen numbers of each part; adapters count where their weights lie."""
    trainable = trainable_parameters(model)
    inner = getattr(model, "model", model)
    counts = []
    for part, prefixes in PART_PREFIXES.items():
        parameters = {name: p for name, p in inner.named_parameters() if name.startswith(prefixes)}
        sizes = {name: int(p.size) for name, p in parameters.items()}
        learned = sum(size for name, size in sizes.items() if name in trainable)
        stored = sum(size * parameters[name].element_size() for name, size in sizes.items())
        counts.append(
            PartCount(part=part, trainable=learned, frozen=sum(sizes.values()) - learned, stored_bytes=stored)
        )
    return tuple(counts)
