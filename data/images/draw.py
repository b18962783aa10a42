"""Draws boxes and their labels onto a picture, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.answer_boxes import LabelledBox

# Okabe and Ito's colours, which the colour-blind tell apart as well; each is seen on light and on dark ground.
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
_FIRST_CHINESE = "\u2e80"  # from here on, scripts that need a font of their own
_CHINESE_FONTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf", "wqy-microhei.ttc"),
    *("wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "PingFang.ttc", "STHeiti Light.ttc", "Arial Unicode.ttf"),
    *("msyh.ttc", "simhei.ttf", "simsun.ttc"),
)


def draw_boxes(image: Image.Image, boxes: Sequence[LabelledBox]) -> Image.Image:
    """Draw boxes onto a copy of a picture, each label in a colour of its own.

    Args:
        image: RGB.
        boxes: of this picture.
    """
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    short = min(image.size)
    line, font_size = max(2, round(short / 200)), max(12, round(short / 32))
    labels = list(dict.fromkeys(each.label for each in boxes))
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(labels)}
    for each in boxes:
        corners = (each.box.x1, each.box.y1, each.box.x2, each.box.y2)
        draw.rectangle(corners, outline=colours[each.label], width=line)
    for each in boxes:  # on top of every box
        if each.label:
            _draw_label(draw, each, colours[each.label], font_size, image.size)
    return drawn


def can_show(label: str) -> bool:
    """Whether a font is there that has the characters of a label."""
    return not _needs_chinese(label) or _chinese_font() is not None


def _draw_label(
    draw: ImageDraw.ImageDraw, each: LabelledBox, colour: tuple[int, int, int], font_size: int, size: tuple[int, int]
) -> None:
    """Write a label onto a ground of the box's colour, above the box; below its upper edge where no room is above."""
    path = _chinese_font() if _needs_chinese(each.label) else None
    font = ImageFont.truetype(path or _plain_font(), font_size, layout_engine=ImageFont.Layout.BASIC)
    pad = max(2, font_size // 5)
    text = _shortened(" ".join(each.label.split()), font, size[0] - 2 * pad)
    width, height = font.getlength(text) + 2 * pad, font_size + 2 * pad
    x = max(0.0, min(each.box.x1, size[0] - width))
    y = each.box.y1 - height if each.box.y1 >= height else max(0.0, min(each.box.y1, size[1] - height))
    red, green, blue = colour
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 128
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + pad, y + height / 2), text, font=font, anchor="lm", fill="white" if dark else "black")


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    text = text[:200]
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _needs_chinese(label: str) -> bool:
    return any(character >= _FIRST_CHINESE for character in label)


@cache
def _chinese_font() -> str | None:
    for name in _CHINESE_FONTS:
        try:
            return str(ImageFont.truetype(name, 10).path)
        except OSError:
            continue
    return None


@cache
def _plain_font() -> str:
    import matplotlib  # here: only who draws needs its font, which has Latin, Greek and Cyrillic letters

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
