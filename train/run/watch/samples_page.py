"""The table of samples in the run's folder: a page for each validation, samples/step-000120.html."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from train.page.render import write_page
from train.page.samples import SampleRow, make_samples_page, small_picture
from train.run.watch.sink import Sample, Sink
from train.store.names import SAMPLES

_NAME = re.compile(r"step-(\d{6,})\.html")


class SamplesPages(Sink):
    """Writes a page each time.

    Args:
        run_dir: of the run.
        title: of the pages.
        first_step: steps made already; pages of later ones are removed.
    """

    def __init__(self, run_dir: Path, *, title: str, first_step: int):
        self.folder, self.title = run_dir / SAMPLES, title
        for path in self.folder.glob("step-*.html"):
            if (found := _NAME.fullmatch(path.name)) and int(found[1]) > first_step:
                path.unlink()

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """A page, with the pictures in it."""
        shown = [
            SampleRow(
                picture=small_picture(row.picture) if row.picture else "",
                question=row.question,
                expected=row.expected,
                answer=row.answer,
                scores=row.scores,
            )
            for row in rows
        ]
        when = f"step {step}" if step else "before training"
        write_page(self.folder / f"step-{step:06d}.html", make_samples_page(f"{self.title}, {when}", shown))
