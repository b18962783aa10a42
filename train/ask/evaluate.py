"""`bash launch.sh eval model=FOLDER data.path=FILE`: loss and scores; also what a training run is asked."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import default_cache
from data.dataset import open_dataset
from data.record import Record
from train.ask.data_settings import image_reader, read_settings, source_settings
from train.ask.load import Loaded, load
from train.ask.losses import mean_loss
from train.ask.note import note
from train.ask.predictions import check_predictions, write_predictions
from train.ask.questions import Question, ask, box_scores, num_cut, permuted, questions_of, score
from train.ask.scores.boxes import summary
from train.config.load import load_eval_config
from train.machine.devices import use_device
from train.store.checkpoints import chosen_checkpoint


def ask_run(
    loaded: Loaded,
    records: Sequence[Record],
    *,
    limit: int,
    max_new_tokens: int,
    permute: bool,
    metrics: Sequence[str] = ("exact_match",),
) -> dict[str, float]:
    """What a training run asks before and after.

    Args:
        loaded: the model under training.
        records: held-out conversations; each of their turns is a question.
        limit: most questions.
        max_new_tokens: longest answer.
        permute: ask again with the pictures exchanged.
        metrics: what is scored, beside exact_match.

    Returns:
        `questions` (their number), `cut` (answers that were cut at max_new_tokens), `exact_match` and each metric that
        has something to score, and with `permute` `exact_match_permuted` and so on.
    """
    every = (question for record in records for question in questions_of(record, loaded.images))
    questions = list(itertools.islice(every, limit))
    wanted = ("exact_match", *metrics)

    def scored(questions: Sequence[Question], title: str) -> tuple[dict[str, float], int]:
        answers = ask(loaded, questions, max_new_tokens=max_new_tokens, title=title)
        boxes = box_scores(questions, answers, loaded.images)
        return score(wanted, questions, answers, boxes).means, num_cut(answers)

    means, cut = scored(questions, "questions")
    found = {"questions": float(len(questions)), **means, "cut": float(cut)}
    if permute and any(question.images for question in questions):
        means, _ = scored(permuted(questions), "pictures exchanged")
        found.update({f"{name}_permuted": mean for name, mean in means.items()})
    return found


def main(arguments: list[str]) -> int:
    """Entry script."""
    config = load_eval_config(arguments)
    use_device(config.device, tf32=config.tf32)
    check_predictions(Path(config.out))
    loaded = load(chosen_checkpoint(config.model, config.checkpoint), config.precision, config.base, config.check)
    loaded = dataclasses.replace(loaded, images=image_reader(config.data, exif=loaded.images.exif))
    dataset = open_dataset(
        source_settings(config.data),
        settings=read_settings(config.data),
        tokenizer=loaded.tokenizer,
        candidates=loaded.candidates,
        images=loaded.images,
        context=loaded.model.config.language.max_position_embeddings,
        cache=default_cache(),
        workers=config.data.measure_workers,
    )
    if config.limit is not None:
        dataset = dataset.take(np.arange(len(dataset.records))[: config.limit])
    questions = [question for record in dataset.records for question in questions_of(record, loaded.images)]
    answers = ask(loaded, questions, max_new_tokens=config.max_new_tokens, title="questions")
    boxes = box_scores(questions, answers, loaded.images)
    scores = score(config.metrics, questions, answers, boxes)
    write_predictions(Path(config.out), questions, answers, boxes, scores)
    result: dict[str, Any] = {
        "loss": mean_loss(loaded, dataset),
        **scores.means,
        **summary(boxes),
        "conversations": len(dataset.records),
        "questions": len(questions),
        "cut": num_cut(answers),
        "predictions": config.out,
        "rehearsal": loaded.source.rehearsal,
    }
    if result["cut"]:
        note(
            f"{result['cut']} of {len(questions)} answers were cut at max_new_tokens={config.max_new_tokens}, "
            "before they had ended; raise it"
        )
    for name in config.metrics:
        if name not in scores.means:
            note(f"{name} has no value: none of the {len(questions)} expected answers has a box")
    print(json.dumps(result, ensure_ascii=False))
    return 0
