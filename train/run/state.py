"""What a checkpoint of a run holds, written and read: trained weights, optimizer, step, history.

    adapter/ or weights/     the trained weights, as a finished run has them
    optimizer.safetensors    AdamW's state by structured name; of several processes that share it a file each
    state.json               step, identity, history, fp16 scale, versions
    trainer_state.json       what paddlenlp's Trainer counts by
    config.yaml              the resolved configuration

There is no RNG state: randomness is a function of (seed, step, pack).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn
from paddle.optimizer import Optimizer
from paddlenlp.trainer import TrainerState

from train.run.optim import optimizer_state, set_optimizer_state
from train.run.shard.layers import SharedLayers
from train.run.shard.parts import part_name, stored_state, write_part
from train.store.facts import read_fact, to_document, write_fact
from train.store.names import (
    ADAPTER,
    CONFIG_FILE,
    STATE_FILE,
    TRAINER_STATE_FILE,
    WEIGHTS,
    WEIGHTS_FILE,
    WEIGHTS_METADATA,
)
from train.store.provenance import Provenance
from train.store.run_state import CheckpointState, History, Identity, ValidationState
from train.store.versions import versions
from vl2.adapter.folder import load_factors, open_adapter, save_adapter
from vl2.checkpoint.tensor_files import read_header, write_safetensors
from vl2.errors import UserError
from vl2.lora import VL2LoRAModel


def trainable_parameters(model: nn.Layer) -> dict[str, paddle.Tensor]:
    """Trainable parameters by their path in the DeepseekVL2, whether or not it is wrapped for LoRA."""
    inner = model.model if isinstance(model, VL2LoRAModel) else model
    return {name: p for name, p in inner.named_parameters() if not p.stop_gradient}


def trained_folder(parent: Path, model: nn.Layer) -> Path:
    """Where the trained weights of a model lie in a run's or a checkpoint's folder."""
    return parent / (ADAPTER if isinstance(model, VL2LoRAModel) else WEIGHTS)


def trained_values(model: nn.Layer, shared: SharedLayers | None = None) -> dict[str, np.ndarray]:
    """Copies of the trained weights on the host, float32, by the names of `trainable_parameters`; empty but on rank 0.

    Collective where `shared` has weights that other processes keep.
    """
    parameters, wanted = trainable_parameters(model), dist.get_rank() == 0
    if shared is not None and shared.moves_weights:
        return shared.host_copy(parameters, wanted=wanted)
    return {name: p.numpy() for name, p in parameters.items()} if wanted else {}


def save_trained(model: nn.Layer, folder: Path, provenance: Provenance, values: Mapping[str, np.ndarray]) -> None:
    """Write the trained weights into an existing folder.

    Args:
        model: a VL2LoRAModel, or a DeepseekVL2 with trainable parameters.
        provenance: lies beside the weights.
        values: of `trained_values`.
    """
    if isinstance(model, VL2LoRAModel):
        save_adapter(model, folder, to_document(provenance), values)
        return
    write_safetensors(folder / WEIGHTS_FILE, values, dict.fromkeys(values, "float32"))
    write_fact(folder / WEIGHTS_METADATA, provenance)


def load_trained(model: nn.Layer, folder: Path) -> None:
    """Set the trainable weights of a model from a folder that `save_trained` filled.

    Raises:
        UserError: listing names that are missing, unknown or wrongly shaped.
    """
    if isinstance(model, VL2LoRAModel):
        adapter = open_adapter(folder, model.model)
        load_factors(model, adapter)
        trainable = trainable_parameters(model)
        for name, piece in adapter.weights.items():
            trainable[name].set_value(piece.read())
        return
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no trained weights there")
    stored, parameters = read_header(path)[0], trainable_parameters(model)
    wrong = sorted(
        name
        for name in stored.keys() | parameters.keys()
        if name not in stored or name not in parameters or list(stored[name].shape) != list(parameters[name].shape)
    )
    if wrong:
        raise UserError(
            f"{path}: the weights do not fit what trains (missing, unknown or shaped otherwise): {wrong[:10]}"
        )
    for name, parameter in parameters.items():
        if parameter._is_initialized():  # another process keeps the others
            parameter.set_value(stored[name].read())


@dataclass(frozen=True, kw_only=True)
class HostState:
    """What changes from step to step of what a checkpoint holds: a copy on the host, which no later step touches."""

    step: int  # optimizer steps made
    weights: dict[str, np.ndarray]  # of `trained_values`
    optimizer: dict[str, np.ndarray]  # of `optimizer_state`: this process's part
    history: History
    trainer_state: TrainerState
    scaler: dict[str, Any] | None  # state of the fp16 loss scaler
    validation: ValidationState | None


def copy_state(
    model: nn.Layer,
    optimizer: Optimizer,
    *,
    weights: dict[str, np.ndarray],
    history: History,
    trainer_state: TrainerState,
    scaler: Mapping[str, Any] | None = None,
    validation: ValidationState | None = None,
) -> HostState:
    """Copy what the next step will change.

    Args:
        weights: of `trained_values`.
        history, trainer_state: of the steps made.
        scaler: state of the fp16 loss scaler.
        validation: how far it is.
    """
    counts = copy.copy(trainer_state)
    counts.log_history = list(trainer_state.log_history)
    return HostState(
        step=trainer_state.global_step,
        weights=weights,
        optimizer=optimizer_state(optimizer, trainable_parameters(model)),
        history=replace(history, losses=list(history.losses)),
        trainer_state=counts,
        scaler={**scaler, "scale": scaler["scale"].tolist()} if scaler else None,
        validation=validation,
    )


def save_state(
    folder: Path,
    state: HostState,
    *,
    model: nn.Layer,
    identity: Identity,
    provenance: Provenance,
    config_yaml: str,
    wandb_id: str,
    shard_degree: int = 1,
) -> None:
    """Fill a checkpoint folder; the other processes that share the optimizer add theirs, see train.run.shard.parts.

    Args:
        state: of the step; nothing is read of the model's weights, which may be further already.
        model: that is trained.
        identity: see train.run.identity.
        provenance: of the weights.
        wandb_id: of the run on wandb.
        shard_degree: processes that share the optimizer; this is the first of them.
    """
    trained_folder(folder, model).mkdir()
    save_trained(model, trained_folder(folder, model), replace(provenance, step=state.step), state.weights)
    write_part(folder / part_name(0, shard_degree), state.optimizer)
    facts = CheckpointState(
        step=state.step,
        identity=identity,
        history=state.history,
        scaler=state.scaler,
        wandb_id=wandb_id,
        versions=versions(),
        validation=state.validation,
    )
    write_fact(folder / STATE_FILE, facts)
    state.trainer_state.save_to_json(str(folder / TRAINER_STATE_FILE))
    (folder / CONFIG_FILE).write_text(config_yaml, encoding="utf-8")


def load_optimizer(
    folder: Path, optimizer: Optimizer, parameters: Mapping[str, paddle.Tensor]
) -> tuple[int, dict[str, Any] | None]:
    """Set the optimizer from a checkpoint, whatever number of processes wrote it.

    Returns:
        (optimizer steps made, state of the fp16 scaler if there was one).

    Raises:
        UserError: when the state is that of other weights.
    """
    set_optimizer_state(optimizer, parameters, stored_state(folder))
    state = read_fact(CheckpointState, folder / STATE_FILE)
    return state.step, state.scaler
