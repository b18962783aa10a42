"""Generation: prefill (whole or in chunks) and decoding with a KV cache, for a batch of prompts of any lengths.

A batch is a flat stream like a pack: no padding, so a prompt's answer does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import paddle

from vl2.cache import KVCache
from vl2.errors import UserError
from vl2.model import DeepseekVL2

# The next tokens of some of the prompts: logits [B, V] and which prompts they belong to.
Choose = Callable[[np.ndarray, list[int]], list[int]]


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
        model: the model (or anything with its `embed`, `decode_stream` and `language.logits`).
        prompts: one mapping a conversation: `input_ids` [T] and, with images, `tiles` [N, 3, 384, 384] and `grids`.
        eos_id: token that ends an answer; it is not part of the result.
        max_new_tokens: most new tokens of every prompt, or of each.
        temperature: 0 is greedy.
        top_p: smallest set of tokens of at least this probability is sampled from.
        chunk: tokens of each prompt that enter the cache at once; None: the whole prompt. Images are encoded once.
        use_cache: False computes every step from the start (slow; what the cache must equal).
        seed: of the sampling; prompt i draws from its own stream (seed, i).

    Returns:
        New token ids of each prompt; as many as it may have where no EOS came.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if min(limits) < 1:
        raise UserError(f"max_new_tokens is {min(limits)}; expected at least 1")
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk is {chunk}; expected at least 1 token, or nothing for the whole prompt")
    draws = [np.random.default_rng([seed, i]) for i in range(len(prompts))]

    def choose(logits_BV: np.ndarray, which: list[int]) -> list[int]:
        rows = zip(logits_BV, which, strict=True)
        return [choose_token(row, temperature, top_p, draws[i]) for row, i in rows]

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
    logits = prefill(model, embeds, cache, chunk).numpy()
    answers: list[list[int]] = [[] for _ in embeds]
    going = list(range(len(embeds)))
    while going:
        tokens = choose(logits, going)
        for i, token in zip(going, tokens, strict=True):
            if token != eos_id:
                answers[i].append(token)
        going = [i for i, token in zip(going, tokens, strict=True) if token != eos_id and len(answers[i]) < limits[i]]
        if not going:
            break
        ids = np.array([answers[i][-1] for i in going], np.int64)
        positions = np.array([lens[i] + len(answers[i]) - 1 for i in going], np.int64)
        q_lens = [int(i in going) for i in range(len(embeds))]
        hidden = model.decode_stream(model.embed({"input_ids": ids}), positions, q_lens, cache)
        logits = model.language.logits(hidden).numpy()
    return answers


def _decode_from_start(
    model: DeepseekVL2, x_TD: paddle.Tensor, prompt: int, choose: Choose, eos_id: int, max_new_tokens: int
) -> list[int]:
    answer: list[int] = []
    while len(answer) < max_new_tokens:
        n = x_TD.shape[0]
        hidden = model.decode_stream(x_TD, np.arange(n), [n])
        (token,) = choose(model.language.logits(hidden[n - 1 : n]).numpy(), [prompt])
        if token == eos_id:
            break
        answer.append(token)
        x_TD = paddle.concat([x_TD, model.embed({"input_ids": np.array([token], np.int64)})], axis=0)
    return answer


def choose_token(logits_V: np.ndarray, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """One token: the most probable at temperature 0, else a draw from the nucleus.

    probabilities .5 .3 .2, top_p 0.6 -> drawn from the first two, .625 and .375
    """
    if temperature == 0:
        return int(logits_V.argmax())
    scaled = logits_V.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    nucleus = order[before < top_p]
    weights = probabilities[nucleus] / probabilities[nucleus].sum()
    return int(rng.choice(nucleus, p=weights))
