"""How much of a pack each record takes: one `Size`, or the columns of a million."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np

from vl2.tiles import Grid, num_tiles


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of a pack a record takes."""

    tokens: int
    """Ids of the whole conversation, image tokens included."""
    supervised: int
    """Of these, tokens that are learned."""
    grids: tuple[Grid, ...]
    """(columns, rows) of local tiles of each image."""

    @property
    def tiles(self) -> int:
        """Tiles the vision tower sees, global views included."""
        return sum(num_tiles(grid) for grid in self.grids)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sizes(Sequence[Size]):
    """Sizes of N records with I images, as columns of numbers: item i is the `Size` of record i.

    Example: a text of 20 tokens, and 640 tokens with one picture of 2×1 tiles

        tokens  20 640    supervised  4 9    first_image  0 0 1    grids  [[2, 1]]    tiles  0 3
    """

    tokens: np.ndarray
    """int32 [N]: ids of each conversation, image tokens included."""
    supervised: np.ndarray
    """int32 [N]: of these, tokens that are learned."""
    first_image: np.ndarray
    """int64 [N + 1]: where the images of each record begin in `grids`."""
    grids: np.ndarray
    """uint8 [I, 2]: columns and rows of local tiles of each image."""

    @classmethod
    def of(cls, sizes: Iterable[Size]) -> Sizes:
        """Lay single sizes out in columns."""
        rows = list(sizes)
        grids = [grid for size in rows for grid in size.grids]
        return cls(
            tokens=np.array([size.tokens for size in rows], dtype=np.int32),
            supervised=np.array([size.supervised for size in rows], dtype=np.int32),
            first_image=np.cumsum([0, *(len(size.grids) for size in rows)], dtype=np.int64),
            grids=np.array(grids, dtype=np.uint8).reshape(-1, 2),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Sizes]) -> Sizes:
        """Put the columns of several one after the other."""
        num_images = np.concatenate([np.diff(part.first_image) for part in parts])
        return cls(
            tokens=np.concatenate([part.tokens for part in parts]),
            supervised=np.concatenate([part.supervised for part in parts]),
            first_image=np.concatenate([[0], np.cumsum(num_images)]),
            grids=np.concatenate([part.grids for part in parts]),
        )

    @cached_property
    def tiles(self) -> np.ndarray:
        """int32 [N]: tiles the vision tower sees of each record, global views included."""
        of_images = 1 + self.grids[:, 0].astype(np.int64) * self.grids[:, 1]
        until = np.concatenate([[0], np.cumsum(of_images)])
        return np.diff(until[self.first_image]).astype(np.int32)

    def __len__(self) -> int:
        """Count the records."""
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> Size: ...

    @overload
    def __getitem__(self, index: slice) -> Sizes: ...

    def __getitem__(self, index: int | slice) -> Size | Sizes:
        """Return the size of one record, or the columns of some."""
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        index = range(len(self))[index]
        first, end = self.first_image[index], self.first_image[index + 1]
        return Size(
            tokens=int(self.tokens[index]),
            supervised=int(self.supervised[index]),
            grids=tuple((columns, rows) for columns, rows in self.grids[first:end].tolist()),
        )

    def take(self, indices: np.ndarray) -> Sizes:
        """Return the sizes of some records, in the order given.

        Args:
            indices: int [M] of records.
        """
        return Sizes(
            tokens=self.tokens[indices],
            supervised=self.supervised[indices],
            first_image=np.concatenate([[0], np.cumsum(np.diff(self.first_image)[indices])]),
            grids=self.grids[self.images_of(indices)],
        )

    def images_of(self, indices: np.ndarray) -> np.ndarray:
        """Return where the images of some records lie in `grids`, int64.

        Args:
            indices: int [M] of records.
        """
        num_images = np.diff(self.first_image)[indices]
        first_image = np.concatenate([[0], np.cumsum(num_images)])
        # Image k of record i: where i's images begin here, plus k.
        within = np.arange(first_image[-1]) - np.repeat(first_image[:-1], num_images)
        return np.repeat(self.first_image[:-1][indices], num_images) + within
