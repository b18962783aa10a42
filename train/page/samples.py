"""samples/step-000120.html: some held-out questions, with what is expected and what the model answered at that step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from train.page.pictures import jpeg_uri
from train.page.render import render_page

_LONGEST_SIDE = 192  # pixels of a picture


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """A question as the page shows it."""

    picture: str  # data URI; empty: there is none
    question: str
    expected: str
    answer: str
    scores: Mapping[str, float]


def make_samples_page(title: str, rows: Sequence[SampleRow]) -> str:
    """Make the page.

    Args:
        title: of the run and its step.
        rows: in the order shown.

    Returns:
        HTML that refers to nothing outside of it.
    """
    return render_page("samples.html.j2", styles=["page.css"], title=title, rows=rows)


def small_picture(picture: Image.Image) -> str:
    """A picture, small, as a data URI."""
    small = picture.convert("RGB")
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return jpeg_uri(small)
