"""The one thread that computes: takes in what waits at each token, and hands out what came."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from train.serve.answer_text import AnswerText
from train.serve.models import Served
from vl2.batch import Batch, Growing

logger = logging.getLogger(__name__)

Finish = Literal["stop", "length", "deadline", "failed"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What came of an answer since the last piece."""

    text: str
    num_ids: int  # tokens of the answer so far, the end token not among them
    ids: tuple[int, ...] = ()  # of the whole answer, with its end
    finish: Finish | None = None  # why nothing more comes


@dataclass(eq=False, kw_only=True)
class Job:
    """A request that waits for an answer, or gets one."""

    model: str  # its name
    prompt: Mapping[str, Any]
    limit: int  # tokens
    temperature: float
    top_p: float
    seed: int
    stops: Sequence[str]
    deadline: float  # by time.monotonic()
    receive: Callable[[Piece], None] = lambda piece: None  # called where `deliver` says
    gone: bool = False  # nobody waits any more
    growing: Growing | None = field(default=None, init=False)
    text: AnswerText | None = field(default=None, init=False)

    @property
    def room(self) -> int:
        """Tokens that it may come to."""
        return len(self.prompt["input_ids"]) + self.limit

    @property
    def num_bytes(self) -> int:
        """Of its prompt; the tiles of a picture are a few megabytes."""
        return sum(value.nbytes for value in self.prompt.values() if isinstance(value, np.ndarray))


class Engine:
    """Computes answers in a thread of its own.

    Args:
        models: by name.
        chunk: tokens of prompts that are read between two tokens.
        max_batch_tokens: tokens of all that is answered at the same time.
        deliver: takes the pieces of one token, from the thread.
        failed: called, from the thread, when it ends by a fault: nothing will be answered any more.

    Attributes:
        kv_bytes: of the keys and values that are kept.
    """

    def __init__(
        self,
        models: Mapping[str, Served],
        *,
        chunk: int,
        max_batch_tokens: int,
        deliver: Callable[[list[tuple[Job, Piece]]], None],
        failed: Callable[[], None],
    ):
        self._models, self._deliver, self._failed = models, deliver, failed
        self._chunk, self.kv_bytes = chunk, 0
        self._max_batch_tokens = max_batch_tokens
        self._batches = {name: self._new_batch(name) for name in models}
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after its token."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the prompts of jobs that have not begun."""
        with self._changed:
            return sum(job.num_bytes for job in self._waiting)

    @property
    def num_running(self) -> int:
        """Jobs that have begun."""
        return len(self._running)

    def _new_batch(self, name: str) -> Batch:
        loaded = self._models[name].loaded
        return Batch(loaded.model, eos_id=loaded.tokenizer.eos_id, chunk=self._chunk)

    def _run(self) -> None:
        try:
            self._answer()
        except BaseException:
            logger.exception("the thread that computes has failed")
            self._failed()

    def _answer(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._ending):
                    self._changed.wait()
                if self._ending:
                    return
            pieces = self._drop(time.monotonic())
            self._admit()
            for name in dict.fromkeys(job.model for job in self._running):
                pieces += self._step(name)
            self.kv_bytes = sum(batch.num_bytes for batch in self._batches.values())
            if pieces:
                self._deliver(pieces)

    def _drop(self, now: float) -> list[tuple[Job, Piece]]:
        """Let go of jobs that nobody waits for, and of those that took too long."""
        pieces = []
        with self._changed:
            known = [*self._waiting, *self._running]
            late = [job for job in known if not job.gone and job.deadline < now]
            ending = {job for job in known if job.gone} | set(late)
            if any(job.growing is None for job in ending):
                self._waiting = deque(job for job in self._waiting if job not in ending)
        for job in ending & set(self._running):
            self._leave(job)
        for job in late:
            count = len(job.growing.ids) if job.growing else 0
            pieces.append((job, Piece(text="", num_ids=count, finish="deadline")))
        return pieces

    def _admit(self) -> None:
        """Take in jobs in the order in which they came, as far as there is room."""
        taken = sum(job.room for job in self._running)
        with self._changed:
            while self._waiting and (not self._running or taken + self._waiting[0].room <= self._max_batch_tokens):
                job = self._waiting.popleft()
                taken += job.room
                self._running.append(job)
                job.text = AnswerText(self._models[job.model].loaded.tokenizer, job.stops)
                job.growing = Growing(
                    job.prompt, limit=job.limit, temperature=job.temperature, top_p=job.top_p, seed=(job.seed, 0)
                )
                job.prompt = {"input_ids": job.prompt["input_ids"]}  # the tiles are the sequence's alone
                self._batches[job.model].add(job.growing)

    def _leave(self, job: Job) -> None:
        self._running.remove(job)
        assert job.growing is not None
        self._batches[job.model].remove(job.growing)

    def _step(self, name: str) -> list[tuple[Job, Piece]]:
        """A token more for the jobs of one model."""
        jobs = [job for job in self._running if job.model == name]
        try:
            self._models[name].use()
            grown = set(self._batches[name].step())
        except Exception:
            logger.exception("answers of %s failed", name)
            self._batches[name] = self._new_batch(name)  # who knows what the old one holds
            self._running = [job for job in self._running if job.model != name]
            return [(job, Piece(text="", num_ids=0, finish="failed")) for job in jobs]
        pieces = [(job, piece) for job in jobs if job.growing in grown and (piece := self._piece(job))]
        for job, piece in pieces:
            if piece.finish:
                self._leave(job)
        return pieces

    def _piece(self, job: Job) -> Piece | None:
        growing, text = job.growing, job.text
        assert growing is not None and text is not None
        shown = text.add(growing.ids[-1]) if not growing.ended else ""
        count = len(growing.ids)
        if text.stopped:
            return Piece(text=shown, num_ids=count, ids=tuple(growing.ids), finish="stop")
        if growing.done:
            rest = text.end()
            finish: Finish = "stop" if growing.ended or text.stopped else "length"
            return Piece(text=shown + rest, num_ids=count, ids=tuple(growing.ids), finish=finish)
        return Piece(text=shown, num_ids=count) if shown or count == 1 else None
