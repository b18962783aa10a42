"""What a model says of the held-out rows: the loss of all, greedy answers to some, shared over the ranks by cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle.distributed as dist
from paddle import nn

from train.ask.load import Loaded
from train.ask.losses import RowLosses, pack_rows, row_losses
from train.ask.questions import ask_run
from train.ask.source import Source
from train.config.schema import TrainConfig
from train.run.build_data import Data
from train.run.gather import gather_objects
from train.run.gradients import gather_rows
from vl2.lora import VL2LoRAModel


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
    """The held-out rows of a run, dealt to the ranks once.

    Which rows are computed together does not depend on the ranks, and what comes of it is put together in the order of
    the rows: so one process and several find the same numbers.

    Args:
        config, data: of the run; rows are held out.
        model: under training.
    """

    def __init__(self, config: TrainConfig, data: Data, model: nn.Layer):
        assert data.validation is not None
        self.config, self.data, self.model, self.rows = config, data, model, data.validation
        lora = isinstance(model, VL2LoRAModel)
        inner = model.model if lora else model
        source = Source(kind="adapter" if lora else "weights", base=Path(config.model.path))
        self.loaded = Loaded(
            source=source,
            model=inner,
            tokenizer=data.tokenizer,
            candidates=inner.config.candidate_resolutions,
            images=data.images,
        )
        self.packs = pack_rows(
            self.rows,
            data.tokenizer,
            data.candidates,
            data.images,
            on_bad_record=config.data.on_bad_record,  # type: ignore[arg-type]  # checked by the schema
            max_bad=config.data.max_bad,
        )
        costs = [pack.cost for pack in self.packs.plan.packs]
        self.own_packs = deal(costs, dist.get_world_size())[dist.get_rank()]

    def losses(self, asked_to_stop: Callable[[], bool]) -> RowLosses | None:
        """Losses of all rows, in their order; None where a rank was asked to stop meanwhile. Collective."""
        own = _until(asked_to_stop, self.own_packs)
        found = row_losses(self.loaded.model, self.packs, own)
        table = gather_rows(np.array([[*found.sums, *found.supervised, asked_to_stop()]], dtype="float64"))
        *both, stopped = table.sum(axis=0)  # of each row one rank has the numbers, the others 0
        sums, supervised = np.array(both).reshape(2, -1)
        return None if stopped else RowLosses(sums=sums, supervised=supervised)

    def loss_of(self, losses: RowLosses) -> dict[str, float]:
        """The mean of each source that has rows here; none where there is only one source."""
        names = [source.settings.name or source.settings.path for source in self.rows.sources]
        of = {name: self.rows.source_of == number for number, name in enumerate(names)}
        return {name: losses.mean(rows) for name, rows in of.items() if rows.any()} if len(names) > 1 else {}

    def answers(self, *, permute: bool) -> dict[str, float]:
        """Greedy answers to the questions, scored; none where nothing is asked. Collective."""
        found: dict[str, float] = {}
        if self.data.questions and dist.get_rank() == 0:
            found = ask_run(
                self.loaded,
                self.data.questions,
                limit=self.config.eval.questions,
                max_new_tokens=self.config.eval.max_new_tokens,
                permute=permute,
                metrics=self.config.eval.metrics,
            )
        return gather_objects(found)[0]


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


def _until(asked_to_stop: Callable[[], bool], pieces: Sequence[int]) -> Iterator[int]:
    return (piece for piece in pieces if not asked_to_stop())
