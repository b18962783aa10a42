"""A run on Weights & Biases. Nothing that goes wrong with it stops the training."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from train.config.schema import TrainConfig
from train.run.watch.sink import Sample, Sink

logger = logging.getLogger(__name__)

_STEP = "optimizer_step"
_LARGEST_PICTURE = (512, 512)  # pixels, in the table of samples


class WandbRun(Sink):
    """Hands numbers and samples to a run on wandb.

    All of it is drawn over a number of its own, `optimizer_step`: the steps that wandb counts may only grow, and a run
    that goes on from a checkpoint makes some once more, whose numbers wandb would drop.

    Args:
        run: of `wandb.init`.
    """

    def __init__(self, run: Any):
        self._run = run
        run.define_metric(_STEP, hidden=True)
        run.define_metric("*", step_metric=_STEP)

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of an optimizer step."""
        self._run.log({**values, _STEP: step})

    def validation(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Numbers of the held-out rows, at their step."""
        self._run.log({**numbers, _STEP: step})

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """A table, with a column for each score; `samples` is a number of each step already."""
        import wandb

        scores = list(dict.fromkeys(name for row in rows for name in row.scores))
        table = wandb.Table(columns=["picture", "question", "expected", "answer", *scores])
        for row in rows:
            picture = None
            if row.picture is not None:
                small = row.picture.copy()
                small.thumbnail(_LARGEST_PICTURE)
                picture = wandb.Image(small)
            table.add_data(picture, row.question, row.expected, row.answer, *(row.scores.get(name) for name in scores))
        self._run.log({"eval_samples": table, _STEP: step})

    def close(self, failed: bool) -> None:
        """Send what is left."""
        self._run.finish(exit_code=int(failed))


def start_wandb(run_dir: Path, config: TrainConfig, run_id: str) -> WandbRun | None:
    """A wandb run whose files lie in run_dir, or None with a warning.

    Args:
        run_dir: of the run.
        config: of the run; kept on wandb too.
        run_id: of the run on wandb, new or to be gone on with.
    """
    mode = config.wandb.mode
    # Where pictures of tables wait until they are sent, which is in the user's home else.
    os.environ.setdefault("WANDB_DATA_DIR", str(run_dir.resolve() / "wandb"))
    try:
        import wandb

        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or (
                "online" if has_credentials(wandb.Settings().base_url) else "offline"
            )
        options: dict[str, Any] = {
            "dir": str(run_dir),
            "project": config.wandb.project,
            "name": config.wandb.name or config.recipe,
            "id": run_id or None,
            "resume": "allow",
            "config": asdict(config),
            "settings": wandb.Settings(silent=True, console="off", init_timeout=10, disable_git=True),
        }
        try:
            return WandbRun(wandb.init(mode=mode, **options))  # type: ignore[arg-type]  # checked by the schema
        except Exception as error:
            if mode != "online":
                raise
            logger.warning("wandb cannot be reached, so it runs offline (`wandb sync` sends it later): %s", error)
            return WandbRun(wandb.init(mode="offline", **options))
    except Exception as error:  # wandb's own errors, an unwritable home
        logger.warning("wandb is off for this run: %s", error)
        return None


def has_credentials(base_url: str) -> bool:
    """Whether somebody has logged in to wandb here. wandb's own question goes over the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        file = netrc.netrc(os.environ.get("NETRC") or None)
    except (OSError, netrc.NetrcParseError):
        return False
    return file.authenticators(urlparse(base_url).hostname or "") is not None
