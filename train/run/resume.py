"""Where a run goes on: the checkpoint that resume= means, whether it is this run's, and what it leaves behind."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data.dataset import COLUMNS
from train.config.schema import TrainConfig
from train.run.identity import changed_settings, differences
from train.run.say import say
from train.store.checkpoints import find_checkpoint, later_checkpoints, read_config, set_aside
from train.store.run_dir import RunMarker, read_marker
from train.store.run_state import CheckpointState, Identity
from vl2.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A whole checkpoint of this very run."""

    checkpoint: Path
    state: CheckpointState


def find_resumed(
    config: TrainConfig, who: Identity, num_steps: int, fingerprint_before: Callable[[], str]
) -> Resumed | None:
    """The checkpoint to go on from; None for a run from the start.

    Args:
        config, who: of this run.
        num_steps: of its plan.
        fingerprint_before: of its data, as `identity.fingerprint_of_records` computes it.

    Raises:
        UserError: nothing whole to resume from, or the checkpoint of another run; says what differs.
    """
    if not config.resume:
        return None
    checkpoint, state, remarks = find_checkpoint(config.resume, Path(config.run_dir))
    for remark in remarks:
        say(f"warning: {remark}", sys.stderr)
    if not str(state.identity.plan.get("data")).startswith(COLUMNS):
        who = replace(who, plan={**who.plan, "data": fingerprint_before()})
    if found := differences(state.identity, who):
        listed = "\n  ".join(found)
        raise UserError(
            f"resume={config.resume}: {checkpoint} belongs to another run. What differs:\n  {listed}\n"
            "Give the settings of that run, or start a new one in another run_dir"
        )
    if state.step > num_steps:
        raise UserError(
            f"resume={config.resume}: {checkpoint} is at step {state.step}, but this run has {num_steps} steps; "
            "raise max_steps or epochs"
        )
    say(f"going on from {checkpoint} (step {state.step} of {num_steps})")
    for change in changed_settings(read_config(checkpoint), asdict(config)):
        say(f"note: {change}; steps from here on follow the new value", sys.stderr)
    return Resumed(checkpoint=checkpoint, state=state)


def leave_later_checkpoints(resumed: Resumed, run_dir: Path) -> None:
    """Set the checkpoints after the one to go on from aside: they are of an attempt that is given up here.

    Else `resume=auto` would take the newest of them for this attempt's. Only rank 0 calls this.
    """
    later = later_checkpoints(resumed.checkpoint, run_dir)
    if later:
        places = ", ".join(place.name for place in set_aside(later))
        say(
            f"set aside in {later[0].parent}: {places}, of the attempt that went on from step {resumed.state.step} "
            "before; delete them when you need the space"
        )


def choose_wandb_id(resumed: Resumed | None, previous: RunMarker | None) -> str:
    """The run on wandb that goes on: this folder's, else the checkpoint's, else a new one.

    Args:
        resumed: what the run goes on from.
        previous: marker of the run that lies in run_dir.
    """
    if resumed is None:
        return secrets.token_hex(4)
    found = (previous.wandb_id if previous else None) or resumed.state.wandb_id
    if found is None:  # a checkpoint of format 1, whose run's marker knows it
        try:
            marker = read_marker(resumed.checkpoint.resolve().parents[1])
            found = marker.wandb_id if marker else None
        except UserError:
            pass
    return found or secrets.token_hex(4)
