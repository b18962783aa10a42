"""report.html: one file that shows what a run learns from, without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.dataset import Dataset
from data.images.reader import ImageReader
from data.plan import Plan
from data.record import RecordError
from train.page.histogram import Histogram, count_shares, count_whole
from train.page.packs import DrawnToken, PackPen
from train.page.render import render_page
from train.page.sources import source_facts
from train.page.visible import visible
from vl2.tokenizer import Tokenizer

FIRST_BAD = 50  # bad rows that the page shows before somebody asks for more


def make_page(
    *,
    title: str,
    words: Mapping[str, str],
    dataset: Dataset | None,
    plan: Plan | None,
    tokenizer: Tokenizer | None,
    reader: ImageReader,
    bad: Sequence[RecordError] = (),
    refused: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Make the page.

    Args:
        title: what the run is called.
        words: facts of the run, name by name.
        dataset: what it learns from; None where it could not be read.
        plan: of its packs; None likewise.
        tokenizer: of the model; None where it could not be had.
        reader: opens pictures, a few of them.
        bad: rows that cannot be used.
        refused: why training would not start; empty: it would; None: nobody asks.
        notes: what else is to be said.

    Returns:
        HTML that refers to nothing outside of it.
    """
    return render_page(
        "page.html.j2",
        script="page.js",
        styles=["page.css"],
        tests={"token": lambda part: isinstance(part, DrawnToken)},
        title=title,
        words=words,
        refused=refused,
        notes=notes,
        bad=bad,
        bad_rows=_bad_rows(bad),
        first_bad=FIRST_BAD,
        histograms=_histograms(dataset, plan) if dataset and plan else (),
        sources=source_facts(dataset) if dataset else (),
        packs=PackPen(dataset, tokenizer, reader).draw(plan) if dataset and plan and tokenizer else (),
        max_tokens=plan.settings["data.max_tokens"] if plan else 0,
    )


def _histograms(dataset: Dataset, plan: Plan) -> list[Histogram]:
    tokens, tiles = dataset.sizes.tokens, dataset.sizes.tiles
    filled = np.array([pack.tokens for pack in plan.packs if pack.samples]) / plan.settings["data.max_tokens"]
    charts = [count_whole(tokens, title="Length of conversations", unit="tokens")]
    if tiles.any():
        charts.append(count_whole(tiles, title="Tiles of conversations", unit="tiles"))
    return [*charts, count_shares(filled, title="Fill of packs", unit="% of data.max_tokens")]


def _bad_rows(bad: Sequence[RecordError]) -> dict[str, Any]:
    """The bad rows as the script reads them: the names of files once."""
    files = list(dict.fromkeys(error.source for error in bad))
    number = {name: i for i, name in enumerate(files)}
    rows = [[number[error.source], error.row, visible(error.where), visible(error.problem)] for error in bad]
    return {"files": [visible(name) for name in files], "rows": rows}
