"""Builds the model of a training run from its configuration: base model, and what trains of it."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import paddle
import paddle.distributed as dist
from paddle import nn
from tqdm import tqdm

from train.ask.load import load_with_bar
from train.ask.model_memory import weight_sizes
from train.config.schema import TrainConfig
from train.run.barrier import barrier
from train.run.say import say
from train.run.shard.layers import SharedLayers
from train.run.shard.partition import layer_of, owners
from train.run.state import trainable_parameters
from train.store.hub import resolve_model
from vl2.adapter.folder import check_base, load_factors, open_adapter
from vl2.adapter.foreign import Piece, untuned_modules
from vl2.adapter.weights import in_words, replacing
from vl2.checkpoint.fingerprint import model_fingerprint, stored_fingerprint
from vl2.checkpoint.model_folder import ModelFolder, open_folder
from vl2.config import VL2Config
from vl2.dtypes import DTYPE_OF_SETTING
from vl2.errors import UserError
from vl2.lora import GroupReport, VL2LoRAModel, apply_lora, deltas
from vl2.lora_settings import LoRASettings
from vl2.model import DeepseekVL2
from vl2.parameter_groups import group_of, is_trainable, whole_parameters
from vl2.parameters import build_model, init_model, train_parameters
from vl2.principal import start_from_principal
from vl2.quantised import Quantised, stored
from vl2.tiles import Resolution

_BAR_MATRICES = 100  # from here on, PiSSA's decompositions take long enough to show a bar
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


def build_base(config: TrainConfig, folder: ModelFolder, *, tower: bool = True) -> DeepseekVL2:
    """The base model, all weights frozen and stored in the run's precision.

    Args:
        config: of the run.
        folder: of the model.
        tower: False leaves the vision tower out until it is called.

    Raises:
        UserError: a folder without weights, or with missing, unknown or wrongly shaped tensors.
    """
    dtype = DTYPE_OF_SETTING[config.precision]
    if config.model.init == "random":
        model = init_model(folder.config, folder.tokenizer.image_id, seed=config.seed, dtype=dtype)
    else:
        model = load_with_bar(
            folder,
            dtype,
            keeps(config, folder.config),
            tower=tower,
            frozen=config.model.frozen,
            frozen_cache=Path(config.model.frozen_cache) if config.model.frozen_cache else None,
            trains=set(own_names(weight_sizes(build_model(folder.config, 0)), config)).__contains__,
        )
    if paddle.get_device().startswith("gpu"):
        model.compute_dtype = dtype
    model.set_recompute(config.recompute)
    return model


def base_fingerprint(config: TrainConfig, folder: ModelFolder, model: DeepseekVL2, *, tower: bool = True) -> str:
    """`model_fingerprint` of the base model, also where some of its weights are not here or not in full.

    Args:
        tower: the vision tower is.
    """
    if config.model.init != "random" and (config.sharding.stage == 3 or config.model.frozen != "none" or not tower):
        return stored_fingerprint(folder.weights, DTYPE_OF_SETTING[config.precision])
    return model_fingerprint(model)


def keeps(config: TrainConfig, model: VL2Config) -> Callable[[str], bool]:
    """Whether this process keeps a weight of the base: at sharding.stage=3 not those of a layer that others own."""
    if config.sharding.stage < 3:
        return lambda path: True
    sizes = weight_sizes(build_model(model, 0))
    trained = {name: sizes[name] for name in trained_names(sizes, config.trainable)}
    owner = owners(trained, config.nproc * config.nnodes)
    return lambda path: layer_of(path) is None or owner.get(path, dist.get_rank()) == dist.get_rank()


def share_layers(model: nn.Layer, config: TrainConfig) -> SharedLayers | None:
    """Let the processes share the decoder layers of a model that is ready to be trained; None below stage 2."""
    if config.sharding.stage < 2:
        return None
    shared = SharedLayers(
        trainable_parameters(model),
        config.sharding.stage,
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        # gloo gives up after 30 seconds, and one process's pack may take longer than another's.
        meet=barrier if paddle.get_device() == "cpu" else lambda: None,
    )
    if not shared.names:
        return None  # nothing of them trains
    inner = model.model if isinstance(model, VL2LoRAModel) else model
    inner.language.model.shared_weights = shared
    return shared


def make_trainable(
    model: DeepseekVL2,
    config: TrainConfig,
    *,
    candidates: tuple[Resolution, ...],
    base_fingerprint: str,
    resumed: bool = False,
) -> tuple[nn.Layer, tuple[GroupReport, ...]]:
    """Add the adapters and unfreeze the groups beside them, or with lora.rank 0 unfreeze parts.

    Args:
        model: from `build_base`, changed in place.
        candidates: resolutions in force, which an export writes down.
        base_fingerprint: of `model`; an adapter to start from must have been trained on it.
        resumed: a checkpoint will set what trains, so that no weight needs to be decomposed for PiSSA.

    Returns:
        (the VL2LoRAModel or the model itself, reports of the LoRA groups).

    Raises:
        UserError: a group that matches nothing, or an adapter (lora.init) that does not fit.
    """
    model.config = dataclasses.replace(model.config, candidate_resolutions=candidates)
    if config.lora.rank == 0:
        train_parameters(model, own_names(dict(model.named_parameters()), config))
        return model, ()
    settings = lora_settings(config)
    parameters = dict(model.named_parameters())
    whole = own_names(parameters, config)
    adapter, weights = None, dict[str, Piece]()
    if config.lora.init:
        check_base(config.lora.init, base_fingerprint)
        adapter = open_adapter(config.lora.init, model)
        check_settings(adapter.settings, settings, config.lora.init)
        weights = replacing(adapter, parameters.__getitem__)
        if left := [path for path in weights if path not in whole]:
            raise UserError(
                f"lora.init={config.lora.init}: it has trained {in_words(left)} too, which this run's adapter would "
                f"not hold; name {' and '.join(sorted(set(map(group_of, left))))} in lora.also_train, or merge it with "
                f"`export run={config.lora.init}` and train on that"
            )
    lora_model = apply_lora(model, settings, seed=config.seed)
    train_parameters(model, whole)
    if adapter:
        load_factors(lora_model, adapter)
        trainable = trainable_parameters(lora_model)
        for path, piece in weights.items():
            trainable[path].set_value(piece.read())
        if untuned := untuned_modules(adapter):
            say(f"note: lora.init: {untuned}; they start anew", sys.stderr)
    if settings.pissa and not resumed:
        decompose(lora_model, config.seed)
    return lora_model, (*lora_model.reports, *whole_reports(model, settings))


def decompose(lora_model: VL2LoRAModel, seed: int) -> None:
    """PiSSA's start, by rank 0 for all: other processors would decompose to other last digits. With a bar on stderr."""
    if dist.get_rank() == 0:
        matrices = len(deltas(lora_model))
        style = {"desc": "decompose weights", "unit": "matrix", "mininterval": 1.0, "file": sys.stderr}
        with tqdm(total=matrices, disable=matrices < _BAR_MATRICES, **style) as bar:
            start_from_principal(lora_model, seed=seed, done=bar.update)
    if dist.get_world_size() > 1:
        barrier()
        for factor in (*lora_model.factors().values(), *lora_model.starts().values()):
            dist.broadcast(factor, src=0)


