"""Answers that grow together, a token a step; they come and go between any two.

Shape suffixes: B rows of logits, V vocabulary, T tokens of the stream, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from vl2.cache import KVCache
from vl2.model import DeepseekVL2
from vl2.sampling import sample


class Growing:
    """An answer on its way.

    Args:
        prompt: as `DeepseekVL2` takes a batch of one conversation.
        limit: most new tokens.
        temperature: 0 is greedy.
        top_p: smallest set of tokens of at least this probability is sampled from.
        seed: of its own stream of random numbers, one a token: what it draws depends on no other answer.

    Attributes:
        ids: new tokens so far, the end token not among them.
        ended: the end token came.
    """

    def __init__(self, prompt: Mapping, *, limit: int, temperature: float, top_p: float, seed: Sequence[int]):
        self.prompt, self.limit, self.temperature, self.top_p = prompt, limit, temperature, top_p
        self.ids: list[int] = []
        self.ended = False
        self._random = np.random.default_rng(list(seed))

    @property
    def done(self) -> bool:
        """Whether no further token comes."""
        return self.ended or len(self.ids) >= self.limit

    def draw(self) -> float:
        """The random number of its next token, in [0, 1)."""
        return self._random.random()


class _Reading:
    """A prompt that enters the cache."""

    def __init__(self, answer: Growing, number: int):
        self.answer, self.number, self.read = answer, number, 0
        self.x_TD: Any = None  # its embeddings, once they are made
        self.making: Iterator[paddle.Tensor | None] | None = None  # makes them, a slice of tiles at a time


class Batch:
    """Answers that grow together.

    Args:
        model: the model.
        eos_id: token that ends an answer.
        chunk: tokens of prompts that are read in one step; None: all. It bounds how long the answers that are on their
            way wait for their next token.
    """

    def __init__(self, model: DeepseekVL2, *, eos_id: int, chunk: int | None = None):
        self.model, self.eos_id, self.chunk = model, eos_id, chunk
        self._cache = KVCache(len(model.language.model.layers))
        self._reading: list[_Reading] = []  # in the order of their coming
        self._growing: dict[int, Growing] = {}  # by their number in the cache
        self._ids: tuple[list[int], paddle.Tensor] | None = None  # numbers, and the last token of each, on the device

    @property
    def size(self) -> int:
        """Answers that are on their way."""
        return len(self._reading) + len(self._growing)

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        return self._cache.num_bytes

    def add(self, answer: Growing) -> None:
        """Take in an answer; its prompt is read from the next step on."""
        self._reading.append(_Reading(answer, self._cache.add()))

    def remove(self, answer: Growing) -> None:
        """Let an answer go; one that is done has left already."""
        for reading in self._reading:
            if reading.answer is answer:
                self._reading.remove(reading)
                self._cache.remove(reading.number)
                return
        for number, other in self._growing.items():
            if other is answer:
                del self._growing[number]
                self._cache.remove(number)
                return

    def step(self) -> list[Growing]:
        """Give every answer whose prompt has been read its next token, and read on in the other prompts.

        Returns:
            The answers that got a token, or came to their end. Those that are done have left the batch.
        """
        with paddle.no_grad():
            pieces = self._next_pieces()
            self._cache.make_room()
            order = self._cache.order()
            if not (order or pieces):  # tiles were encoded, and nobody waits for a token
                return []
            rows = ([self._last_ids(order)] if order else []) + [
                reading.x_TD[reading.read : reading.read + count] for reading, count in pieces
            ]
            x_TD = rows[0] if len(rows) == 1 else paddle.concat(rows)
            step = self._cache.step([(reading.number, count) for reading, count in pieces])
            hidden_TD = self.model.decode_stream(x_TD, step.position_ids(x_TD.place), step.q_lens, step)
            finished = self._read(pieces)
            last = self._last_rows(len(order), pieces)
            if not last:
                return []
            numbers = order + [reading.number for reading in finished]
            hidden_BD = hidden_TD if last == list(range(hidden_TD.shape[0])) else _rows(hidden_TD, last)
            answers = [self._growing[number] for number in numbers]
            tokens, ids_B = self.choose(self.model.language.logits(hidden_BD), answers)
            for answer, token in zip(answers, tokens, strict=True):
                self.take(answer, token)
            self._ids = (numbers, ids_B)
            for number, answer in zip(numbers, answers, strict=True):
                if answer.done:
                    del self._growing[number]
                    self._cache.remove(number)
            return answers

    def take(self, answer: Growing, token: int) -> None:
        """Note the next token of an answer."""
        if token == self.eos_id:
            answer.ended = True
        else:
            answer.ids.append(token)

    def choose(self, logits_BV: paddle.Tensor, answers: Sequence[Growing]) -> tuple[list[int], paddle.Tensor]:
        """The next token of each answer, here and on the device; all that comes to the host are ids."""
        drawn = [i for i, answer in enumerate(answers) if answer.temperature]
        if not drawn:
            ids_B = logits_BV.argmax(axis=-1)
            return ids_B.tolist(), ids_B
        which = [answers[i] for i in drawn]
        numbers = np.array([(answer.temperature, answer.top_p, answer.draw()) for answer in which])
        temperature_B1, top_p_B1, draw_B1 = paddle.to_tensor(numbers).split(3, axis=1)
        rows_BV = logits_BV if len(drawn) == len(answers) else _rows(logits_BV, drawn)
        ids_B = sample(rows_BV, temperature_B1, top_p_B1, draw_B1.squeeze(1))
        if len(drawn) == len(answers):
            return ids_B.tolist(), ids_B
        tokens = logits_BV.argmax(axis=-1).tolist()
        for i, token in zip(drawn, ids_B.tolist(), strict=True):
            tokens[i] = token
        return tokens, paddle.to_tensor(tokens)

    def _next_pieces(self) -> list[tuple[_Reading, int]]:
        """What is read of the waiting prompts in this step, in the order of their coming."""
        left, pieces = self.chunk, []
        for reading in self._reading:
            if left == 0:
                break
            if not self._embedded(reading):
                break
            count = reading.x_TD.shape[0] - reading.read
            if left is not None:
                count = min(count, left)
                left -= count
            pieces.append((reading, count))
        return pieces

    def _embedded(self, reading: _Reading) -> bool:
        """Whether a prompt is embedded; else a slice of its tiles is now, which is work enough for one step."""
        if reading.making is None and reading.x_TD is None:
            reading.making = self.model.embed_by_slices(reading.answer.prompt)
        while reading.x_TD is None:
            assert reading.making is not None
            reading.x_TD = next(reading.making)
            if reading.x_TD is None and self.chunk is not None:
                return False
        reading.making, reading.answer.prompt = None, {}  # its tiles are not needed any more
        return True

    def _read(self, pieces: Sequence[tuple[_Reading, int]]) -> list[_Reading]:
        """Note what has been read; the prompts that have been read to their end."""
        finished = []
        for reading, count in pieces:
            reading.read += count
            if reading.read == reading.x_TD.shape[0]:
                finished.append(reading)
                self._reading.remove(reading)
                self._growing[reading.number] = reading.answer
                self._cache.shelve(reading.number)
        return finished

    def _last_rows(self, num_last: int, pieces: Sequence[tuple[_Reading, int]]) -> list[int]:
        """The rows of the stream whose next token is wanted."""
        rows, end = list(range(num_last)), num_last
        for reading, count in pieces:
            end += count
            if reading.read == reading.x_TD.shape[0]:
                rows.append(end - 1)
        return rows

    def _last_ids(self, order: list[int]) -> paddle.Tensor:
        """Embeddings of the last token of each answer, [B, D]; ids that are on the device already are not sent."""
        if self._ids is None or self._ids[0] != order:
            self._ids = (order, paddle.to_tensor([self._growing[number].ids[-1] for number in order]))
        return self.model.embed_text(self._ids[1])


def _rows(x: paddle.Tensor, which: Sequence[int]) -> paddle.Tensor:
    return paddle.gather(x, paddle.to_tensor(list(which)))
