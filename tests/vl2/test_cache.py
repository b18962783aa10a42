"""The cache: what it keeps, that it grows, and that decoding reads it without copying it."""

import numpy as np
import paddle
import pytest
from paddle.base import core

from tests.places import GOLDENS
from vl2.attention import MultiHeadAttention, attend_last, attention
from vl2.cache import ROOM, LayerCache, flat_streams
from vl2.config import VL2Config
from vl2.errors import UserError
from vl2.mla import LatentAttention


def test_sequences_grow_apart():
    """Two streams of two sequences: one grows past its room, the other rests."""
    cache = LayerCache([3 * ROOM, 5])
    first, second = paddle.randn([ROOM + 4, 2, 3]), paddle.randn([ROOM + 4, 1, 6])
    kept = cache.append((first[:4], second[:4]), [2, 2])
    assert [one.length for one in kept] == [2, 2]
    assert [buffer.shape for buffer in kept[1].buffers] == [[2, 5, 3], [1, 5, 6]]  # never more than its capacity
    for i in range(4, ROOM + 4):
        (grown,) = cache.append((first[i : i + 1], second[i : i + 1]), [1, 0])
    assert cache.lengths == [ROOM + 2, 2]
    assert grown.buffers[0].shape == [2, 2 * ROOM, 3]
    assert float(grown.buffers[0][:, ROOM + 2 :].abs().max()) == 0
    flat, lens = flat_streams([grown, kept[1]])
    assert lens == [ROOM + 2, 2]
    order = [0, 1, *range(4, ROOM + 4), 2, 3]
    assert np.array_equal(flat[0].numpy(), first.numpy()[order])
    assert np.array_equal(flat[1].numpy(), second.numpy()[order])


def test_more_than_the_capacity_is_refused():
    cache = LayerCache([5])
    with pytest.raises(UserError, match="sequence 0 would hold 6 tokens, its cache was made for 5"):
        cache.append((paddle.ones([6, 1, 2]),), [6])


@pytest.mark.parametrize("lens", [[1], [7, ROOM, ROOM + 1]])
def test_the_last_token_sees_all_that_is_kept(lens):
    cache = LayerCache([3 * ROOM] * len(lens))
    streams = [paddle.randn([sum(lens), 2, width]) for width in (8, 4)]
    kept = cache.append(tuple(streams), lens)
    q_BHK = paddle.randn([len(lens), 2, 8])
    expected = attention(q_BHK, *streams, [1] * len(lens), lens, scale=0.3)
    np.testing.assert_allclose(attend_last(q_BHK, kept, 0.3).numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["nano_tiny", "nano_small"])
def test_decoding_copies_no_keys_and_values(family):
    """Every layer copied the keys and values of all tokens, twice, for each new one: MHA's and MLA's."""
    config = VL2Config.from_folder(GOLDENS / family).language
    layer = (LatentAttention if config.use_mla else MultiHeadAttention)(config)
    tokens, cache = 20_000, LayerCache([21_000])
    shapes = [[tokens, 1, config.kv_lora_rank + config.qk_rope_head_dim]] if config.use_mla else []
    shapes = shapes or [[tokens, config.num_attention_heads, config.head_dim]] * 2

    def decode(position: int) -> None:
        rope = layer.rope(paddle.full([1], position, "int64"), config)
        layer(paddle.ones([1, config.hidden_size]), rope, [1], cache)

    with paddle.no_grad():
        (kept,) = cache.append(tuple(paddle.randn(shape) for shape in shapes), [tokens])
        decode(tokens)
        before = core.host_memory_stat_current_value("Allocated", 0)
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        decode(tokens + 1)
        made = core.host_memory_stat_peak_value("Allocated", 0) - before
    scores = 4 * config.num_attention_heads * tokens
    assert made < 4 * scores
    assert sum(int(buffer.size) * 4 for buffer in kept.buffers) > 2 * made
