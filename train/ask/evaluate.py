"""`bash launch.sh eval model=FOLDER data.path=FILE`: loss and exact match; also what a training run is asked."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from tqdm import tqdm

from data.boxes import place_boxes
from data.cache import default_cache
from data.dataset import Dataset, open_dataset
from data.images.files import ImageError
from data.images.reader import ImageReader
from data.images.ref import ImageRef
from data.packs import PackDataset
from data.plan import make_plan
from data.record import Record
from train.ask.answer import BATCH_TOKENS, Answer, answer_all, prepare
from train.ask.box_scores import BoxScore, box_score, summary
from train.ask.data_settings import image_reader, read_settings, source_settings
from train.ask.drawing import box_row
from train.ask.load import Loaded, load
from train.config.load import load_eval_config
from train.machine.devices import use_device
from train.store.run_dir import check_place
from vl2.errors import UserError
from vl2.prompt import IMAGE_PLACEHOLDER, Message


@dataclass(frozen=True, kw_only=True)
class Question:
    """A turn to answer: what was said before it, as it is in the data, and the answer expected."""

    record: Record
    messages: tuple[Message, ...]  # up to the user's turn
    images: tuple[ImageRef, ...]  # those of these messages
    expected: str


def questions_of(record: Record, images: ImageReader) -> Iterator[Question]:
    """Every assistant's turn of a conversation is a question.

    Args:
        record: the conversation.
        images: tells the sizes of its pictures, where it has boxes on them.

    user A, assistant b, user C, assistant d  ->  (A -> b), (A b C -> d)

    Raises:
        RecordError: a picture with boxes that cannot be opened.
    """
    messages = record.messages
    if record.boxes:
        sizes = []
        for i, image in enumerate(record.images):
            try:
                sizes.append(images.size(image))
            except ImageError as error:
                raise record.image_error(i, str(error)) from error
        messages = place_boxes(record, sizes)
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        asked = messages[:i]
        num_images = sum(m.content.count(IMAGE_PLACEHOLDER) for m in asked)
        yield Question(
            record=record, messages=asked, images=record.images[:num_images], expected=message.content.strip()
        )


def permuted(questions: Sequence[Question]) -> list[Question]:
    """The same questions, each with the pictures of the next one that has as many."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        groups[len(question.images)].append(i)
    images = [question.images for question in questions]
    for group in groups.values():
        for i, following in zip(group, [*group[1:], group[0]], strict=True):
            images[i] = questions[following].images
    return [
        Question(record=q.record, messages=q.messages, images=shown, expected=q.expected)
        for q, shown in zip(questions, images, strict=True)
    ]


def ask(loaded: Loaded, questions: Sequence[Question], *, max_new_tokens: int, title: str) -> list[Answer]:
    """Greedy answers, in order, with a progress bar on stderr.

    Raises:
        RecordError: an image that cannot be decoded.
    """

    def prompt_of(question: Question) -> dict[str, np.ndarray]:
        try:
            return prepare(question.messages, question.images, loaded)
        except ImageError as error:
            raise question.record.error("images", str(error)) from error

    answers = answer_all(loaded, map(prompt_of, questions), max_new_tokens=max_new_tokens)
    return list(tqdm(answers, total=len(questions), desc=title, unit="question", file=sys.stderr, mininterval=1.0))


def exact_match(questions: Sequence[Question], answers: Sequence[Answer]) -> float:
    """Part of the answers that are the expected ones, word for word (white space around them aside)."""
    right = sum(answer.text.strip() == q.expected for q, answer in zip(questions, answers, strict=True))
    return right / max(len(questions), 1)


def num_cut(answers: Sequence[Answer]) -> int:
    """Count the answers that did not come to their end: whether they are right cannot be told."""
    return sum(answer.cut for answer in answers)


def box_scores(questions: Sequence[Question], answers: Sequence[Answer], images: ImageReader) -> list[BoxScore]:
    """Compare the boxes of each answer with the expected ones.

    Raises:
        RecordError: a picture with boxes that cannot be opened.
    """
    scores = []
    for question, answer in zip(questions, answers, strict=True):
        try:
            scores.append(box_score(question.expected, answer.text, question.images, images))
        except ImageError as error:
            raise question.record.error("images", str(error)) from error
    return scores


