"""Generation: answers to prompts of any lengths, together, with a KV cache.

A batch is a flat stream like a pack: no padding, so a prompt's answer does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import paddle

from vl2.batch import Batch, Growing
from vl2.errors import UserError
from vl2.model import DeepseekVL2


def generate(
    model: DeepseekVL2,
    prompts: Sequence[Mapping],
    *,
    eos_id: int,
    max_new_tokens: int | Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    chunk: int | None = None,
    use_cache: bool = True,
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt until EOS or `max_new_tokens`.

    Args:
        model: the model (or anything with its `embed`, `embed_text`, `decode_stream` and `language.logits`).
        prompts: one mapping a conversation: `input_ids` [T] and, with images, `tiles` [N, 3, 384, 384] and `grids`.
        eos_id: token that ends an answer; it is not part of the result.
        max_new_tokens: most new tokens of every prompt, or of each.
        temperature: 0 is greedy.
        top_p: smallest set of tokens of at least this probability is sampled from.
        chunk: tokens of the prompts that enter the cache at once; None: all. Images are encoded once.
        use_cache: False computes every step from the start (slow; what the cache must equal).
        seed: of the sampling; prompt i draws from its own stream (seed, i), one number a token.

    Returns:
        New token ids of each prompt; as many as it may have where no EOS came.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if min(limits) < 1:
        raise UserError(f"max_new_tokens is {min(limits)}; expected at least 1")
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk is {chunk}; expected at least 1 token, or nothing for the whole prompt")
    answers = [
        Growing(prompt, limit=limit, temperature=temperature, top_p=top_p, seed=(seed, i))
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    batch = Batch(model, eos_id=eos_id, chunk=chunk)
    if not use_cache:
        with paddle.no_grad():
            return [_decode_from_start(batch, answer) for answer in answers]
    for answer in answers:
        batch.add(answer)
    while batch.size:
        batch.step()
    return [answer.ids for answer in answers]


def _decode_from_start(batch: Batch, answer: Growing) -> list[int]:
    model = batch.model
    x_TD = model.embed(answer.prompt)
    while not answer.done:
        n = x_TD.shape[0]
        hidden = model.decode_stream(x_TD, np.arange(n), [n])
        (token,) = batch.choose(model.language.logits(hidden[n - 1 : n]), [answer])[0]
        batch.take(answer, token)
        x_TD = paddle.concat([x_TD, model.embed_text(paddle.to_tensor([token]))], axis=0)
    return answer.ids
