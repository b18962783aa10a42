"""Several adapters on one base in memory: the one in use computes, the others wait beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from paddle import nn


class _Part(NamedTuple):
    """A layer or a parameter where it stands."""

    table: dict[str, Any]  # of the layer that holds it
    name: str
    value: Any  # None: nothing stands there


class Switch:
    """Lets one adapter after the other compute, or none.

    An adapter is what loading it changed in the model: layers and parameters that took the place of others. To change
    over is to write references, some hundreds for Tiny; no weight is copied.

    Args:
        model: the base model, without an adapter.
    """

    def __init__(self, model: nn.Layer):
        self._tables = [
            t for layer in model.sublayers(include_self=True) for t in (layer._sub_layers, layer._parameters)
        ]
        self._base = {(id(table), name): value for table in self._tables for name, value in table.items()}
        self._put: dict[str | None, list[_Part]] = {None: []}
        self._taken: dict[str | None, list[_Part]] = {None: []}
        self._used: str | None = None

    @contextmanager
    def adding(self, name: str) -> Iterator[None]:
        """Whatever is changed in the model within becomes the adapter `name`; afterwards the base computes again."""
        self.use(None)
        yield
        # A layer that came in is the adapter's as a whole: what it holds needs no look.
        changed = [
            _Part(table, leaf, value)
            for table in self._tables
            for leaf, value in table.items()
            if self._base.get((id(table), leaf)) is not value
        ]
        self._put[name] = changed
        self._taken[name] = [part._replace(value=self._base.get((id(part.table), part.name))) for part in changed]
        self._used = name
        self.use(None)

    def use(self, name: str | None) -> None:
        """Let the model compute with an adapter; None: as the base does."""
        if name != self._used:
            for table, leaf, value in (*self._taken[self._used], *self._put[name]):
                table[leaf] = value
            self._used = name
