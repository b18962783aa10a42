"""Boxes on pictures: in pixels, as parts of the picture, and as DeepSeek-VL2 writes them, 0 to 999."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BOX_PLACEHOLDER = "<bbox>"
"""Stands in a message's content where the boxes of one label go, until the picture's size is known."""
COORDINATE_MAX = 999  # of a corner in the model's text, at the right and lower edge

Unit = Literal["pixels", "parts", "model"]


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle on one picture: upper left and lower right corner."""

    x1: float
    y1: float
    x2: float
    y2: float
    unit: Unit
    """Pixels of the picture as the model sees it, parts of its width and height in [0, 1], or 0 to 999."""
    image: int
    """Which of the conversation's pictures, from 0."""
