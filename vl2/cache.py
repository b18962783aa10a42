"""Key/value cache of a batch of sequences that grow at different lengths.

Shape suffixes: T tokens of the stream, G heads that are kept (1 for MLA's compressed rows), M room of a buffer in
tokens, W channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import paddle

from vl2.errors import UserError

# A buffer that is full gets room for so many more tokens: it is copied once in so many.
ROOM = 256


class Kept(NamedTuple):
    """What a layer keeps of one sequence."""

    buffers: tuple[paddle.Tensor, ...]  # one a stream, [G, M, W]; zeros after the last token
    length: int  # tokens


class LayerCache:
    """What one layer keeps of every sequence, of one or more streams (for MHA keys and values).

    It lies as decoding reads it: every head's rows one after another, so that a product takes the buffer as it is. A
    view of the rows in use would be copied, all of it for each token.

    Args:
        capacities: most tokens each sequence may reach.
    """

    def __init__(self, capacities: Sequence[int]):
        self.capacities = list(capacities)
        self.lengths = [0] * len(capacities)
        self._buffers: list[list[paddle.Tensor]] = [[] for _ in capacities]

    def append(self, streams: tuple[paddle.Tensor, ...], q_lens: Sequence[int]) -> list[Kept]:
        """Add q_lens[s] rows to sequence s.

        Args:
            streams: flat tensors [sum(q_lens), G, W].
            q_lens: new rows of each sequence; 0 where it does not grow.

        Returns:
            All that is kept of the sequences that grew, which have queries; the caller leaves the others out likewise.
        """
        heads_first = [stream.transpose([1, 0, 2]) for stream in streams]
        start, grown = 0, []
        for s, count in enumerate(q_lens):
            if not count:
                continue
            first, end = self.lengths[s], self.lengths[s] + count
            if end > self.capacities[s]:
                raise UserError(f"sequence {s} would hold {end} tokens, its cache was made for {self.capacities[s]}")
            rows = [stream_GTW[:, start : start + count] for stream_GTW in heads_first]
            self._make_room(s, end, rows)
            for buffer, row_GTW in zip(self._buffers[s], rows, strict=True):
                buffer[:, first:end] = row_GTW
            self.lengths[s] = end
            grown.append(Kept(tuple(self._buffers[s]), end))
            start += count
        return grown

    def _make_room(self, s: int, length: int, rows: list[paddle.Tensor]) -> None:
        """Let the buffers of a sequence hold `length` tokens; `rows` are shaped as what they will hold."""
        buffers = self._buffers[s] or [row_GTW[:, :0] for row_GTW in rows]
        room = buffers[0].shape[1]
        if length > room:
            more = min(-(-length // ROOM) * ROOM, self.capacities[s]) - room
            self._buffers[s] = [
                paddle.concat([old, paddle.zeros([old.shape[0], more, old.shape[2]], old.dtype)], axis=1)
                for old in buffers
            ]


def flat_streams(kept: Sequence[Kept]) -> tuple[tuple[paddle.Tensor, ...], list[int]]:
    """Copies of what is kept of some sequences, as flat tensors [sum(lengths), G, W], and their lengths."""
    streams = zip(*([buffer[:, : one.length] for buffer in one.buffers] for one in kept), strict=True)
    flat = (paddle.concat(list(parts), axis=1).transpose([1, 0, 2]) for parts in streams)
    return tuple(flat), [one.length for one in kept]


class KVCache:
    """One `LayerCache` a decoder layer.

    Args:
        num_layers: decoder layers.
        capacities: most tokens each sequence may reach.
    """

    def __init__(self, num_layers: int, capacities: Sequence[int]):
        self.layers = [LayerCache(capacities) for _ in range(num_layers)]

    def lengths(self) -> list[int]:
        """Tokens kept of each sequence."""
        return list(self.layers[0].lengths)
