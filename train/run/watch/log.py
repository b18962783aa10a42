"""A run's numbers while it goes on: said once, and handed to metrics.jsonl, the progress bar, wandb and VisualDL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from train.config.schema import TrainConfig
from train.run.watch.bar import ProgressBar
from train.run.watch.lines import MetricsFile
from train.run.watch.picture import CurvePicture
from train.run.watch.samples_page import SamplesPages
from train.run.watch.sink import Sample, Sink
from train.run.watch.step_metrics import StepMetrics
from train.run.watch.visualdl_log import VisualDLLog
from train.run.watch.wandb_run import start_wandb


class MetricsLog:
    """Takes a run's numbers and hands them on; a context, closed at the end however the run ends.

    Args:
        sinks: where they go, in this order.
        log_steps: a step's numbers go to files and services every so often, to the progress bar always.
        validated: lines of metrics.jsonl that an earlier attempt wrote of validations.
    """

    def __init__(self, sinks: Sequence[Sink], *, log_steps: int = 1, validated: Iterable[Mapping[str, Any]] = ()):
        self.sinks, self.log_steps = sinks, log_steps
        self._validated: dict[int, set[str]] = {}  # step -> what is known of it
        for line in validated:
            self._new(line["step"], line)

    def begin(self) -> None:
        """The first step of this attempt begins now."""
        for sink in self.sinks:
            sink.begin()

    def end(self) -> None:
        """No step follows in this attempt; what is said from now on stands below the progress bar."""
        for sink in self.sinks:
            sink.end()

    def write(self, metrics: StepMetrics) -> None:
        """One optimizer step."""
        values = metrics.to_json()
        for sink in self.sinks:
            if sink.every_step or metrics.step % self.log_steps == 0:
                sink.step(metrics.step, values)

    def validation(self, step: int, numbers: Mapping[str, Any]) -> None:
        """What the held-out rows gave, each number once for a step: a run that was interrupted finds them again.

        Args:
            step: optimizer steps made; 0: before training.
            numbers: name -> number, or a table of numbers by source: `eval_loss`, `eval_loss_of`, `eval_exact_match`.
        """
        if new := self._new(step, numbers):
            for sink in self.sinks:
                sink.validation(step, new)

    def _new(self, step: int, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """What was not known of a step's validation until now."""
        known = self._validated.setdefault(step, set())
        new = {name: value for name, value in numbers.items() if name not in known}
        known.update(new)
        return new

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Some of the held-out questions, with what the model answered after `step` optimizer steps."""
        for sink in self.sinks:
            sink.samples(step, rows)

    def saved(self) -> None:
        """A checkpoint was written."""
        for sink in self.sinks:
            sink.saved()

    def close(self, failed: bool = False) -> None:
        """Finish all of them; what is drawn at the end is drawn.

        Args:
            failed: the run ends with an error.
        """
        with ExitStack() as last:  # each of them, whatever another one raises
            for sink in reversed(self.sinks):
                last.callback(sink.close, failed)
        self.sinks = ()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.close(failed=kind is not None)


def open_log(
    run_dir: Path, config: TrainConfig, *, num_steps: int, first_step: int = 0, wandb_id: str = ""
) -> MetricsLog:
    """The log of rank 0, with the sinks that `log` names.

    What an earlier attempt wrote of later steps is removed: it may have gone on past its last checkpoint.

    Args:
        run_dir: of the run.
        config: of the run.
        num_steps: optimizer steps of the run.
        first_step: steps made already.
        wandb_id: of the run on wandb, so that a resumed run goes on there.
    """
    file = MetricsFile(run_dir, first_step=first_step)
    sinks: list[Sink] = [file, ProgressBar(num_steps, first_step=first_step)]
    title = f"{config.recipe}, {config.model.path}"
    sinks.append(SamplesPages(run_dir, title=title, first_step=first_step))
    if "wandb" in config.log and (run := start_wandb(run_dir, config, wandb_id)):
        sinks.append(run)
    if "visualdl" in config.log:
        sinks.append(VisualDLLog(run_dir, first_step=first_step))
    sinks.append(CurvePicture(run_dir, title=title))
    return MetricsLog(sinks, log_steps=config.log_steps, validated=file.validated)
