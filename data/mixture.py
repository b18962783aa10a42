"""How often each row of each source is taken in an epoch; a function of the seed and the epoch alone."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vl2.errors import UserError

_FINEST = 10_000  # greatest denominator of a repeat: products with it and 10^7 rows stay within 64 bits
_TAG = 0x6D6978  # keeps these random numbers apart from those that order an epoch


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """Sources whose rows an epoch takes a given number of times, which need not be whole.

    Row p of the N rows of a source, in an order that the seed shuffles once, is taken in epoch k

        floor((k + 1) * repeat + p / N) - floor(k * repeat + p / N)   times,

    which makes floor(N * (k + 1) * repeat) - floor(N * k * repeat) rows in all, without error that adds up.

    Example: 4 rows, times each is taken; p = 0 to 3

        repeat 2.5    epoch 0: 2 2 3 3    epoch 1: 3 3 2 2    five times each in two epochs
        repeat 0.5    epoch 0: 0 0 1 1    epoch 1: 1 1 0 0    each once, then the same again
    """

    source_of: np.ndarray
    """int [N]: index of each row's source; rows of a source follow one another."""
    repeats: tuple[float, ...]
    """Of each source."""
    names: tuple[str, ...]
    """Of each source, for errors."""

    def __post_init__(self) -> None:
        """Refuse a repeat that takes nothing."""
        for name, repeat in zip(self.names, self.repeats, strict=True):
            if not repeat > 0:
                raise UserError(f"source {name}: repeat={repeat:g}: expected a number above 0")

    @property
    def is_plain(self) -> bool:
        """Whether every epoch takes every row once."""
        return all(repeat == 1 for repeat in self.repeats)

    @property
    def settings(self) -> str:
        """All that decides what epochs take, in words; empty where they take every row once."""
        if self.is_plain:
            return ""
        rows = np.bincount(self.source_of, minlength=len(self.repeats)).tolist()
        times = [str(repeat).removesuffix(".0") for repeat in self.repeats]  # in full: they tell plans apart
        return ", ".join(f"{count} rows x {repeat}" for count, repeat in zip(rows, times, strict=True))

    def members(self, *, seed: int, epoch: int) -> np.ndarray:
        """Rows of an epoch: source after source, of each the rows in their order, then those taken again likewise.

        Args:
            seed, epoch: all that decides it.

        Returns:
            int64 [rows of the epoch]: indices, as often as each is taken.

        Example: sources of 2 and 3 rows, repeat 2 and 1: [0, 1, 0, 1, 2, 3, 4].
        """
        if self.is_plain:
            return np.arange(len(self.source_of), dtype=np.int64)
        taken: list[np.ndarray] = []
        for source, repeat in enumerate(self.repeats):
            rows = np.flatnonzero(self.source_of == source)
            times = _times(len(rows), repeat, seed=seed, source=source, epoch=epoch)
            taken += [rows[times > done] for done in range(int(times.max(initial=0)))]
        return np.concatenate(taken) if taken else np.zeros(0, dtype=np.int64)

    def check_all_taken(self, epochs: int) -> None:
        """Refuse a mixture of which a source gives no row to the epochs of a run.

        Raises:
            UserError: naming the source.
        """
        rows = np.bincount(self.source_of, minlength=len(self.repeats)).tolist()
        for name, count, repeat in zip(self.names, rows, self.repeats, strict=True):
            if not count:
                raise UserError(f"source {name}: expected at least one row to train on, found none")
            if int(count * epochs * _exact(repeat)) == 0:
                raise UserError(
                    f"source {name}: repeat={repeat:g} takes none of its {count} rows in {epochs} epoch(s); raise it"
                )


def plain_mixture(count: int) -> Mixture:
    """One source of so many rows, each taken once an epoch."""
    return Mixture(source_of=np.zeros(count, dtype=np.int32), repeats=(1.0,), names=("data",))


def _exact(repeat: float) -> Fraction:
    """The number that was typed: 0.1 is a tenth, 0.333333 a third."""
    return Fraction(str(repeat)).limit_denominator(_FINEST)


def _times(count: int, repeat: float, *, seed: int, source: int, epoch: int) -> np.ndarray:
    """How often each of a source's rows is taken in an epoch, int64 [count]."""
    exact = _exact(repeat)
    whole, part = exact.numerator, exact.denominator
    place = np.random.default_rng([_TAG, seed, source]).permutation(count).astype(np.int64) * part
    after, before = ((place + k * whole * count) // (part * count) for k in (epoch + 1, epoch))
    return after - before
