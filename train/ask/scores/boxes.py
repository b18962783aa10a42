"""How well the boxes of answers cover the expected ones: intersection over union."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.answer_boxes import LabelledBox, matched_ious, read_boxes
from data.images.reader import ImageReader
from data.images.ref import ImageRef

GOOD = 0.5  # IoU from which a box counts as found, as in RefCOCO's Acc@0.5


@dataclass(frozen=True, kw_only=True)
class BoxScore:
    """The boxes of one answer beside the expected ones."""

    expected: tuple[LabelledBox, ...]
    found: tuple[LabelledBox, ...]
    malformed: int
    """Boxes of the answer that cannot be read."""
    ious: tuple[float, ...]
    """For each expected box the overlap with the one found for it; 0 where none was."""


def box_score(expected: str, answer: str, pictures: Sequence[ImageRef], images: ImageReader) -> BoxScore:
    """Compare the boxes of an answer with those of the expected one; both are on the last picture shown.

    Args:
        expected, answer: with special tokens as they are written.
        pictures: shown so far.
        images: tells their sizes.

    Raises:
        ImageError: a picture that cannot be opened.
    """
    if "det|>" not in expected + answer:  # no picture need be opened
        return BoxScore(expected=(), found=(), malformed=0, ious=())
    sizes = [images.size(picture) for picture in pictures]
    wanted, given = read_boxes(expected, sizes), read_boxes(answer, sizes)
    ious = matched_ious(wanted.boxes, given.boxes)
    return BoxScore(expected=wanted.boxes, found=given.boxes, malformed=given.malformed, ious=tuple(ious))


def summary(scores: Sequence[BoxScore]) -> dict[str, Any]:
    """Sum up the answers to questions that boxes were expected for; empty where none were.

    Returns:
        `boxes` with: expected and found (how many), malformed, mean_iou (over the expected ones, 0 for one that was not
        found) and over_half (the share of them whose IoU is 0.5 or more).
    """
    asked = [score for score in scores if score.expected]
    ious = [iou for score in asked for iou in score.ious]
    if not ious:
        return {}
    return {
        "boxes": {
            "expected": len(ious),
            "found": sum(len(score.found) for score in asked),
            "malformed": sum(score.malformed for score in asked),
            "mean_iou": sum(ious) / len(ious),
            # Rounded: half a box is 0.5 in thousandths, and a digit less once it was in pixels.
            "over_half": sum(round(iou, 9) >= GOOD for iou in ious) / len(ious),
        }
    }
