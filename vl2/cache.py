"""Keys and values of sequences that come, grow at their own lengths, and go.

A prompt's rows are kept by themselves while it is read. Then the sequence moves to a shelf, where those of about one
length lie side by side: their next tokens are one product for all of them, whose number of launches does not grow.

Shape suffixes: T tokens of the stream, B sequences of a shelf, G heads that are kept (1 for MLA's compressed rows), M
room of a shelf in tokens, W channels, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import paddle
import paddle.nn.functional as F

from vl2.constant_tensors import positions

ROOM = 256  # tokens of the smallest shelf; each further one has twice the room
SLOTS = 4  # sequences that a full shelf gets room for at a time: it is copied once in so many

Streams = tuple[paddle.Tensor, ...]  # what is kept of a token, for MHA keys and values


class Rows:
    """What is kept of a prompt while it is read: by layer its streams, [T, G, W]."""

    def __init__(self, num_layers: int):
        self.layers: list[Streams] = [()] * num_layers
        self.length = 0

    def append(self, layer: int, streams: Streams) -> Streams:
        """Add rows of one layer; all that there are then."""
        before = self.layers[layer]
        if before:
            streams = tuple(paddle.concat([old, new]) for old, new in zip(before, streams, strict=True))
        self.layers[layer] = streams
        return streams


class Shelf:
    """Sequences that are decoded together: of each a slot of one room, the last slots free.

    A buffer lies as decoding reads it: every slot's heads one after another, of each head its rows. What lies beyond a
    sequence's length is hidden by a mask.

    Args:
        room: tokens of a slot.
        num_layers: decoder layers.

    Attributes:
        numbers: the sequences, in the order of their slots.
        lengths: tokens that are kept of each.
    """

    def __init__(self, room: int, num_layers: int):
        self.room, self.slots = room, 0
        self.numbers: list[int] = []
        self.lengths: list[int] = []
        self.layers: list[list[paddle.Tensor]] = [[] for _ in range(num_layers)]  # flat buffers, [slots * G * M, W]
        self._length_B: paddle.Tensor | None = None  # on the device
        self._bases: dict[int, paddle.Tensor] = {}  # by G, rows where each slot's heads begin
        self._places: dict[int, paddle.Tensor] = {}  # by G, rows of the next tokens
        self._masks: dict[int, paddle.Tensor] = {}  # by H, of the next tokens

    @property
    def length_B(self) -> paddle.Tensor:
        """The place of each sequence's next token, int64. Nothing is sent to the device while none comes or goes."""
        if self._length_B is None:
            self._length_B = paddle.to_tensor(self.lengths, dtype="int64")
        return self._length_B

    def add(self, number: int, layers: Sequence[Streams]) -> None:
        """Take in a sequence.

        Args:
            number: its name.
            layers: what is kept of it, by layer the streams [T, G, W].
        """
        if len(self.numbers) == self.slots:
            self._resize(self.slots + SLOTS, layers)
        slot = len(self.numbers)
        for buffers, streams in zip(self.layers, layers, strict=True):
            for flat, rows_TGW in zip(buffers, streams, strict=True):
                more = self.room - rows_TGW.shape[0]
                rows_GMW = F.pad(rows_TGW, [0, more, 0, 0, 0, 0], pad_from_left_axis=True).transpose([1, 0, 2])
                self._view(flat, rows_TGW.shape[1])[slot] = rows_GMW
        self.numbers.append(number)
        self.lengths.append(layers[0][0].shape[0])
        self._changed()

    def remove(self, number: int) -> None:
        """Let a sequence go; the last one takes its slot."""
        slot, last = self.numbers.index(number), len(self.numbers) - 1
        for flat in (flat for buffers in self.layers for flat in buffers) if slot != last else ():
            size = flat.shape[0] // self.slots
            flat[slot * size : (slot + 1) * size] = flat[last * size : (last + 1) * size]
        self.numbers[slot], self.lengths[slot] = self.numbers[last], self.lengths[last]
        self.numbers.pop(), self.lengths.pop()
        if self.slots - len(self.numbers) >= SLOTS:
            self._resize(-(-len(self.numbers) // SLOTS) * SLOTS, ())
        self._changed()

    def rows(self, number: int) -> list[Streams]:
        """Copies of what is kept of a sequence, by layer the streams [T, G, W]."""
        slot = self.numbers.index(number)
        length, found = self.lengths[slot], []
        for buffers in self.layers:
            heads = [flat.shape[0] // (self.slots * self.room) for flat in buffers]
            views = (self._view(flat, g)[slot, :, :length] for flat, g in zip(buffers, heads, strict=True))
            found.append(tuple(view.transpose([1, 0, 2]).contiguous() for view in views))
        return found

    def append(self, layer: int, streams: Streams) -> Streams:
        """Add one row to every sequence.

        Args:
            layer: of the decoder.
            streams: flat, [B, G, W].

        Returns:
            The buffers, [B, G, M, W]: views.
        """
        num, kept = len(self.numbers), []
        for flat, row_BGW in zip(self.layers[layer], streams, strict=True):
            _, heads, width = row_BGW.shape
            paddle.scatter_(flat, self._place(heads), row_BGW.reshape([num * heads, width]))
            view_SGMW = self._view(flat, heads)
            kept.append(view_SGMW[:num] if num < self.slots else view_SGMW)
        return tuple(kept)

    def mask(self, heads: int) -> paddle.Tensor:
        """What hides the room beyond the next tokens, float32 [B, H, 1, M]; not to be written to.

        It is as large as the scores: Paddle's CPU sum of equal shapes is ten times as fast as one that broadcasts.
        """
        if heads not in self._masks:
            beyond_BM = positions(self.room, self.length_B.place).unsqueeze(0) > self.length_B.unsqueeze(1)
            mask_B11M = (beyond_BM.astype("float32") * -1e30).unsqueeze([1, 2])
            self._masks[heads] = mask_B11M.expand([len(self.numbers), heads, 1, self.room]).contiguous()
        return self._masks[heads]

    def advance(self) -> None:
        """The next row is of the next token."""
        self.lengths = [length + 1 for length in self.lengths]
        self._length_B = self.length_B + 1
        self._places, self._masks = {}, {}

    def _place(self, heads: int) -> paddle.Tensor:
        if heads not in self._places:
            if heads not in self._bases:
                bases_R = positions(len(self.numbers) * heads, self.length_B.place) * self.room
                self._bases[heads] = bases_R.reshape([-1, heads])
            self._places[heads] = (self._bases[heads] + self.length_B.unsqueeze(1)).flatten()
        return self._places[heads]

    def _view(self, flat: paddle.Tensor, heads: int) -> paddle.Tensor:
        return flat.reshape([self.slots, heads, self.room, flat.shape[1]])

    def _resize(self, slots: int, like: Sequence[Streams]) -> None:
        for i, buffers in enumerate(self.layers):
            if not buffers:
                self.layers[i] = [paddle.zeros([slots * x.shape[1] * self.room, x.shape[2]], x.dtype) for x in like[i]]
            for j, flat in enumerate(buffers):
                size = flat.shape[0] // self.slots * slots
                if size < flat.shape[0]:
                    buffers[j] = paddle.assign(flat[:size])
                else:
                    new = paddle.zeros([size - flat.shape[0], flat.shape[1]], flat.dtype)
                    buffers[j] = paddle.concat([flat, new])
        self.slots = slots

    def _changed(self) -> None:
        self._length_B = None
        self._bases, self._places, self._masks = {}, {}, {}


class LayerStep(NamedTuple):
    """A step of the cache as one layer sees it: first one token of every shelved sequence, then pieces of prompts."""

    step: Step
    layer: int

    def last(self, streams: Streams) -> Iterator[tuple[slice, Streams, Shelf]]:
        """Add the tokens of the shelved sequences.

        Args:
            streams: flat, [T, G, W], of the whole stream.

        Returns:
            Of each shelf its rows in the stream, its buffers [B, G, M, W], and itself.
        """
        start = 0
        for shelf in self.step.shelves:
            rows = slice(start, start + len(shelf.numbers))
            yield rows, shelf.append(self.layer, tuple(stream[rows] for stream in streams)), shelf
            start = rows.stop

    def pieces(self, streams: Streams) -> tuple[slice, Streams, list[int], list[int]] | None:
        """Add the pieces of prompts; None: there are none.

        Args:
            streams: as in `last`.

        Returns:
            Their rows in the stream; all that is kept of these prompts as flat streams; how many tokens each has in the
            piece, and in all.
        """
        step = self.step
        if not step.pieces:
            return None
        start, kept = step.num_last, []
        for rows, count in step.pieces:
            part = tuple(stream[start : start + count] for stream in streams)
            kept.append(rows.append(self.layer, part))
            start += count
        flat = kept[0] if len(kept) == 1 else tuple(paddle.concat(list(parts)) for parts in zip(*kept, strict=True))
        return (
            slice(step.num_last, start),
            flat,
            [count for _, count in step.pieces],
            [rows.length + count for rows, count in step.pieces],
        )


class Step:
    """One pass through the model: what it adds to the cache.

    Args:
        shelves: whose sequences get a token each.
        pieces: prompts, and how many of their tokens are read.
    """

    def __init__(self, shelves: Sequence[Shelf], pieces: Sequence[tuple[Rows, int]]):
        self.shelves, self.pieces = list(shelves), list(pieces)
        self.num_last = sum(len(shelf.numbers) for shelf in shelves)
        self.q_lens = [1] * self.num_last + [count for _, count in self.pieces]

    def position_ids(self, place: paddle.base.core.Place) -> paddle.Tensor:
        """Of every token of the stream, int64 [T].

        Args:
            place: where; the one that new tensors are made at.
        """
        parts = [shelf.length_B for shelf in self.shelves]
        for rows, count in self.pieces:
            parts.append(positions(rows.length + count, place)[rows.length :])
        return parts[0] if len(parts) == 1 else paddle.concat(parts)

    def layer(self, index: int) -> LayerStep:
        """The step as a layer sees it."""
        return LayerStep(self, index)

    def end(self) -> None:
        """All layers have added their rows."""
        for shelf in self.shelves:
            shelf.advance()
        for rows, count in self.pieces:
            rows.length += count


class KVCache:
    """What every layer keeps of every sequence.

    Args:
        num_layers: decoder layers.
    """

    def __init__(self, num_layers: int):
        self._num_layers, self._next = num_layers, 0
        self._reading: dict[int, Rows] = {}
        self._shelves: dict[int, Shelf] = {}  # by room

    def add(self) -> int:
        """Take in a sequence, whose prompt is to be read; its number."""
        self._next += 1
        self._reading[self._next] = Rows(self._num_layers)
        return self._next

    def shelve(self, number: int) -> None:
        """The prompt of a sequence has been read: from now on every step adds a token."""
        self._put(number, self._reading.pop(number).layers)

    def remove(self, number: int) -> None:
        """Let a sequence go."""
        if number in self._reading:
            del self._reading[number]
            return
        shelf = next(shelf for shelf in self._shelves.values() if number in shelf.numbers)
        shelf.remove(number)
        if not shelf.numbers:
            del self._shelves[shelf.room]

    def order(self) -> list[int]:
        """The shelved sequences in the order in which a step has their tokens."""
        return [number for shelf in self._ordered() for number in shelf.numbers]

    def lengths(self) -> dict[int, int]:
        """Tokens that are kept of each sequence."""
        found = {number: rows.length for number, rows in self._reading.items()}
        for shelf in self._shelves.values():
            found.update(zip(shelf.numbers, shelf.lengths, strict=True))
        return found

    def step(self, pieces: Sequence[tuple[int, int]] = ()) -> Step:
        """A pass through the model that adds a token to every shelved sequence, and reads pieces of prompts.

        Args:
            pieces: numbers of sequences, and how many tokens of their prompts.
        """
        return Step(self._ordered(), [(self._reading[number], count) for number, count in pieces])

    def make_room(self) -> None:
        """Move the sequences that fill their room to a shelf of twice the room; the order may change."""
        for shelf in self._ordered():
            for number in [n for n, length in zip(shelf.numbers, shelf.lengths, strict=True) if length == shelf.room]:
                layers = shelf.rows(number)
                self.remove(number)
                self._put(number, layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        held = [tensor for rows in self._reading.values() for streams in rows.layers for tensor in streams]
        held += [flat for shelf in self._shelves.values() for buffers in shelf.layers for flat in buffers]
        return sum(int(tensor.size) * tensor.element_size() for tensor in held)

    def _ordered(self) -> list[Shelf]:
        return [self._shelves[room] for room in sorted(self._shelves)]

    def _put(self, number: int, layers: Sequence[Streams]) -> None:
        room = ROOM
        while room <= layers[0][0].shape[0]:
            room *= 2
        if room not in self._shelves:
            self._shelves[room] = Shelf(room, self._num_layers)
        self._shelves[room].add(number, layers)
