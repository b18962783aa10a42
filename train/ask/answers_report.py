"""From evaluations to their page: `eval ... report=FILE.html`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from data.images.reader import ImageReader
from train.ask.evaluation import Evaluation, difference, num_differing, right_counts
from train.ask.questions import num_cut
from train.ask.scores.metrics import right_from
from train.page.answers import MOST_QUESTIONS, AnsweredQuestion, GivenAnswer, PageMetric, Table, make_answers_page


def answers_report(evaluations: Sequence[Evaluation], words: Mapping[str, str], reader: ImageReader) -> str:
    """Make the page of the answers of one model, or of two to the same questions.

    Args:
        evaluations: of the one or two.
        words: facts of the evaluation, name by name.
        reader: opens the pictures.
    """
    first = evaluations[0]
    count = len(first.questions)
    with tqdm(
        total=min(count, MOST_QUESTIONS), desc="report", unit="question", file=sys.stderr, mininterval=1.0
    ) as bar:
        return make_answers_page(
            title=" against ".join(each.model for each in evaluations),
            models=[each.model for each in evaluations],
            metrics=[PageMetric(name=name, right_from=right_from(name)) for name in first.scores.marks],
            words={**words, **_more_words(evaluations)},
            tables=[_comparison(*evaluations) if len(evaluations) == 2 else _means(first), *_of_sources(evaluations)],
            questions=_answered(evaluations),
            reader=reader,
            done=bar.update,
        )


def _answered(evaluations: Sequence[Evaluation]) -> list[AnsweredQuestion]:
    first = evaluations[0]
    return [
        AnsweredQuestion(
            source=first.sources[first.source_of[i]],
            file=question.record.source,
            row=question.record.row,
            messages=question.messages,
            images=question.images,
            expected=question.references,
            boxes=first.boxes[i].expected,
            answers=tuple(
                GivenAnswer(
                    text=each.answers[i].text,
                    cut=each.answers[i].cut,
                    boxes=each.boxes[i].found,
                    values=each.scores.of_answer(i),
                )
                for each in evaluations
            ),
        )
        for i, question in enumerate(first.questions)
    ]


def _means(evaluation: Evaluation) -> Table:
    rows = []
    for name in evaluation.scores.marks:
        known = [each for each in evaluation.scores.right(name) if each is not None]
        mean = evaluation.scores.means.get(name)
        rows.append([name, "–" if mean is None else f"{mean:.4f}", f"{sum(known):,} of {len(known):,}"])
    return Table(head=["", "mean", "right"], rows=[*rows, ["loss", f"{evaluation.loss:.4f}", ""]])


def _comparison(one: Evaluation, other: Evaluation) -> Table:
    less, rows = difference(one, other), []
    for name in (*one.scores.means, "loss"):
        if name not in less:
            continue
        counts = right_counts(name, one, other).values() if name != "loss" else ["", "", "", ""]
        means = (f"{each.numbers[name]:.4f}" for each in (one, other))
        rows.append([name, *means, f"{less[name]:+.4f}", *(f"{count:,}" if count != "" else "" for count in counts)])
    return Table(head=["", "A", "B", "A − B", "right by both", "by A alone", "by B alone", "by neither"], rows=rows)


def _of_sources(evaluations: Sequence[Evaluation]) -> list[Table]:
    """A table of the numbers of each source, where there are several; of two models as A / B."""
    found = [each.by_source() for each in evaluations]
    if not found[0]:
        return []
    names = ["loss", *evaluations[0].scores.marks]
    rows = [
        [
            source,
            f"{numbers['questions']:,}",
            *(" / ".join(f"{of[source][name]:.4f}" if name in of[source] else "–" for of in found) for name in names),
        ]
        for source, numbers in found[0].items()
    ]
    return [Table(head=["source", "questions", *names], rows=rows)]


def _more_words(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    first = evaluations[0]
    cut = " and ".join(f"{num_cut(each.answers):,}" for each in evaluations)
    words = {"questions": f"{len(first.questions):,}, answers cut before their end: {cut}"}
    if rehearsed := [each.model for each in evaluations if each.rehearsal]:
        words["rehearsal"] = f"{' and '.join(rehearsed)}, trained on nano"
    if len(evaluations) == 2:
        words["answers differ"] = f"{num_differing(first.answers, evaluations[1].answers):,}"
    return words
