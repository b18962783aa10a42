"""The table of sources: what each of them gives to a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data.dataset import Dataset


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What one source gives in a pass over its rows."""

    HEAD: ClassVar = ("source", "rows", "kept", "skipped", "tokens", "learned", "images", "tiles")

    name: str
    kept: int
    """Rows that are learned from."""
    skipped: int
    """Rows that cannot be used."""
    tokens: int
    supervised: int
    """Of the tokens."""
    images: int
    tiles: int

    @property
    def learned(self) -> float:
        """Share of its tokens that are supervised."""
        return self.supervised / self.tokens if self.tokens else 0.0

    def cells(self) -> list[str]:
        """The row of the table, below HEAD."""
        counts = (self.kept + self.skipped, self.kept, self.skipped, self.tokens)
        more = (self.images, self.tiles)
        return [self.name, *(f"{n:,}" for n in counts), f"{self.learned:.1%}", *(f"{n:,}" for n in more)]


def source_facts(dataset: Dataset) -> list[SourceFacts]:
    """What each source of a data set gives, in their order."""
    skipped = Counter(error.source for error in dataset.skipped)
    names = list(dict.fromkeys([*(record.source for record in dataset.records), *skipped]))
    which = np.array([names.index(record.source) for record in dataset.records])
    tokens = np.array([size.tokens for size in dataset.sizes])
    supervised = np.array([size.supervised for size in dataset.sizes])
    images = np.array([len(size.grids) for size in dataset.sizes])
    tiles = np.array([size.tiles for size in dataset.sizes])
    facts = []
    for number, name in enumerate(names):
        own = which == number
        facts.append(
            SourceFacts(
                name=name,
                kept=int(own.sum()),
                skipped=skipped[name],
                tokens=int(tokens[own].sum()),
                supervised=int(supervised[own].sum()),
                images=int(images[own].sum()),
                tiles=int(tiles[own].sum()),
            )
        )
    return facts
