"""Numbers counted into bars."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_MOST_BARS = 40


@dataclass(frozen=True, kw_only=True)
class Bar:
    """How many values lie in [low, high]."""

    low: float
    high: float
    count: int
    height: float
    """Of 100, the highest bar's."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """A column of numbers, counted."""

    title: str
    unit: str
    bars: tuple[Bar, ...]
    words: dict[str, str]
    """Least, median and so on, by name."""


def count_whole(values: np.ndarray, *, title: str, unit: str) -> Histogram:
    """Count whole numbers, a bar for each or for as many together as keep the bars few.

    Args:
        values: whole numbers from 0, at least one.
        title: of the histogram.
        unit: of the values.

    Example: 0, 1, 1, 3 are four bars of 1, 2, 0 and 1.
    """
    least, most = int(values.min()), int(values.max())
    low = 0 if least < _MOST_BARS else least
    width = max(1, -(-(most - low + 1) // _MOST_BARS))
    counts = np.bincount((values - low) // width)
    edges = low + width * np.arange(len(counts))
    words = {
        "least": f"{least:,}",
        "median": f"{np.median(values):,.0f}",
        "mean": f"{values.mean():,.1f}",
        "95 % up to": f"{np.percentile(values, 95):,.0f}",
        "most": f"{most:,}",
    }
    bars = _bars(counts, edges, edges + width - 1)
    return Histogram(title=title, unit=unit, bars=bars, words=words)


def count_shares(values: np.ndarray, *, title: str, unit: str) -> Histogram:
    """Count shares in twenty bars of 5 %, in percent.

    Args:
        values: from 0 to 1, at least one.
        title: of the histogram.
        unit: what the percents are of.
    """
    counts, edges = np.histogram(values * 100, bins=20, range=(0, 100))
    words = {"least": f"{values.min():.1%}", "mean": f"{values.mean():.1%}", "most": f"{values.max():.1%}"}
    return Histogram(title=title, unit=unit, bars=_bars(counts, edges[:-1], edges[1:]), words=words)


def _bars(counts: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> tuple[Bar, ...]:
    highest = max(1, int(counts.max()))
    return tuple(
        Bar(low=float(low), high=float(high), count=int(count), height=100 * int(count) / highest)
        for low, high, count in zip(lows, highs, counts, strict=True)
    )
