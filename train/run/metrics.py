"""Where a run's numbers go while it trains: metrics.jsonl, the progress bar, wandb."""

from __future__ import annotations

import json
import logging
import netrc
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from tqdm import tqdm

from train.config.schema import TrainConfig
from train.run.step_metrics import StepMetrics
from train.store.names import METRICS

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes each step's metrics; used on rank 0 only, closed at the end.

    Args:
        run_dir: of the run.
        config: of the run.
        num_steps: optimizer steps of the run.
        first_step: steps made already; later lines of an earlier attempt are removed from metrics.jsonl.
        wandb_id: of the run on wandb, so that a resumed run goes on there.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, *, num_steps: int, first_step: int = 0, wandb_id: str = ""):
        self.path, self.config = run_dir / METRICS, config
        kept = _keep_steps(self.path, first_step)
        self._validated = {line["step"] for line in kept if "eval_loss" in line}
        self._file = self.path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(run_dir, config, wandb_id)
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            desc="train",
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            # A log file gets a line now and then, a terminal a moving bar.
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )

    def close(self) -> None:
        """Finish the bar, the file and wandb."""
        self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, metrics: StepMetrics) -> None:
        """One line of metrics.jsonl (numbers unrounded) every `log_steps`, and the bar."""
        values = metrics.to_json()
        if metrics.step % self.config.log_steps == 0:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
            if self._wandb is not None:
                self._wandb.log(values, step=metrics.step)
        aux_loss = f", aux {metrics.aux_loss:.2e}" if self.config.optim.aux_loss else ""
        self._bar.set_postfix_str(
            f"loss {metrics.loss:.4f}{aux_loss}, lr {metrics.lr:.2e}, {metrics.tokens_per_second:,.0f} tok/s, "
            f"fill {metrics.fill:.0%}",
            refresh=False,
        )
        self._bar.update()

    def validation(self, step: int, found: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, once for a step: a run that was interrupted after it finds the same again.

        Args:
            step: optimizer steps made.
            found: `eval_loss` and other numbers of the held-out rows.
        """
        if step in self._validated:
            return
        self._validated.add(step)
        self._file.write(json.dumps({"step": step, **found}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(dict(found), step=step)


def _keep_steps(path: Path, last: int) -> list[dict[str, Any]]:
    """Drop lines after step `last`, to which an earlier attempt may have gone on, unsaved; return the others."""
    kept: list[dict[str, Any]] = []
    if not path.is_file():
        return kept
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            if line["step"] <= last:
                lines.append(text + "\n")
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # cut off in the middle
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)
    return kept


def _start_wandb(run_dir: Path, config: TrainConfig, run_id: str) -> Any:
    """A wandb run whose files lie in run_dir, or None. Nothing that goes wrong with wandb stops the training."""
    mode = config.wandb.mode
    if mode == "disabled":
        return None
    try:
        import wandb

        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or (
                "online" if _has_credentials(wandb.Settings().base_url) else "offline"
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
            return wandb.init(mode=mode, **options)  # type: ignore[arg-type]  # checked by the schema
        except Exception as error:
            if mode != "online":
                raise
            logger.warning("wandb cannot be reached, so it runs offline (`wandb sync` sends it later): %s", error)
            return wandb.init(mode="offline", **options)
    except Exception as error:  # wandb's own errors, an unwritable home
        logger.warning("wandb is off for this run: %s", error)
        return None


def _has_credentials(base_url: str) -> bool:
    """Whether somebody has logged in to wandb here. wandb's own question goes over the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        file = netrc.netrc(os.environ.get("NETRC") or None)
    except (OSError, netrc.NetrcParseError):
        return False
    return file.authenticators(urlparse(base_url).hostname or "") is not None
