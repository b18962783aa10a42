"""Answers that grow together: sequences enter and leave between any two tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import paddle

from vl2.cache import KVCache
from vl2.generate import prefill, sample
from vl2.model import DeepseekVL2


class Growing:
    """One answer on its way.

    Attributes:
        num_prompt: tokens of its prompt.
        ids: new tokens so far, the end token not among them.
        ended: the end token came.
    """

    def __init__(self, prompt: Mapping, *, limit: int, temperature: float, top_p: float, seed: int):
        self.prompt, self.limit, self.temperature, self.top_p = prompt, limit, temperature, top_p
        self.num_prompt = len(prompt["input_ids"])
        self.ids: list[int] = []
        self.ended = False
        self.draws = np.random.default_rng([seed, 0])
        self.cache: KVCache | None = None

    @property
    def done(self) -> bool:
        """Whether no further token comes."""
        return self.ended or len(self.ids) >= self.limit


class Batch:
    """Sequences that grow together.

    Args:
        model: the model.
        eos_id: token that ends an answer.
        chunk: tokens of prompts that are read between two tokens.
    """

    def __init__(self, model: DeepseekVL2, *, eos_id: int, chunk: int | None = None):
        self.model, self.eos_id, self.chunk = model, eos_id, chunk
        self.growing: list[Growing] = []

    def add(self, one: Growing) -> None:
        """Take in an answer."""
        self.growing.append(one)

    def remove(self, one: Growing) -> None:
        """Let an answer go, and what is kept of it."""
        self.growing.remove(one)
        one.cache = None

    def step(self) -> list[Growing]:
        """One token more of every answer; those that got one, or their end."""
        with paddle.no_grad():
            for one in self.growing:
                self._step(one)
        return list(self.growing)

    def _step(self, one: Growing) -> None:
        model = self.model
        if one.cache is None:
            one.cache = KVCache(len(model.language.model.layers), [one.num_prompt + one.limit])
            logits = prefill(model, [model.embed(one.prompt)], one.cache, self.chunk)
        else:
            x = model.embed_text(paddle.to_tensor(one.ids[-1:]))
            hidden = model.decode_stream(x, np.array([one.num_prompt + len(one.ids) - 1]), [1], one.cache)
            logits = model.language.logits(hidden)
        if one.temperature:
            ids = sample(logits, one.temperature, one.top_p, paddle.to_tensor([one.draws.random()]))
        else:
            ids = logits.argmax(axis=-1)
        (token,) = ids.tolist()
        if token == self.eos_id:
            one.ended = True
        else:
            one.ids.append(token)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values that are kept."""
        caches = [one.cache for one in self.growing if one.cache]
        return sum(4 * int(b.size) for c in caches for layer in c.layers for s in layer._buffers for b in s)
