"""Whether all processes of a run were given the same settings: several machines are each typed a command."""

from __future__ import annotations

from dataclasses import asdict
from functools import reduce
from operator import getitem
from typing import Any

from train.config.fields import list_keys
from train.config.schema import TrainConfig
from train.run.gather import gather_objects
from vl2.errors import UserError

_OWN = ("rank", "command")  # of each machine


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
