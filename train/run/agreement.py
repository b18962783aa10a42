"""Whether all processes of a run have the same settings and folder: several machines are each typed a command."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from train.config.fields import list_keys
from train.config.schema import TrainConfig
from train.run.gather import gather_objects
from vl2.errors import UserError

_OWN = ("rank", "command")  # of each machine
_SEEN_SECONDS = 10.0  # a file on NFS may be seen so late


def check_same_settings(config: TrainConfig) -> None:
    """Refuse a run whose processes have different settings: they would train different models. Collective.

    Paths are not compared, but for those of a mixture's sources: another machine may have the same files elsewhere.

    Raises:
        UserError: in every process, naming the settings and both values.
    """
    names = [key.name for key in list_keys(TrainConfig) if not key.path and key.name not in _OWN]
    table = asdict(config)
    of_ranks: list[dict[str, Any]] = gather_objects({name: reduce(getitem, name.split("."), table) for name in names})
    first = of_ranks[0]
    for rank, own in enumerate(of_ranks):
        different = [
            f"{name}={own[name]} there, {first[name]} in process 0" for name in names if own[name] != first[name]
        ]
        if different:
            raise UserError(
                f"process {rank} has other settings than process 0: {'; '.join(different[:5])}; "
                "type the same command on every machine, but for rank="
            )


def check_seen_by_all(written: Path) -> None:
    """Refuse a run's folder that some processes do not see: each writes its part of a checkpoint there. Collective.

    Args:
        written: a file that the first process has just written into it.

    Raises:
        UserError: on all processes alike.
    """
    patience = time.monotonic() + _SEEN_SECONDS
    while not written.is_file() and time.monotonic() < patience:
        time.sleep(0.2)
    seen = gather_objects(written.is_file())
    if not all(seen):
        raise UserError(
            f"run_dir={written.parent}: {seen.count(False)} of {len(seen)} processes do not see what the first wrote "
            "there, and with sharding.stage each writes its part of a checkpoint; give a folder that all machines mount"
        )