def mean_loss(loaded: Loaded, dataset: Dataset) -> float:
    """Mean of -log p per supervised token over all conversations."""
    longest = int(dataset.sizes.tokens.max())
    plan = make_plan(
        dataset.sizes,
        max_tokens=max(longest, BATCH_TOKENS),
        max_tiles_per_pack=max(32, int(dataset.sizes.tiles.max())),
        packs_per_step=1,
        seed=0,
        epochs=1,
    )
    packs = PackDataset(dataset.records, plan, dataset.sizes, loaded.tokenizer, loaded.candidates, images=loaded.images)
    total, count = 0.0, 0
    with paddle.no_grad():
        for i in tqdm(range(plan.num_packs), desc="loss", unit="pack", file=sys.stderr, mininterval=1.0):
            loss_sum, supervised = loaded.model.loss(packs[i])
            total, count = total + float(loss_sum), count + supervised
    return total / count


def ask_run(
    loaded: Loaded, records: Sequence[Record], *, limit: int, max_new_tokens: int, permute: bool
) -> dict[str, float]:
    """What a training run asks before and after.

    Args:
        loaded: the model under training.
        records: held-out conversations; each of their turns is a question.
        limit: most questions.
        max_new_tokens: longest answer.
        permute: ask again with the pictures exchanged.

    Returns:
        `questions` (their number), `exact_match`, `cut` (answers that were cut at max_new_tokens), and with `permute`
        `exact_match_permuted`.
    """
    every = (question for record in records for question in questions_of(record, loaded.images))
    questions = list(itertools.islice(every, limit))
    answers = ask(loaded, questions, max_new_tokens=max_new_tokens, title="questions")
    found = {
        "questions": float(len(questions)),
        "exact_match": exact_match(questions, answers),
        "cut": float(num_cut(answers)),
    }
    if permute and any(question.images for question in questions):
        exchanged = permuted(questions)
        answers = ask(loaded, exchanged, max_new_tokens=max_new_tokens, title="pictures exchanged")
        found["exact_match_permuted"] = exact_match(exchanged, answers)
    return found


def main(arguments: list[str]) -> int:
    """Entry script."""
    config = load_eval_config(arguments)
    use_device(config.device, tf32=config.tf32)
    check_predictions(Path(config.out))
    loaded = load(config.model, config.precision, config.base, config.check)
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
    scores = box_scores(questions, answers, loaded.images)
    write_predictions(Path(config.out), questions, answers, scores)
    result: dict[str, Any] = {
        "loss": mean_loss(loaded, dataset),
        "exact_match": exact_match(questions, answers),
        **summary(scores),
        "conversations": len(dataset.records),
        "questions": len(questions),
        "cut": num_cut(answers),
        "predictions": config.out,
        "rehearsal": loaded.source.rehearsal,
    }
    if result["cut"]:
        print(
            f"note: {result['cut']} of {len(questions)} answers were cut at max_new_tokens={config.max_new_tokens}, "
            "before they had ended; raise it",
            file=sys.stderr,
        )
    print(json.dumps(result, ensure_ascii=False))
    return 0


def check_predictions(path: Path) -> None:
    """Refuse to write over a file that no evaluation wrote.

    Raises:
        UserError: saying what to do.
    """
    check_place(path.parent, f"out={path}")
    if not path.exists():
        return
    try:
        if not path.is_file():  # to open a pipe would wait for ever
            raise OSError
        with path.open(encoding="utf-8") as file:
            row = json.loads(file.readline())
        ours = {"expected", "answer", "correct"} <= row.keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"out={path}: there is a file that no evaluation wrote; give another out=")


def write_predictions(
    path: Path, questions: Sequence[Question], answers: Sequence[Answer], scores: Sequence[BoxScore]
) -> None:
    """One JSON object a question: where it comes from, the question, the expected and the given answer, its boxes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for question, answer, score in zip(questions, answers, scores, strict=True):
            row = {
                "source": question.record.source,
                "row": question.record.row,
                "question": question.messages[-1].content,
                "images": [image.name for image in question.images],
                "expected": question.expected,
                "answer": answer.text,
                "correct": answer.text.strip() == question.expected,
                "cut": answer.cut,
                "boxes": [box_row(each) for each in score.found],
                **({"iou": [round(iou, 4) for iou in score.ious]} if score.expected else {}),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
