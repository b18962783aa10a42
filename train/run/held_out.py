"""What a model says of the held-out rows: the loss of all, greedy answers to some, shared over the ranks by cost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import paddle.distributed as dist
from paddle import nn
from tqdm import tqdm

from data.images.files import ImageError
from data.record import BadRecords, RecordError
from train.ask.answer import Answer, answer_all, answer_limit, answered_together, prompt_length
from train.ask.load import Loaded
from train.ask.losses import RowLosses, pack_rows, row_losses
from train.ask.questions import Question, box_scores, permuted, prompt_of, questions_of, score
from train.ask.source import Source
from train.config.schema import TrainConfig
from train.config.validation import ALWAYS
from train.run.build_data import Data
from train.run.gather import gather_objects
from train.run.gradients import gather_rows
from train.run.samples import Answered
from train.run.shard.layers import SharedLayers
from vl2.lora import VL2LoRAModel
from vl2.tokenizer import Tokenizer

# A run's limit, where none is given: room after the longest expected answer, and the most that is given room.
MARGIN, LONGEST_ANSWER = 16, 2048
Built = TypeVar("Built")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a validation found, the same on every rank."""

    numbers: dict[str, float]  # `loss`, and where questions are asked `questions`, `cut`, `exact_match` ...
    loss_of: dict[str, float] = field(default_factory=dict)  # of each source, where there are several

    def to_json(self) -> dict[str, Any]:
        """As fields of a line of metrics.jsonl."""
        line: dict[str, Any] = {f"eval_{name}": value for name, value in self.numbers.items()}
        return {**line, "eval_loss_of": self.loss_of} if self.loss_of else line


class HeldOut:
    """The held-out rows of a run, shared over its ranks.

    What is computed together does not depend on the ranks, and what comes of it is put together in the order of the
    rows: so one process and several find the same numbers. All methods but `loss_of` are collective.

    Args:
        config, data: of the run; rows are held out.
        model: under training.
        shared: its layers that all ranks compute together.
    """

    def __init__(self, config: TrainConfig, data: Data, model: nn.Layer, shared: SharedLayers | None = None):
        self.shared = shared if shared is not None and shared.moves_weights else None
        assert data.validation is not None
        self.metrics, self.rows = (*ALWAYS, *config.eval.metrics), data.validation
        lora = isinstance(model, VL2LoRAModel)
        inner = model.model if lora else model
        source = Source(kind="adapter" if lora else "weights", base=Path(config.model.path))
        self.loaded = Loaded(
            source=source,
            model=inner,
            tokenizer=data.tokenizer,
            candidates=inner.config.candidate_resolutions,
            images=data.images,
            vision_cache=data.vision_cache,
        )
        self.packs = pack_rows(
            self.rows,
            data.tokenizer,
            data.candidates,
            data.images,
            on_bad_record=config.data.on_bad_record,  # type: ignore[arg-type]  # checked by the schema
            max_bad=config.data.max_bad,
            vision_cache=data.vision_cache,
        )
        every = (question for record in data.questions for question in questions_of(record, data.images))
        self.questions = list(islice(every, config.eval.questions))
        self._bad = BadRecords(on_bad_record=config.data.on_bad_record, max_bad=config.data.max_bad)  # type: ignore[arg-type]
        self._broken: set[str] = set()  # what was said of them
        self.max_new_tokens = config.eval.max_new_tokens or room_for(self.questions, data.tokenizer)

    def losses(self, asked_to_stop: Callable[[], bool]) -> RowLosses | None:
        """Losses of all rows, in their order; None where a rank was asked to stop meanwhile.

        Ranks that compute each layer together all make as many passes, and stop behind the last one only.
        """
        shares = deal([pack.cost for pack in self.packs.plan.packs], dist.get_world_size())
        own, shared = shares[dist.get_rank()], self.shared
        passes = shared.passes + max(map(len, shares)) if shared else 0
        with _bar("held-out loss", len(own), "pack") as bar:
            pieces = _until((lambda: False) if shared else asked_to_stop, own, bar)
            found = row_losses(self.loaded.model, self.packs, pieces)
        while shared and shared.passes < passes:
            shared.idle(backward=False)
        table = gather_rows(np.array([[*found.sums, *found.supervised, asked_to_stop()]], dtype="float64"))
        *both, stopped = table.sum(axis=0)  # of each row one rank has the numbers, the others 0
        sums, supervised = np.array(both).reshape(2, -1)
        return None if stopped else RowLosses(sums=sums, supervised=supervised)

    def loss_of(self, losses: RowLosses) -> dict[str, float]:
        """The mean of each source that has rows here; none where there is only one source."""
        names = [source.settings.name or source.settings.path for source in self.rows.sources]
        of = {name: self.rows.source_of == number for number, name in enumerate(names)}
        return {name: losses.mean(rows) for name, rows in of.items() if rows.any()} if len(names) > 1 else {}

    def answers(self, asked_to_stop: Callable[[], bool], *, exchanged: bool = False) -> Answered | None:
        """Greedy answers to the questions, scored; None where a rank was asked to stop meanwhile.

        Args:
            exchanged: each question gets the pictures of another one.

        A question whose picture broke since it was looked at is left out, where data.on_bad_record says so.

        Raises:
            RecordError: a picture that cannot be opened, and may not be left out.
        """
        loaded, asked = self.loaded, permuted(self.questions) if exchanged else self.questions
        measured = [(question, self._or_broken(partial(prompt_length_of, question, loaded))) for question in asked]
        questions = [question for question, length in measured if length is not None]
        lengths = [length for _, length in measured if length is not None]
        context = loaded.model.config.language.max_position_embeddings
        limits = [answer_limit(length, self.max_new_tokens, context) for length in lengths]
        groups = answered_together(lengths, limits)
        own: list[tuple[int, str | None, bool]] = []
        with _bar("answers" + " with pictures exchanged" * exchanged, len(groups), "batch") as bar:
            for number in _until(asked_to_stop, _own_share([sum(lengths[i] for i in group) for group in groups]), bar):
                made = {i: self._or_broken(partial(prompt_of, questions[i], loaded)) for i in groups[number]}
                prompts = {i: prompt for i, prompt in made.items() if prompt is not None}
                answers = answer_all(loaded, prompts.values(), max_new_tokens=self.max_new_tokens)
                own += [(i, answer.text, answer.cut) for i, answer in zip(prompts, answers, strict=True)]
                own += [(i, None, False) for i in made.keys() - prompts.keys()]
        shares = gather_objects({"answers": own, "stopped": asked_to_stop()})
        if any(share["stopped"] for share in shares):
            return None
        in_order = sorted((number, text, cut) for share in shares for number, text, cut in share["answers"])
        questions = [questions[number] for number, text, _ in in_order if text is not None]
        found = [Answer(text=text, cut=cut) for _, text, cut in in_order if text is not None]
        boxes = box_scores(questions, found, loaded.images)
        return Answered(questions=questions, answers=found, scores=score(self.metrics, questions, found, boxes))

    def _or_broken(self, look: Callable[[], Built]) -> Built | None:
        """What comes of looking at a question; None where a picture of it is broken and it may be left out."""
        try:
            return look()
        except RecordError as error:
            if str(error) not in self._broken:
                self._bad.add(error)
                self._broken.add(str(error))
                print(f"left out: {error}", file=sys.stderr, flush=True)
            return None


