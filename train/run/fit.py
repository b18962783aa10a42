"""The optimizer steps of a run, with all that goes on around them: log, checkpoints, signals."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle.distributed as dist
from paddle import nn
from paddlenlp.trainer import TrainerCallback

from data.packs import PackDataset
from train.config.schema import TrainConfig
from train.run.barrier import barrier
from train.run.build_data import Data
from train.run.clock import Deadline
from train.run.gradients import gather_rows
from train.run.memory import SAVED_BYTES
from train.run.saving import Saver
from train.run.say import say
from train.run.shard.layers import SharedLayers
from train.run.state import trainable_parameters
from train.run.stop import TIME_IS_UP, WORKER_KILLED, PeerLost, StopRequest, peer_lost
from train.run.trainer import VL2Trainer
from train.run.validation import Validation
from train.run.watch.log import MetricsLog
from train.run.watch.step_metrics import StepMetrics
from train.store.checkpoints import checkpoint_path
from train.store.names import CHECKPOINTS
from train.store.provenance import Provenance
from train.store.run_dir import update_marker
from train.store.run_state import History, Identity
from vl2.errors import UserError

_NOTICE_SECONDS = 2  # gloo's error may be here before the launcher's word that a process is gone


def fit(
    config: TrainConfig,
    data: Data,
    model: nn.Layer,
    who: Identity,
    provenance: Provenance,
    checkpoint: Path | None,
    first_step: int,
    history: History,
    wandb_id: str,
    log: MetricsLog | None,
    validation: Validation | None,
    shared: SharedLayers | None,
    callbacks: Sequence[TrainerCallback],
) -> int:
    """The optimizer steps. Returns the exit code of what stopped them, 0 when they came to their end."""
    run_dir, first = Path(config.run_dir), dist.get_rank() == 0
    root = run_dir / CHECKPOINTS

    trained = sum(int(parameter.size) for parameter in trainable_parameters(model).values())
    deadline = Deadline(
        config.max_minutes,
        saved_bytes=SAVED_BYTES * trained,
        validation=validation.seconds if validation and validation.due else 0.0,
    )
    save = Saver(
        config,
        model=model,
        identity=who,
        history=history,
        provenance=provenance,
        wandb_id=wandb_id,
        validation=validation,
        shared=shared,
        deadline=deadline,
    )

    def after_step(metrics: StepMetrics) -> None:
        save.check()
        if log is not None:
            log.write(metrics)

    def save_and_tell(trainer: VL2Trainer) -> None:
        save(trainer)
        if log is not None:
            log.saved()

    packs = PackDataset(
        data.dataset.records,
        data.plan,
        data.dataset.sizes,
        data.tokenizer,
        data.candidates,
        images=data.images,
        num_ranks=dist.get_world_size(),
        on_bad_record=config.data.on_bad_record,  # type: ignore[arg-type]  # checked by the schema
        max_bad=config.data.max_bad,
        vision_cache=data.vision_cache,
    )
    with StopRequest() as stop:
        trainer = VL2Trainer(
            model,
            config=config,
            plan=data.plan,
            dataset=packs,
            stop=stop,
            deadline=deadline,
            on_step=after_step,
            save=save_and_tell,
            history=history,
            sources=data.sources,
            validation=validation,
            shared=shared,
            callbacks=callbacks,
        )
        try:
            barrier()  # wandb may have kept rank 0
            if log is not None:
                log.begin()
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            save.join()
        except BaseException as problem:
            _end_saving(save, problem)
            if isinstance(problem, Exception) and not isinstance(problem, FloatingPointError):
                lost = dist.get_world_size() > 1 and peer_lost.wait(_NOTICE_SECONDS)
                if rescued := save.rescue(trainer):
                    print(f"saved {rescued}", file=sys.stderr, flush=True)
                if lost:
                    raise PeerLost("another process of the run is gone") from problem
            raise
        finally:
            trainer.close()
            if log is not None:
                log.end()
        # Once more, for a signal that came after the last step had agreed.
        code = int(gather_rows(np.array([[stop.code]], dtype="float64")).max())
    if code:
        step = trainer.state.global_step
        if first:
            update_marker(run_dir, status="stopped", step=step)
        saved = f"after step {step} of {data.plan.num_steps}; saved {checkpoint_path(root, step)}"
        goes_on = "The same command with resume=auto goes on"
        if code == WORKER_KILLED:
            cause = f"a data worker was killed (out of memory?; data.workers={config.data.workers}, fewer take less)"
            say(f"error: stopped {saved}: {cause}. {goes_on}", sys.stderr)
        elif code == TIME_IS_UP:
            say(f"\nstopped before max_minutes={config.max_minutes:g} were over, {saved}. {goes_on}")
        else:
            say(f"\nstopped by {signal.Signals(code - 128).name} {saved}. {goes_on}")
    return code


def _end_saving(save: Saver, problem: BaseException) -> None:
    """Wait for the checkpoint that is being written when a run ends with an error.

    Raises:
        UserError: it could not be written, in place of an error of the user's that may say it was.
    """
    try:
        save.join()
    except UserError as unsaved:
        if isinstance(problem, UserError):
            raise unsaved from problem
        say(f"error: {unsaved}", sys.stderr)
