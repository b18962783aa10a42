"""Small integer tensors that depend on host numbers only, made once and kept.

Sending host data to a GPU waits for all that it still has to do, and Paddle makes four tensors of one range.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import paddle

# Streams whose bounds are kept: a pack asks for those of its conversations and of its tiles, once a layer.
KEPT_BOUNDS = 256

_longest: dict[paddle.base.core.Place, paddle.Tensor] = {}  # the longest range made so far at each place


def positions(num: int, place: paddle.base.core.Place) -> paddle.Tensor:
    """0, 1, .. num - 1 as int64, a view that is not to be written to.

    Args:
        num: how many.
        place: where; the one that new tensors are made at.
    """
    if not paddle.in_dynamic_mode():  # a value of one static program means nothing in another
        return paddle.arange(num, dtype="int64")
    longest = _longest.get(place)
    if longest is None or longest.shape[0] < num:
        # Up to a power of two, so that streams of growing length do not make one each.
        longest = _longest[place] = paddle.arange(1 << max(num - 1, 1023).bit_length(), dtype="int64")
    return longest[:num]


def segment_bounds(lens: Sequence[int], place: paddle.base.core.Place) -> paddle.Tensor:
    """Where the segments of a stream begin and the last one ends, int32 [S + 1]; not to be written to.

        lens (3, 2)    0 3 5

    Args:
        lens: tokens of each segment (host integers).
        place: of the result.
    """
    make = _segment_bounds if paddle.in_dynamic_mode() else _segment_bounds.__wrapped__
    return make(tuple(lens), place)


@functools.lru_cache(maxsize=KEPT_BOUNDS)
def _segment_bounds(lens: tuple[int, ...], place: paddle.base.core.Place) -> paddle.Tensor:
    return paddle.to_tensor([0, *itertools.accumulate(lens)], dtype="int32", place=place)