def room_for(questions: Sequence[Question], tokenizer: Tokenizer) -> int:
    """Tokens that an answer may have: those of the longest expected one, and a quarter more, at least 16.

    A model that has learned its task then comes to its end, and one that has not is not heard out.
    """
    longest = max((len(tokenizer.encode(question.expected)) for question in questions), default=0)
    return min(longest + max(MARGIN, longest // 4), LONGEST_ANSWER)


def prompt_length_of(question: Question, loaded: Loaded) -> int:
    """Count the tokens of a question.

    Raises:
        RecordError: a picture that cannot be opened.
    """
    try:
        return prompt_length(question.messages, question.images, loaded)
    except ImageError as error:
        raise question.record.error("images", str(error)) from error


def deal(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Deal pieces of work to ranks, the largest first and to the one with least, each rank's in order.

    costs 5 3 2 2, 2 ranks  ->  [0, 3], [1, 2]
    """
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(num_ranks), key=lambda r: (load[r], r))
        dealt[rank].append(index)
        load[rank] += costs[index]
    return [sorted(own) for own in dealt]


def _own_share(costs: Sequence[int]) -> list[int]:
    return deal(costs, dist.get_world_size())[dist.get_rank()]


def _until(asked_to_stop: Callable[[], bool], pieces: Sequence[int], bar: tqdm) -> Iterator[int]:
    for piece in pieces:
        if asked_to_stop():
            return
        yield piece
        bar.update()


def _bar(title: str, total: int, unit: str) -> tqdm:
    """Progress of rank 0's share, which is gone when it is done."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=title,
        unit=unit,
        leave=False,
        file=sys.stderr,
        mininterval=0.2 if terminal else 10.0,
        disable=dist.get_rank() != 0,
        delay=0.2 if terminal else 10.0,  # what is over sooner is not worth a line
    )
