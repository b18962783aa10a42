"""A run's checkpoints while it trains: copied, then written, counted and pruned while the next steps are made."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import paddle.distributed as dist
from paddle import nn

from train.config.compose import to_yaml
from train.config.schema import TrainConfig
from train.run.background import Background
from train.run.clock import Deadline
from train.run.optim import optimizer_state
from train.run.say import say
from train.run.shard.group import shard_degree
from train.run.shard.layers import SharedLayers
from train.run.shard.parts import leave_part, parts_folder, sweep_parts, take_parts
from train.run.state import HostState, copy_state, save_state, trained_values
from train.run.stop import check_peers
from train.run.trainer import VL2Trainer
from train.run.validation import Validation
from train.store.checkpoints import checkpoint_path, prune
from train.store.names import CHECKPOINTS, MARKER
from train.store.provenance import Provenance
from train.store.run_dir import update_marker
from train.store.run_state import History, Identity
from train.store.whole_folder import write_folder
from vl2.errors import UserError


class Saver:
    """Saves a trainer's state each time it is called, on every rank.

    The state is copied to the host at once; a thread of rank 0 writes it, while all go on, and where several processes
    share the optimizer, a thread of each writes its part. A second checkpoint waits until the first is written. What
    goes wrong in the thread is raised by the next `check`, `join` or call.

    Args:
        config: of the run.
        model: that is trained.
        identity: see train.run.identity.
        history: of the steps so far, which the trainer goes on writing.
        provenance: of the run's weights.
        wandb_id: of the run on wandb.
        deadline: of the run, told of each checkpoint that is written.
        validation: of the run, whose best checkpoint stays; None: there is none.
        shared: the layers whose weights other processes may keep; None: there are none.
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
        deadline: Deadline,
        validation: Validation | None = None,
        shared: SharedLayers | None = None,
    ):
        self.config, self.model, self.identity = config, model, identity
        self.history, self.provenance, self.wandb_id = history, provenance, wandb_id
        self.validation, self.deadline, self.shared = validation, deadline, shared
        self.run_dir = Path(config.run_dir)
        self.shard_degree = shard_degree(config)
        self._writing = Background("checkpoint")
        if dist.get_rank() == 0:
            sweep_parts(self.run_dir / CHECKPOINTS)

    def __call__(self, trainer: VL2Trainer) -> None:
        """Copy the step that was just made, and begin to write it; whoever needs it on the disk calls `join`."""
        self.join()  # before the copy: one at a time in memory
        rank, root = dist.get_rank(), self.run_dir / CHECKPOINTS
        weights = trained_values(self.model, self.shared)
        if rank > 0:
            if rank < self.shard_degree:
                part = optimizer_state(trainer.optimizer, trainer.parameters)
                waiting = parts_folder(root, trainer.state.global_step)
                self._writing.start(lambda: leave_part(waiting, part, rank, self.shard_degree))
            return
        state = self._copy(trainer, weights)
        self.deadline.saving_begins()
        self._writing.start(lambda: self._write(state))

    def rescue(self, trainer: VL2Trainer) -> Path | None:
        """Save the last step of a run that ends with an error, in whichever process is left first.

        Returns:
            The checkpoint; None: there is nothing new to save, or it cannot be put together here.
        """
        target = checkpoint_path(self.run_dir / CHECKPOINTS, trainer.state.global_step)
        here = trainer.is_whole and (self.run_dir / MARKER).is_file() and self.shard_degree == 1
        if not here or trainer.state.global_step == 0 or target.exists():
            return None
        try:
            weights = {name: p.numpy() for name, p in trainer.parameters.items()}  # whichever rank this is
            self._write(self._copy(trainer, weights))
        except (UserError, OSError) as problem:  # the disk is full, or another process saves it
            say(f"error: step {trainer.state.global_step} could not be saved: {problem}", sys.stderr)
            return None
        return target

    def check(self) -> None:
        """Raise what went wrong in writing, as soon as it is known."""
        self._writing.check()

    def join(self) -> None:
        """Wait until what was saved is on the disk, under its name."""
        self._writing.join()

    def _copy(self, trainer: VL2Trainer, weights: dict[str, np.ndarray]) -> HostState:
        return copy_state(
            self.model,
            trainer.optimizer,
            weights=weights,
            history=self.history,
            trainer_state=trainer.state,
            scaler=trainer.scaler.state_dict() if trainer.scaler is not None else None,
            validation=self.validation.state if self.validation else None,
        )

    def _write(self, state: HostState) -> None:
        """In this order: whatever ends the process, a whole checkpoint is there, and the marker knows of no other."""
        root, started = self.run_dir / CHECKPOINTS, time.monotonic()
        write_folder(checkpoint_path(root, state.step), lambda folder: self._fill(folder, state))
        best = state.validation.best if state.validation else None
        update_marker(self.run_dir, step=state.step, best=best)
        prune(root, self.config.keep_checkpoints, best.step if best else None)
        self.deadline.saving_took(time.monotonic() - started)

    def _fill(self, folder: Path, state: HostState) -> None:
        save_state(
            folder,
            state,
            model=self.model,
            identity=self.identity,
            provenance=self.provenance,
            config_yaml=to_yaml(self.config),
            wandb_id=self.wandb_id,
            shard_degree=self.shard_degree,
        )
        take_parts(parts_folder(self.run_dir / CHECKPOINTS, state.step), folder, self.shard_degree, check_peers)
