"""What is in a picture: shapes with a colour, a form and a place, and which split a picture belongs to.

Nothing here knows of pixels or words of a question. All lengths are pixels and integers.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
FORMS = ("circle", "square", "triangle", "cross", "star")
KINDS = tuple((colour, form) for colour in COLOURS for form in FORMS)
NUM_SHADES = 3
NUM_BACKGROUNDS = 4

# One picture in eight belongs to the test split, whatever seed drew it.
_TEST_SHARE = 8
_STEP = 8  # sizes and offsets are multiples of this many pixels


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a picture is divided into places, one shape at most in each.

    Attributes:
        cell: Side of a (square) place, pixels.
        columns: Number of places from left to right.
        places: English name of each place, row by row.
        max_shapes: Most shapes in a picture.
        sizes: Smallest and largest side of a shape, pixels.
        snapped: Side of the shapes of a snapped picture, pixels.
    """

    cell: int
    columns: int
    places: tuple[str, ...]
    max_shapes: int
    sizes: tuple[int, int]
    snapped: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, pixels."""
        return self.cell * self.columns, self.cell * (len(self.places) // self.columns)


_CORNERS = ("top left", "top right", "bottom left", "bottom right")
_NINE = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")

LAYOUTS = {
    "one": Layout(cell=384, columns=1, places=("middle",), max_shapes=1, sizes=(200, 296), snapped=288),
    "four": Layout(cell=192, columns=2, places=_CORNERS, max_shapes=4, sizes=(128, 168), snapped=144),
    "nine": Layout(cell=128, columns=3, places=_NINE, max_shapes=4, sizes=(88, 112), snapped=96),
    "wide": Layout(cell=384, columns=2, places=("left", "right"), max_shapes=2, sizes=(200, 296), snapped=288),
    "tall": Layout(cell=384, columns=1, places=("top", "bottom"), max_shapes=2, sizes=(200, 296), snapped=288),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape; it touches all four sides of its square box."""

    colour: str
    form: str
    shade: int
    place: str
    left: int
    top: int
    size: int

    @property
    def name(self) -> str:
        """Colour and form, as in "red circle"."""
        return f"{self.colour} {self.form}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture. `snapped` shapes stand at few, fixed spots, so that their boxes can be learned."""

    layout: str
    background: int
    snapped: bool
    shapes: tuple[Shape, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, pixels."""
        return LAYOUTS[self.layout].size

    def box(self, shape: Shape) -> tuple[int, int, int, int]:
        """The box of a shape as the official grounding form gives it: x1, y1, x2, y2 in 0..999 of the picture's sides.

        A shape of 288 pixels at (48, 48) in a picture of 384 x 384 has the box (124, 124, 874, 874).
        """
        width, height = self.size
        right, bottom = shape.left + shape.size, shape.top + shape.size
        return (
            shape.left * 999 // width,
            shape.top * 999 // height,
            right * 999 // width,
            bottom * 999 // height,
        )


def split_of(scene: Scene) -> str:
    """The split a picture belongs to, decided by its content alone, so that no two splits can share a picture."""
    return "test" if zlib.crc32(repr(scene).encode()) % _TEST_SHARE == 0 else "train"


def sample_scene(
    rng: random.Random, layout: str, *, split: str, kinds: Sequence[tuple[str, str]] | None = None
) -> Scene:
    """Draw a random picture of a split.

    Args:
        rng: Where the randomness comes from.
        layout: A key of LAYOUTS.
        split: "train" or "test".
        kinds: Colour and form of each shape; None for 1 up to the layout's `max_shapes` different ones.
    """
    while True:
        scene = _sample(rng, layout, kinds)
        if split_of(scene) == split:
            return scene


def _sample(rng: random.Random, name: str, kinds: Sequence[tuple[str, str]] | None) -> Scene:
    layout = LAYOUTS[name]
    snapped = rng.random() < 0.4
    # The larger of two numbers: fuller pictures hold more answers, and cost the model no more to look at.
    count = max(rng.randint(1, layout.max_shapes), rng.randint(1, layout.max_shapes))
    chosen = kinds if kinds is not None else rng.sample(KINDS, count)
    shapes = []
    for index, (colour, form) in zip(sorted(rng.sample(range(len(layout.places)), len(chosen))), chosen, strict=True):
        if snapped:
            size = layout.snapped
            right = down = (layout.cell - size) // 2
        else:
            size = rng.randrange(layout.sizes[0], layout.sizes[1] + 1, _STEP)
            right = rng.randrange(0, layout.cell - size + 1, _STEP)
            down = rng.randrange(0, layout.cell - size + 1, _STEP)
        shapes.append(
            Shape(
                colour=colour,
                form=form,
                shade=rng.randrange(NUM_SHADES),
                place=layout.places[index],
                left=index % layout.columns * layout.cell + right,
                top=index // layout.columns * layout.cell + down,
                size=size,
            )
        )
    return Scene(layout=name, background=rng.randrange(NUM_BACKGROUNDS), snapped=snapped, shapes=tuple(shapes))
