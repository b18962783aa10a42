"""Tensors that depend on host numbers only, made once and kept.

Sending host data to a GPU waits for all that it still has to do, and Paddle makes four tensors of one range.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import paddle

from vl2.weight_kernels import NF4_VALUES

# Streams whose bounds are kept: a pack asks for those of its conversations and of its tiles, once a layer.
KEPT_BOUNDS = 256
# Masks that are kept, and the keys of the largest: eight of 8 MB at most.
KEPT_MASKS, KEPT_MASK_KEYS = 8, 2048

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


def send(arrays: Mapping[str, np.ndarray]) -> dict[str, paddle.Tensor]:
    """Some arrays of integers, sent to the device together: the host waits once for all of them.

    Args:
        arrays: of one dimension.

    Returns:
        int64 views of one tensor, by the same names; not to be written to.
    """
    flat = paddle.to_tensor(np.concatenate([np.asarray(array, np.int64) for array in arrays.values()]))
    stops = itertools.accumulate(len(array) for array in arrays.values())
    return {name: flat[stop - len(arrays[name]) : stop] for name, stop in zip(arrays, stops, strict=True)}


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


@functools.cache
def byte_pairs(place: paddle.base.core.Place) -> paddle.Tensor:
    """The two values that each byte of 4-bit codes stands for, the low four bits first: float32 [256, 2].

    Args:
        place: of the result.
    """
    codes = np.arange(256)
    return paddle.to_tensor(np.stack([NF4_VALUES[codes % 16], NF4_VALUES[codes // 16]], axis=1), place=place)


def causal_mask(num_queries: int, num_keys: int, place: paddle.base.core.Place) -> paddle.Tensor:
    """What hides the future from queries that are the last of the keys, float32 [n, m]; not to be written to.

        2 queries of 3 keys     0 0 -1e30
                                0 0 0

    Args:
        num_queries: n, at most m.
        num_keys: m.
        place: where; the one that new tensors are made at.
    """
    keep = paddle.in_dynamic_mode() and num_keys <= KEPT_MASK_KEYS
    make = _causal_mask if keep else _causal_mask.__wrapped__
    return make(num_queries, num_keys, place)


@functools.lru_cache(maxsize=KEPT_MASKS)
def _causal_mask(num_queries: int, num_keys: int, place: paddle.base.core.Place) -> paddle.Tensor:
    return paddle.triu(paddle.full([num_queries, num_keys], -1e30, "float32"), diagonal=num_keys - num_queries + 1)
