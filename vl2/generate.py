"""Generation: prefill (whole or in chunks) and decoding with a KV cache, for a batch of prompts of any lengths.

A batch is a flat stream like a pack: no padding, so a prompt's answer does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import paddle
import paddle.nn.functional as F

from vl2.cache import KVCache
from vl2.errors import UserError
from vl2.model import DeepseekVL2

# The next token of some of the prompts, int64 [B]: from logits [B, V], which prompts these are, and how many tokens
# each of them has been given before.
Choose = Callable[[paddle.Tensor, list[int], int], paddle.Tensor]


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
        chunk: tokens of each prompt that enter the cache at once; None: the whole prompt. Images are encoded once.
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
    draws_BN = None
    if temperature:
        streams = [np.random.default_rng([seed, i]).random(max(limits)) for i in range(len(prompts))]
        draws_BN = paddle.to_tensor(np.stack(streams))

    def choose(logits_BV: paddle.Tensor, which: list[int], step: int) -> paddle.Tensor:
        if draws_BN is None:
            return logits_BV.argmax(axis=-1)
        return sample(logits_BV, temperature, top_p, paddle.stack([draws_BN[i, step] for i in which]))

    with paddle.no_grad():
        embeds = [model.embed(prompt) for prompt in prompts]
        lens = [x.shape[0] for x in embeds]
        if use_cache:
            return _decode_cached(model, embeds, lens, choose, eos_id, limits, chunk)
        return [_decode_from_start(model, x, i, choose, eos_id, limits[i]) for i, x in enumerate(embeds)]


def prefill(model: DeepseekVL2, embeds: Sequence, cache: KVCache, chunk: int | None = None) -> paddle.Tensor:
    """Put whole prompts into the cache.

    Args:
        model: the model.
        embeds: input embeddings of each prompt, [T, D].
        cache: empty cache with room for the prompts.
        chunk: tokens of each prompt at once; None: all.

    Returns:
        float32 logits at the last position of each prompt, [B, V].
    """
    lens = [x.shape[0] for x in embeds]
    step = chunk or max(lens)
    last: list = [None] * len(embeds)
    for start in range(0, max(lens), step):
        pieces = [x[start : start + step] for x in embeds]
        q_lens = [min(max(n - start, 0), step) for n in lens]
        stream = paddle.concat([p for p, n in zip(pieces, q_lens, strict=True) if n], axis=0)
        positions = np.concatenate([np.arange(start, start + n) for n in q_lens])
        hidden = model.decode_stream(stream, positions, q_lens, cache)
        end = 0
        for i, n in enumerate(q_lens):
            end += n
            if n and start + n == lens[i]:
                last[i] = hidden[end - 1 : end]
    return model.language.logits(paddle.concat(last, axis=0))


def _decode_cached(
    model: DeepseekVL2,
    embeds: Sequence[paddle.Tensor],
    lens: list[int],
    choose: Choose,
    eos_id: int,
    limits: Sequence[int],
    chunk: int | None,
) -> list[list[int]]:
    cache = KVCache(len(model.language.model.layers), [n + limit for n, limit in zip(lens, limits, strict=True)])
    logits_BV = prefill(model, embeds, cache, chunk)
    answers: list[list[int]] = [[] for _ in embeds]
    going = list(range(len(embeds)))
    positions_B = paddle.to_tensor(lens)
    for step in range(max(limits)):
        ids_B = choose(logits_BV, going, step)
        ids = ids_B.tolist()  # all that comes to the host
        for i, token in zip(going, ids, strict=True):
            if token != eos_id:
                answers[i].append(token)
        rows = [
            b for b, (i, token) in enumerate(zip(going, ids, strict=True)) if token != eos_id and step + 1 < limits[i]
        ]
        if not rows:
            break
        if len(rows) < len(going):
            going = [going[b] for b in rows]
            rows_B = paddle.to_tensor(rows)
            ids_B, positions_B = paddle.gather(ids_B, rows_B), paddle.gather(positions_B, rows_B)
        q_lens = [int(i in going) for i in range(len(embeds))]
        hidden_BD = model.decode_stream(model.embed_text(ids_B), positions_B, q_lens, cache)
        logits_BV = model.language.logits(hidden_BD)
        positions_B = positions_B + 1
    return answers


def _decode_from_start(
    model: DeepseekVL2, x_TD: paddle.Tensor, prompt: int, choose: Choose, eos_id: int, max_new_tokens: int
) -> list[int]:
    answer: list[int] = []
    while len(answer) < max_new_tokens:
        n = x_TD.shape[0]
        hidden = model.decode_stream(x_TD, np.arange(n), [n])
        ids_1 = choose(model.language.logits(hidden[n - 1 : n]), [prompt], len(answer))
        (token,) = ids_1.tolist()
        if token == eos_id:
            break
        answer.append(token)
        x_TD = paddle.concat([x_TD, model.embed_text(ids_1)], axis=0)
    return answer


def sample(logits_BV: paddle.Tensor, temperature: float, top_p: float, draw_B: paddle.Tensor) -> paddle.Tensor:
    """Draw one token a row from its nucleus, the smallest set of tokens of at least `top_p` together.

    probabilities .2 .5 .3, top_p 0.6 -> the tokens 1 and 2, with .625 and .375: 1 for a draw below .625

    Args:
        logits_BV: float32.
        temperature: above 0.
        top_p: in (0, 1].
        draw_B: float64 in [0, 1).

    Returns:
        int64 [B].
    """
    probabilities_BV = F.softmax(logits_BV.astype("float64") / paddle.full([1], temperature, "float64"), axis=-1)
    order_BV = paddle.argsort(probabilities_BV, axis=-1, descending=True, stable=True)
    sorted_BV = paddle.take_along_axis(probabilities_BV, order_BV, axis=-1, broadcast=False)
    before_BV = paddle.cumsum(sorted_BV, axis=-1) - sorted_BV
    up_to_BV = paddle.cumsum(sorted_BV * (before_BV < top_p).astype("float64"), axis=-1)
    place_B1 = (up_to_BV / up_to_BV[:, -1:] <= draw_B.unsqueeze(1)).sum(axis=-1, keepdim=True)
    return paddle.take_along_axis(order_BV, place_B1, axis=-1, broadcast=False).squeeze(1)
