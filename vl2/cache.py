"""Key/value cache of a batch of sequences that grow at different lengths."""

from __future__ import annotations

import paddle

from vl2.errors import UserError


class LayerCache:
    """What one layer keeps of every sequence: a tuple of [length, ...] streams (for MHA keys and values).

    Buffers are allocated at their final capacity, so appending copies the new rows only.
    """

    def __init__(self, capacities: list[int]):
        self.capacities = capacities
        self.lengths = [0] * len(capacities)
        self._buffers: list[tuple[paddle.Tensor, ...]] = []

    def append(
        self, streams: tuple[paddle.Tensor, ...], q_lens: list[int]
    ) -> tuple[tuple[paddle.Tensor, ...], list[int]]:
        """Add q_lens[s] rows to sequence s.

        Args:
            streams: tuple of flat tensors [sum(q_lens), ...].
            q_lens: new rows of each sequence; 0 where it does not grow.

        Returns:
            (tuple of flat tensors with all rows kept so far of the sequences that grew, their lengths). Sequences
            with q_len 0 are left out, as they have no queries; the caller leaves them out of q_lens likewise.
        """
        if not self._buffers:
            self._buffers = [
                tuple(paddle.zeros([capacity, *stream.shape[1:]], dtype=stream.dtype) for stream in streams)
                for capacity in self.capacities
            ]
        start, kept = 0, []
        for s, count in enumerate(q_lens):
            if not count:
                continue
            end = self.lengths[s] + count
            if end > self.capacities[s]:
                raise UserError(f"sequence {s} would hold {end} tokens, its cache was made for {self.capacities[s]}")
            for buffer, stream in zip(self._buffers[s], streams, strict=True):
                buffer[self.lengths[s] : end] = stream[start : start + count]
            self.lengths[s] = end
            kept.append(tuple(buffer[:end] for buffer in self._buffers[s]))
            start += count
        lens = [length for length, count in zip(self.lengths, q_lens, strict=True) if count]
        if len(kept) == 1:
            return kept[0], lens
        return tuple(paddle.concat(list(parts), axis=0) for parts in zip(*kept, strict=True)), lens


class KVCache:
    """One `LayerCache` a decoder layer.

    Args:
        num_layers: decoder layers.
        capacities: most tokens each sequence may reach.
    """

    def __init__(self, num_layers: int, capacities: list[int]):
        self.layers = [LayerCache(list(capacities)) for _ in range(num_layers)]

    def lengths(self) -> list[int]:
        """Tokens kept of each sequence."""
        return list(self.layers[0].lengths)
