"""Builds what a training run learns from and is asked: sources, held-out rows, plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import paddle

from data.cache import default_cache
from data.dataset import Dataset, open_dataset
from data.held_out import hold_out
from data.images.reader import ImageReader
from data.mixture import Mixture
from data.plan import Plan, make_plan
from data.record import BadRecords, Record, RecordError
from data.settings import SourceSettings
from data.shapes.write import write_shapes
from data.vision_cache import VisionCache
from train.ask.data_settings import image_reader, read_settings, source_settings
from train.config.schema import TrainConfig
from train.config.validation import best_metric
from train.run.by_source import Sources
from train.run.cost import pack_cost
from vl2.checkpoint.model_folder import ModelFolder
from vl2.errors import UserError
from vl2.tiles import Resolution, limit_candidates
from vl2.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class HeldOutFacts:
    """Rows that a run does not learn from."""

    rows: int
    asked: int  # of them; their conversations hold one question or more
    same_conversations: int  # rows that say and show what a row that is trained on does
    same_pictures: int  # pictures of them that rows show that are trained on

    @property
    def note(self) -> str:
        """A warning about what is on both sides; empty where nothing is."""
        counts = {
            f"{self.same_conversations:,} conversation(s)": self.same_conversations,
            f"{self.same_pictures:,} picture(s)": self.same_pictures,
        }
        found = " and ".join(text for text, count in counts.items() if count)
        return found and f"{found} of the held-out rows are trained on too: their answers may be learned by heart"


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run learns from and is asked."""

    path: str  # of the training data
    dataset: Dataset  # rows that are trained on
    plan: Plan
    tokenizer: Tokenizer
    images: ImageReader
    candidates: tuple[Resolution, ...]  # resolutions that data.max_tiles leaves
    sources: Sources | None  # of a mixture; None: there is only one
    validation: Dataset | None  # held-out rows whose loss is computed; None: nothing is held out
    questions: Sequence[Record]  # of them, those that are answered; empty when nothing is asked
    held_out: HeldOutFacts | None  # None: nothing is
    skipped_questions: tuple[RecordError, ...]  # rows left out of their file
    vision_cache: VisionCache | None = None


def build_data(
    config: TrainConfig,
    folder: ModelFolder,
    *,
    bad: BadRecords | None = None,
    bad_questions: BadRecords | None = None,
) -> Data:
    """Read, measure and plan the data; draws the shapes when there are no files.

    Args:
        config: of the run.
        folder: of the base model, from `open_base`.
        bad: what is done with rows that cannot be used, instead of what `config` says.
        bad_questions: the same of the files of held-out rows.

    Raises:
        UserError: a record that cannot be used, an empty data set or source, nothing to hold out.
    """
    images = image_reader(config.data, exif=config.data.exif)  # type: ignore[arg-type]  # checked by the schema
    candidates = limit_candidates(folder.config.candidate_resolutions, config.data.max_tiles)
    context = folder.config.language.max_position_embeddings
    of, held_of = source_settings(config.data), source_settings(config.data, config.data.eval_path)
    splits = config.data.eval_fraction is not None or config.data.eval_rows is not None
    # Nobody else is at work yet: more processes than those that build packs beside a step.
    alone = config.data.workers == 0 and config.data.measure_workers is None
    drawn = not of
    if drawn:
        of, test = _draw(config, "train"), () if splits or held_of else _draw(config, "test")
        held_of = held_of or test

    def open_(of: Sequence[SourceSettings], *, trained: bool, bad: BadRecords | None) -> Dataset:
        return open_dataset(
            of,
            settings=read_settings(config.data),
            tokenizer=folder.tokenizer,
            candidates=candidates,
            images=images,
            max_tokens=config.data.max_tokens if trained else None,
            max_tiles_per_pack=config.data.max_tiles_per_pack if trained else None,
            context=None if trained else context,
            cache=default_cache(),
            workers=0 if alone else config.data.measure_workers,
            bad=bad,
        )

    dataset, validation, questions = open_(of, trained=True, bad=bad), None, None
    skipped_questions: tuple[RecordError, ...] = ()
    facts = None
    if splits:
        fraction, rows = config.data.eval_fraction, config.data.eval_rows
        split = hold_out(dataset.content_keys, fraction=fraction, rows=rows)
        wanted = min(config.eval.questions, rows or config.eval.questions)
        asked = hold_out(dataset.content_keys, fraction=fraction, rows=wanted).asked
        fits = dataset.sizes.tokens <= context  # training may go beyond it
        validation, questions = dataset.take(split.asked[fits[split.asked]]), dataset.take(asked[fits[asked]]).records
        dataset = dataset.take(split.trained)
        facts = _facts(dataset, validation, len(split.asked) + split.unused, asked=len(questions))
    elif held_of:
        validation = open_(held_of, trained=False, bad=bad_questions)
        questions, skipped_questions = validation.records[: config.eval.questions], validation.skipped
        facts = _facts(dataset, validation, len(validation.records), asked=len(questions))
    if validation is not None and questions is not None:
        check_held_out(config, validation, questions)
    mixture = mixture_of(dataset)
    plan = make_plan(
        dataset.sizes,
        max_tokens=config.data.max_tokens,
        max_tiles_per_pack=config.data.max_tiles_per_pack,
        packs_per_step=config.packs_per_step,
        seed=config.seed,
        epochs=config.epochs,
        max_steps=config.max_steps,
        order=config.data.order,
        mixture=mixture,
        data_fingerprint=dataset.fingerprint,
        work=pack_cost(folder.config, config, on_gpu=paddle.get_device() != "cpu").of_samples(dataset.sizes),
    )
    several = len(mixture.names) > 1
    return Data(
        path=", ".join(settings.path for settings in of),
        dataset=dataset,
        plan=plan,
        tokenizer=folder.tokenizer,
        images=images,
        candidates=candidates,
        sources=Sources(names=mixture.names, of_sample=dataset.source_of, supervised=dataset.sizes.supervised)
        if several
        else None,
        validation=validation if validation and len(validation.records) else None,
        questions=tuple(questions or ()),
        held_out=facts,
        skipped_questions=skipped_questions,
    )


