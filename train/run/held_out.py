"""What a run asks of its held-out rows, on the way and at both ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import paddle.distributed as dist
from paddle import nn

from train.ask.evaluate import ask_run
from train.ask.load import Loaded
from train.ask.source import Source
from train.config.schema import TrainConfig
from train.run.build_data import Data
from train.run.say import say
from train.store.run_dir import read_marker, update_marker
from vl2.lora import VL2LoRAModel

# Asks a model the held-out questions, "before" or "after" training: numbers with at least `exact_match` in [0, 1].
Evaluate = Callable[[nn.Layer, Data, TrainConfig, str], Mapping[str, float]]


def ask_held_out(model: nn.Layer, data: Data, config: TrainConfig, when: str) -> Mapping[str, float]:
    """Greedy answers to the held-out questions; after training also with the pictures exchanged."""
    lora = isinstance(model, VL2LoRAModel)
    inner = model.model if lora else model
    model.eval()
    source = Source(kind="adapter" if lora else "weights", base=Path(config.model.path))
    return ask_run(
        Loaded(source=source, model=inner, tokenizer=data.tokenizer, images=data.images),
        data.questions,
        limit=config.eval.questions,
        max_new_tokens=config.eval.max_new_tokens,
        permute=config.eval.permuted and when == "after",
        metrics=config.eval.metrics,
    )


def evaluate_once(
    when: str, evaluate: Evaluate | None, model: nn.Layer, data: Data, config: TrainConfig
) -> dict[str, float] | None:
    """Ask the held-out questions on rank 0; what a run was asked before training is kept through its interruptions."""
    if evaluate is None or not data.questions or dist.get_rank() != 0:
        return None
    run_dir = Path(config.run_dir)
    marker = read_marker(run_dir)
    assert marker is not None  # written when the run claimed its folder
    kept = marker.evaluation
    if when == "before" and when in kept:
        return kept[when]
    started = time.perf_counter()
    found = dict(evaluate(model, data, config, when))
    update_marker(run_dir, evaluation={**kept, when: found})
    say(
        f"{when} training: {found['exact_match']:.1%} of the held-out answers are right "
        f"({time.perf_counter() - started:.0f} s)"
    )
    if found.get("cut"):
        say(
            f"note: {found['cut']:.0f} of {found['questions']:.0f} answers were cut at "
            f"eval.max_new_tokens={config.eval.max_new_tokens}, before they had ended",
            sys.stderr,
        )
    return found
