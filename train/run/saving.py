"""A run's checkpoints while it trains: written, counted, pruned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import paddle.distributed as dist
from paddle import nn

from train.config.compose import to_yaml
from train.config.schema import TrainConfig
from train.run.barrier import barrier
from train.run.state import save_state
from train.run.trainer import VL2Trainer
from train.store.checkpoints import checkpoint_path, prune
from train.store.names import CHECKPOINTS
from train.store.provenance import Provenance
from train.store.run_dir import update_marker
from train.store.run_state import History, Identity
from train.store.whole_folder import write_folder


class Saver:
    """Writes a checkpoint of a trainer's state each time it is called, on every rank.

    Args:
        config: of the run.
        model: that is trained.
        identity: see train.run.identity.
        history: of the steps so far, which the trainer goes on writing.
        provenance: of the run's weights.
        wandb_id: of the run on wandb.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: nn.Layer,
        identity: Identity,
        history: History,
        provenance: Provenance,
        wandb_id: str,
    ):
        self.config, self.model, self.identity = config, model, identity
        self.history, self.provenance, self.wandb_id = history, provenance, wandb_id
        self.run_dir = Path(config.run_dir)

    def __call__(self, trainer: VL2Trainer) -> None:
        """Save the step that was just made; all ranks go on together afterwards."""
        step, root = trainer.state.global_step, self.run_dir / CHECKPOINTS
        if dist.get_rank() == 0:
            write_folder(checkpoint_path(root, step), lambda folder: self._write(folder, trainer))
            prune(root, self.config.keep_checkpoints)
            update_marker(self.run_dir, step=step)
        barrier()

    def _write(self, folder: Path, trainer: VL2Trainer) -> None:
        step = trainer.state.global_step
        save_state(
            folder,
            model=self.model,
            optimizer=trainer.optimizer,
            step=step,
            identity=self.identity,
            history=self.history,
            provenance=replace(self.provenance, step=step),
            config_yaml=to_yaml(self.config),
            wandb_id=self.wandb_id,
            scaler=trainer.scaler.state_dict() if trainer.scaler is not None else None,
        )
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