def whole_reports(model: nn.Layer, settings: LoRASettings) -> tuple[GroupReport, ...]:
    """What trains itself beside the adapters."""
    reports = []
    for group in settings.also_train:
        sizes = {name: math.prod(p.shape) for name, p in model.named_parameters()}
        names = whole_parameters(sizes, [group])
        if not names:
            raise UserError(f"lora.also_train: {group!r} matches nothing in this model; take it out")
        numbers = sum(map(sizes.__getitem__, names))
        reports.append(GroupReport(group=group, rank=0, modules=len(names), parameters=numbers))
    return tuple(reports)


def own_names(names: Iterable[str], config: TrainConfig) -> list[str]:
    """Those of a base model's parameters that train themselves in a run: all that train, or those beside adapters."""
    if config.lora.rank == 0:
        return trained_names(names, config.trainable)
    return whole_parameters(names, config.lora.also_train)


def trained_names(names: Iterable[str], parts: Sequence[str]) -> list[str]:
    """Those of a model's parameters that train when `parts` of it do."""
    prefixes = tuple(prefix for part in parts for prefix in PART_PREFIXES[part])
    return [name for name in names if name.startswith(prefixes) and is_trainable(name)]


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
        pissa=config.lora.pissa,
        also_train=tuple(config.lora.also_train),
    )


def check_settings(adapter: LoRASettings, run: LoRASettings, folder: str) -> None:
    """Refuse to start from an adapter whose factors would mean something else under this run's settings.

    Raises:
        UserError: with the keys to give.
    """

    def meaning(settings: LoRASettings) -> dict[str, tuple[int, float]]:
        return {group: (settings.rank_of(group), settings.scaling_of(group)) for group in settings.groups}

    if adapter.pissa:
        raise UserError(
            f"lora.init={folder}: an adapter of PiSSA means something together with where it started only; give what "
            f"`export run={folder} adapter=peft` makes of it, plain LoRA of rank {2 * adapter.rank}"
        )
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
        here = sum(map(_bytes_here, parameters.values()))
        frozen = sum(sizes.values()) - learned
        counts.append(PartCount(part=part, trainable=learned, frozen=frozen, stored_bytes=here))
    return tuple(counts)


def _bytes_here(parameter: paddle.Tensor) -> int:
    kept = stored(parameter)
    if isinstance(kept, Quantised):
        return kept.num_bytes
    return int(kept.size) * kept.element_size() if kept._is_initialized() else 0
