"""The table of sources: what each of them gives to a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data.dataset import Dataset

_MOST_NAMED = 20  # fields of a source, in a note


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What one source gives in a pass over its rows."""

    HEAD: ClassVar = (
        *("source", "form", "rows", "kept", "held out", "skipped"),
        *("repeat", "tokens", "learned", "images", "tiles"),
    )

    name: str
    form: str
    """Of its rows, as it was found or said."""
    kept: int
    """Rows that are learned from."""
    held_out: int
    """Rows that are not learned from."""
    skipped: int
    """Rows that cannot be used."""
    repeat: float
    """How often an epoch takes each row."""
    tokens: int
    supervised: int
    """Of the tokens."""
    images: int
    tiles: int
    unknown: dict[str, int]
    """Fields that say nothing here and are not read, with the number of kept rows that have each."""

    @property
    def learned(self) -> float:
        """Share of its tokens that are supervised."""
        return self.supervised / self.tokens if self.tokens else 0.0

    def cells(self) -> list[str]:
        """The row of the table, below HEAD."""
        rows = self.kept + self.held_out + self.skipped
        counts = [f"{n:,}" for n in (rows, self.kept, self.held_out, self.skipped)]
        more = [f"{n:,}" for n in (self.images, self.tiles)]
        learned = f"{self.learned:.1%}"
        return [self.name, self.form, *counts, f"{self.repeat:g}", f"{self.tokens:,}", learned, *more]


def source_facts(dataset: Dataset) -> list[SourceFacts]:
    """What each source of a data set gives, in their order."""
    sizes = dataset.sizes
    images = np.diff(sizes.first_image)
    facts = []
    for number, source in enumerate(dataset.sources):
        own = dataset.source_of == number
        facts.append(
            SourceFacts(
                name=source.settings.name or source.settings.path,
                form=source.form,
                kept=int(own.sum()),
                held_out=source.kept - int(own.sum()),
                skipped=source.skipped,
                repeat=source.settings.repeat,
                tokens=int(sizes.tokens[own].sum()),
                supervised=int(sizes.supervised[own].sum()),
                images=int(images[own].sum()),
                tiles=int(sizes.tiles[own].sum()),
                unknown=dict(source.unknown),
            )
        )
    return facts


def unread_notes(dataset: Dataset) -> list[str]:
    """Name, for each source that has some, the fields of its rows that say nothing here, with the rows of each."""
    notes = []
    for source in dataset.sources:
        counted = [f"{name} ({count:,} rows)" for name, count in source.unknown.items()]
        if counted:
            more = f" and {len(counted) - _MOST_NAMED:,} more" if len(counted) > _MOST_NAMED else ""
            name = source.settings.name or source.settings.path
            notes.append(f"{name}: fields that are not read: {', '.join(counted[:_MOST_NAMED])}{more}")
    return notes