def check_held_out(config: TrainConfig, rows: Dataset, questions: Sequence[Record]) -> None:
    """Refuse held-out rows that cannot give what the run is to go by.

    Args:
        rows: held out.
        questions: of them, those that are answered.

    Raises:
        UserError: no answer among them counts, or no box is expected where boxes decide which checkpoint is best.
    """
    if len(rows.records) and not rows.sizes.supervised.any():
        raise UserError("the held-out rows: expected answers to compute the loss of, found none that is learned from")
    metric = best_metric(config)
    if not metric.startswith("box_"):
        return
    answers = (message.content for record in questions for message in record.messages if message.role == "assistant")
    if not any(record.boxes for record in questions) and not any("<|det|>" in answer for answer in answers):
        raise UserError(
            f"eval.best={metric}: none of the {len(questions)} held-out rows that are asked expects a box; give "
            "another metric, or loss"
        )


def mixture_of(dataset: Dataset) -> Mixture:
    """How often an epoch takes the rows of each source.

    Raises:
        UserError: a source without a row that can be used, by its name.
    """
    names = tuple(source.settings.name or source.settings.path for source in dataset.sources)
    for name, source in zip(names, dataset.sources, strict=True):
        if not source.kept:
            raise UserError(
                f"source {name}: expected at least one row that can be used, found none; {source.found_none()}"
            )
    repeats = tuple(source.settings.repeat for source in dataset.sources)
    return Mixture(source_of=dataset.source_of, repeats=repeats, names=names)


def _facts(trained: Dataset, held: Dataset, rows: int, *, asked: int) -> HeldOutFacts:
    return HeldOutFacts(
        rows=rows,
        asked=asked,
        same_conversations=int(np.isin(held.content_keys, trained.content_keys).sum()),
        same_pictures=int(np.count_nonzero(np.intersect1d(held.picture_keys, trained.picture_keys))),
    )


def _draw(config: TrainConfig, split: Literal["train", "test"]) -> tuple[SourceSettings, ...]:
    shapes, folder = config.data.shapes, Path(config.run_dir, "data")
    count = shapes.train if split == "train" else shapes.test
    path = write_shapes(folder, task=shapes.task, split=split, count=count, seed=shapes.seed)
    return (SourceSettings(path=str(path), name="drawn shapes"),)
