"""`bash launch.sh eval model=FOLDER data.path=FILE`: loss and scores of one model, or of two side by side."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import default_cache
from data.dataset import Dataset, open_dataset
from data.images.reader import ImageReader
from data.record import RecordError
from train.ask.answers_report import answers_report
from train.ask.data_settings import image_reader, read_settings, source_settings
from train.ask.evaluation import Evaluation, difference, num_differing, right_counts
from train.ask.load import Opened, load_opened, open_model
from train.ask.losses import mean_losses
from train.ask.note import note
from train.ask.predictions import check_predictions, check_report, write_predictions
from train.ask.questions import ask, box_scores, num_cut, questions_of, score
from train.config.load import load_eval_config
from train.config.schema import EvaluateConfig
from train.machine.devices import use_device
from train.page.render import write_page
from train.store.checkpoints import chosen_checkpoint
from vl2.errors import UserError


def main(arguments: list[str]) -> int:
    """Entry script."""
    config = load_eval_config(arguments)
    use_device(config.device, tf32=config.tf32)
    check_predictions(Path(config.out))
    if config.report:
        check_report(Path(config.report))
    models = models_of(config)
    opened = [open_model(name, config.precision, base, config.check, config.frozen) for name, base in models]
    rows = open_rows(config, opened)
    evaluations: list[Evaluation] = []
    for (name, _), model, dataset in zip(models, opened, rows, strict=True):
        evaluations.append(evaluate(name, model, dataset, config, add=bool(evaluations)))
        gc.collect()  # a model's layers know each other; the next one needs the room
    skipped = list({(error.source, error.row): error for each in rows for error in each.skipped}.values())
    for warning in notes(evaluations, skipped, config, opened):
        note(warning)
    found = {**document(evaluations, config), "conversations": len(rows[0].records), "skipped": len(skipped)}
    print(json.dumps(found, ensure_ascii=False), flush=True)
    if config.report:
        words = {
            "data": ", ".join(config.data.path),
            "conversations": f"{len(rows[0].records):,}",
            "longest answer": f"{config.max_new_tokens:,} tokens",
        }
        page = answers_report(evaluations, words, reader_of(config, opened[0]))
        write_page(Path(config.report), page)
    return 0


def models_of(config: EvaluateConfig) -> list[tuple[str, str]]:
    """The folders that `model` and `against` mean, each with its base.

    Raises:
        UserError: no such checkpoint; both are one.
    """
    models = [(chosen_checkpoint(config.model, config.checkpoint), config.base)]
    if config.against:
        models.append((chosen_checkpoint(config.against, config.against_checkpoint), config.against_base))
        (one, base), (other, other_base) = models
        if Path(one).resolve() == Path(other).resolve() and base == other_base:
            raise UserError(f"against={config.against}: expected another model, found the one of model=")
    return models


def open_rows(config: EvaluateConfig, models: Sequence[Opened]) -> list[Dataset]:
    """The same rows as each model takes them, measured; no weights are needed for that.

    Raises:
        UserError: see `open_dataset`; no row that all models can be asked.
    """
    rows = [
        open_dataset(
            source_settings(config.data),
            settings=read_settings(config.data),
            tokenizer=model.folder.tokenizer,
            candidates=model.candidates,
            images=reader_of(config, model),
            context=model.folder.config.language.max_position_embeddings,
            cache=default_cache(),
            workers=config.data.measure_workers,
        )
        for model in models
    ]
    # A row that is too long for one model is left out for both.
    places = [list(zip(each.records.reader_of.tolist(), each.records.row_of.tolist(), strict=True)) for each in rows]
    common = set(places[0]).intersection(*places[1:])
    taken = []
    for each, own in zip(rows, places, strict=True):
        indices = np.array([i for i, place in enumerate(own) if place in common], dtype=np.int64)[: config.limit]
        if not len(indices):
            raise UserError(f"data.path={config.data.path[0]}: no row is left that both models can be asked")
        taken.append(each if len(indices) == len(own) else each.take(indices))
    return taken


def reader_of(config: EvaluateConfig, model: Opened) -> ImageReader:
    """What opens the pictures of the rows for a model."""
    return image_reader(config.data, exif=model.exif)


def evaluate(name: str, opened: Opened, dataset: Dataset, config: EvaluateConfig, *, add: bool) -> Evaluation:
    """Load a model, ask it, write down what it answers; it is gone at the end.

    Args:
        name: of the model, as it was typed.
        opened: the model.
        dataset: the rows.
        config: of the evaluation.
        add: add the answers to those of another model.
    """
    loaded = dataclasses.replace(load_opened(opened), images=reader_of(config, opened))
    questions, source_of = [], []
    for record, source in zip(dataset.records, dataset.source_of.tolist(), strict=True):
        for question in questions_of(record, loaded.images):
            questions.append(question)
            source_of.append(source)
    title = f"questions, {'B' if add else 'A'}" if config.against else "questions"
    answers = ask(loaded, questions, max_new_tokens=config.max_new_tokens, title=title)
    boxes = box_scores(questions, answers, loaded.images)
    scores = score(config.metrics, questions, answers, boxes)
    write_predictions(Path(config.out), name, questions, answers, boxes, scores, add=add)
    loss, loss_of = mean_losses(loaded, dataset)
    return Evaluation(
        model=name,
        rehearsal=loaded.source.rehearsal,
        sources=tuple(source.settings.name or source.settings.path for source in dataset.sources),
        source_of=tuple(source_of),
        questions=tuple(questions),
        answers=tuple(answers),
        boxes=tuple(boxes),
        scores=scores,
        loss=loss,
        loss_of=loss_of,
    )


def document(evaluations: Sequence[Evaluation], config: EvaluateConfig) -> dict[str, Any]:
    """What is printed: the numbers of the model, and with `against` those of the other and how they differ."""
    first = evaluations[0]
    found = {**first.as_document(), "predictions": config.out}
    if config.report:
        found["report"] = config.report
    if len(evaluations) == 2:
        other = evaluations[1]
        found["against"] = other.as_document()
        found["difference"] = difference(first, other)
        found["answers_differ"] = num_differing(first.answers, other.answers)
        found["right"] = {name: right_counts(name, first, other) for name in first.scores.marks}
    return found


def notes(
    evaluations: Sequence[Evaluation], skipped: Sequence[RecordError], config: EvaluateConfig, models: Sequence[Opened]
) -> list[str]:
    """What somebody should know beside the numbers."""
    found = []
    if skipped:
        found.append(f"{len(skipped)} rows cannot be used and were left out, the first: {skipped[0]}")
    for each in evaluations:
        if cut := num_cut(each.answers):
            whose = f" of {each.model}" if len(evaluations) == 2 else ""
            found.append(
                f"{cut} of {len(each.questions)} answers{whose} were cut at max_new_tokens={config.max_new_tokens}, "
                "before they had ended; raise it"
            )
    if len({model.exif for model in models}) == 2:
        found.append(
            "one model was trained with photographs turned as their EXIF data says, the other not; so they see them"
        )
    questions, scores = evaluations[0].questions, evaluations[0].scores
    for name in scores.marks:
        if name not in scores.means:
            found.append(f"{name} has no value: none of the {len(questions)} expected answers has a box")
    return found
