"""Keeps a run's curve.png up to date while it trains, beside the steps and not between them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from train.config.conf_files import ROOT
from train.run.watch.curve import draw_curve
from train.run.watch.sink import Sink
from train.store.names import CURVE
from train.store.run_dir import read_marker
from vl2.errors import UserError

logger = logging.getLogger(__name__)


class CurvePicture(Sink):
    """Draws curve.png at each checkpoint, in a process of its own that takes what the steps leave, and at the end.

    A thread would take turns with the steps at Python's lock: a picture of 0.3 s would cost them as much.

    Args:
        run_dir: of the run.
        title: of the picture.
    """

    def __init__(self, run_dir: Path, *, title: str):
        self.run_dir, self.title = run_dir, title
        self._drawing: subprocess.Popen[bytes] | None = None

    def saved(self) -> None:
        """Begin to draw, unless the picture before is not finished."""
        if self._drawing is not None and self._drawing.poll() is None:
            return
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", __name__, str(self.run_dir.resolve()), self.title]
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        try:  # a session of its own: a Ctrl-C is for the run
            self._drawing = subprocess.Popen(command, env=environ, start_new_session=True, **options)  # type: ignore[call-overload]
        except OSError as problem:
            logger.warning("%s is not drawn: %s", self.run_dir / CURVE, problem.strerror)

    def close(self, failed: bool) -> None:
        """Draw the last picture."""
        if self._drawing is not None:
            self._drawing.kill()
            self._drawing.wait()
        draw(self.run_dir, f"{self.title}: ended by an error" if failed else self.title)


def draw(run_dir: Path, title: str) -> None:
    """Draw what metrics.jsonl holds; a picture that cannot be written ends no run."""
    try:
        marker = read_marker(run_dir)
        best = marker.best if marker else None
        draw_curve(run_dir, title=title, best_step=best.step if best else None)
    except (OSError, UserError) as problem:
        logger.warning("%s is not drawn: %s", run_dir / CURVE, problem)


if __name__ == "__main__":
    os.nice(19)
    draw(Path(sys.argv[1]), sys.argv[2])
