"""The progress bar of the optimizer steps."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from train.run.watch.sink import Sink


class ProgressBar(Sink):
    """A line on stderr with the loss, the speed and the time left.

    Args:
        num_steps: of the run.
        first_step: steps made already.
    """

    every_step = True

    def __init__(self, num_steps: int, *, first_step: int):
        self.num_steps, self.first_step = num_steps, first_step
        self._bar: tqdm | None = None

    def begin(self) -> None:
        """Show the bar; its clock starts now."""
        self._bar = tqdm(
            total=self.num_steps,
            initial=self.first_step,
            desc="train",
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            # A log file gets a line now and then, a terminal a moving bar.
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Move on."""
        assert self._bar is not None
        aux_loss = f", aux {values['aux_loss']:.2e}" if values["aux_loss"] else ""
        loss = "not finite, left out" if values["loss"] is None else f"{values['loss']:.4f}"
        self._bar.set_postfix_str(
            f"loss {loss}{aux_loss}, lr {values['lr']:.2e}, {values['tokens_per_second']:,.0f} tok/s, "
            f"fill {values['fill']:.0%}",
            refresh=False,
        )
        self._bar.update()

    def end(self) -> None:
        """Leave it as it stands."""
        if self._bar is not None:
            self._bar.close()
