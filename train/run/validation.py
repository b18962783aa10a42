"""Validation of a run: before training, at the steps that are due, and after it. It changes nothing in training."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from paddle import nn

from data.plan import Plan
from train.config.schema import TrainConfig
from train.config.validation import Every, best_metric, read_every
from train.machine.disk import is_full
from train.run.best import judge, patience_is_over
from train.run.build_data import Data
from train.run.gather import gather_objects
from train.run.held_out import Found, HeldOut
from train.run.samples import SampleTable
from train.run.say import say
from train.run.shard.layers import SharedLayers
from train.run.stop import StopRequest
from train.run.watch.log import MetricsLog
from train.run.watch.sink import Sample
from train.store.run_dir import read_marker, update_marker
from train.store.run_state import ValidationState


class Validation:
    """Validates a run; every rank calls the same methods at the same steps.

    Args:
        config, data: of the run; rows are held out.
        model: under training.
        log: of rank 0; None on the others.
        state: how far it was at the checkpoint that the run goes on from.
        shared: layers of the model that all ranks compute together.

    Attributes:
        state: how far it is now; a checkpoint keeps it.
        seconds: that the newest one took; 0 before the first of this attempt.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        model: nn.Layer,
        log: MetricsLog | None,
        state: ValidationState | None = None,
        shared: SharedLayers | None = None,
    ):
        self.config, self.model, self.log, self.state = config, model, log, state
        self.held_out = HeldOut(config, data, model, shared)
        self.samples = SampleTable(self.held_out.questions, data.images)
        self.due = due_steps(read_every(config.eval.every), data.plan)
        self.metric = best_metric(config)
        self.seconds = 0.0
        self._last: tuple[int, Found] | None = None  # step of the newest validation, and what it found

    @property
    def is_over(self) -> bool:
        """Whether the run ends early: its patience is at an end."""
        return patience_is_over(self.state, self.config)

    def before(self) -> dict[str, float]:
        """Numbers of the model before training; kept through the run's interruptions. Collective."""
        kept = gather_objects(self._evaluation().get("before") if self.log is not None else None)[0]
        return kept or self._at_an_end("before", 0, exchanged=False)

    def after(self, step: int) -> dict[str, float]:
        """Numbers of the trained model, of its answers with the pictures exchanged too. Collective."""
        return self._at_an_end("after", step, exchanged=self.config.eval.permuted)

    def during(self, step: int, stop: StopRequest) -> Found | None:
        """Validate after a step that is due, once; None where it is not, or a rank was asked to stop. Collective."""
        if not self.owes(step):
            return None
        started = time.perf_counter()
        found = self._validate(step, lambda: stop.code != 0)
        if found is None:
            return None
        self.state = judge(self.state, step, found.numbers, self.metric)
        best = self.state.best
        mark = ", the best so far" if best and best.step == step else ""
        say(f"step {step}: {in_words(found)}{mark} ({time.perf_counter() - started:.0f} s)")
        if self.is_over:
            say(f"no better {self.metric} in {self.state.without_best} validations (eval.patience): the run ends here")
        return found

    def owes(self, step: int) -> bool:
        """Whether a step is due that was not validated yet, or only until a signal came."""
        return step in self.due and not (self.state and self.state.step == step)

    def is_best(self, step: int) -> bool:
        """Whether the newest validation was of this step, and found it to be the best so far."""
        return self.state is not None and self.state.best is not None and self.state.best.step == step

    def _at_an_end(self, when: str, step: int, *, exchanged: bool) -> dict[str, float]:
        started = time.perf_counter()
        known = self._last[1] if self._last and self._last[0] == step else None
        found = known or self._validate(step, lambda: False)
        assert found is not None  # nobody can ask to stop here
        numbers = dict(found.numbers)
        if exchanged and any(question.images for question in self.held_out.questions):
            with evaluating(self.model):
                answered = self.held_out.answers(lambda: False, exchanged=True)
            assert answered is not None
            numbers.update({f"{name}_permuted": mean for name, mean in answered.scores.means.items()})
        if self.log is not None:
            update_marker(Path(self.config.run_dir), evaluation={**self._evaluation(), when: numbers})
        say(f"{when} training: {in_words(found)} ({time.perf_counter() - started:.0f} s)")
        return numbers

    def _validate(self, step: int, asked_to_stop: Callable[[], bool]) -> Found | None:
        started = time.perf_counter()
        with evaluating(self.model):
            losses = self.held_out.losses(asked_to_stop)
            if losses is None:
                return None
            found = Found(numbers={"loss": losses.mean()}, loss_of=self.held_out.loss_of(losses))
            answered = None
            if self.held_out.questions:
                answered = self.held_out.answers(asked_to_stop)
                if answered is None:
                    return None
                counts = {"questions": float(len(answered.questions)), "cut": float(answered.num_cut)}
                found.numbers.update({**answered.scores.means, **counts})
        self._last, self.seconds = (step, found), time.perf_counter() - started
        if self.log is not None:
            self._tell(self.log, step, found, self.samples.rows(answered) if answered else ())
        return found

    def _tell(self, log: MetricsLog, step: int, found: Found, samples: Sequence[Sample]) -> None:
        try:
            log.validation(step, found.to_json())
            if samples:
                log.samples(step, samples)
        except OSError as problem:
            if not is_full(problem):
                raise
            # The log of the next step says it too, and then the run ends with that step saved.
            say(f"warning: the validation of step {step} could not be written: the disk is full", sys.stderr)
        if found.numbers.get("cut"):
            say(
                f"note: {found.numbers['cut']:.0f} of {found.numbers['questions']:.0f} answers were cut at "
                f"eval.max_new_tokens={self.held_out.max_new_tokens}, before they had ended",
                sys.stderr,
            )

    def _evaluation(self) -> dict[str, dict[str, float]]:
        marker = read_marker(Path(self.config.run_dir))
        return marker.evaluation if marker else {}


def due_steps(every: Every, plan: Plan) -> frozenset[int]:
    """Steps after which a run is validated: those of its interval, and the last.

    A part of an epoch is counted within each epoch, of its whole length where the run cuts it off.

    every 0.5, epochs of 5 and 5 steps, the second cut off after 4  ->  3, 5, 8, 9
    """
    if not every:
        return frozenset()
    if every.steps:
        found = set(range(every.steps, plan.num_steps + 1, every.steps))
    else:
        found, start = set(), 0
        for length in plan.whole_epochs:
            parts = range(1, math.floor(1 / every.part + 1e-9) + 1)
            found |= {start + math.ceil(part * every.part * length - 1e-9) for part in parts}
            start += length
    return frozenset({step for step in found if step <= plan.num_steps} | {plan.num_steps})


def in_words(found: Found) -> str:
    """What was found, in a line."""
    words = f"loss {found.numbers['loss']:.4f} on the held-out rows"
    right = found.numbers.get("exact_match")
    return words if right is None else f"{words}, {right:.1%} of the held-out answers are right"


@contextmanager
def evaluating(model: nn.Layer) -> Iterator[None]:
    """A model in evaluation mode, and afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
