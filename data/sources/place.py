"""Where a file of rows lies and what it is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a file lies and what it is called."""

    path: Path
    name: str
    """As errors and reports call it."""
    root: Path | None = None
    """Where relative image paths start; None: in the folder of each file."""
    cache: Path | None
    """Folder for what is worth keeping until the next start."""

    def kept(self, *parts: str) -> Path | None:
        """Name something to be kept in the cache; None: nothing is."""
        return self.cache.joinpath(*parts) if self.cache else None

    @property
    def folder(self) -> Path:
        """Where relative image paths start."""
        return self.root or self.path.absolute().parent
