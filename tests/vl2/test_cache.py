"""The cache: what it keeps while sequences come, grow and go, and that decoding reads it without copying it."""

import numpy as np
import paddle
import pytest
from paddle.base import core

from tests.places import GOLDENS
from vl2.attention import MultiHeadAttention, attend_last, attention
from vl2.cache import ROOM, SLOTS, KVCache, LayerStep
from vl2.config import VL2Config
from vl2.mla import LatentAttention


class Mirror:
    """A cache of one layer and two streams beside plain lists of the same rows."""

    def __init__(self):
        self.cache, self.rows = KVCache(1), {}

    def step(self, pieces=()):
        """A token to every shelved sequence and `pieces`; what `LayerStep.last` gives of the first."""
        self.cache.make_room()
        order = self.cache.order()
        step = self.cache.step(pieces)
        streams = paddle.randn([sum(step.q_lens), 2, 3]), paddle.randn([sum(step.q_lens), 2, 5])
        start = 0
        for number, count in [(number, 1) for number in order] + list(pieces):
            new = [stream[start : start + count].numpy() for stream in streams]
            old = self.rows.get(number, [np.zeros([0, *part.shape[1:]], "float32") for part in new])
            self.rows[number] = [np.concatenate(pair) for pair in zip(old, new)]
            start += count
        layer = step.layer(0)
        kept = [(rows, [b.numpy() for b in buffers], shelf.mask(2)) for rows, buffers, shelf in layer.last(streams)]
        if pieces:
            rows, flat, q_lens, k_lens = layer.pieces(streams)
            assert rows == slice(len(order), start) and q_lens == [count for _, count in pieces]
            assert k_lens == [len(self.rows[number][0]) for number, _ in pieces]
            for found, parts in zip(flat, zip(*(self.rows[number] for number, _ in pieces))):
                assert np.array_equal(found.numpy(), np.concatenate(parts))
        step.end()
        return order, kept

    def check(self, order, kept):
        """Every sequence's buffers hold its rows, and the mask hides what lies beyond them."""
        for rows, buffers, mask in kept:
            for slot, number in enumerate(order[rows]):
                for buffer, expected in zip(buffers, self.rows[number]):
                    length = len(expected)
                    assert np.array_equal(buffer[slot, :, :length].swapaxes(0, 1), expected)
                hidden = mask[slot, 0, 0].numpy() < -1e29
                assert hidden.sum() == len(hidden) - length and not hidden[:length].any()
        assert {number: n for number, n in self.cache.lengths().items() if n} == {
            number: len(rows[0]) for number, rows in self.rows.items()
        }


def test_sequences_come_grow_and_go():
    """Prompts in pieces, one after the other; sequences that end within the batch, and one that outgrows its room."""
    mirror = Mirror()
    draw, reading = np.random.default_rng(0), []
    for turn in range(60):
        if turn < 9:
            reading.append(mirror.cache.add())
        pieces = [(number, int(draw.integers(1, 90))) for number in reading[:2]]
        order, kept = mirror.step(pieces)
        mirror.check(order, kept)
        for number, _ in pieces:
            if len(mirror.rows[number][0]) > 40 * number:
                mirror.cache.shelve(number)
                reading.remove(number)
        if turn % 12 == 11:
            gone = order[len(order) // 2]
            mirror.cache.remove(gone)
            del mirror.rows[gone]
    shelves = mirror.cache._shelves
    assert len(shelves) >= 2 and min(map(len, mirror.rows.values())) > 0
    assert max(len(rows[0]) for rows in mirror.rows.values()) > ROOM


def test_nothing_is_kept_of_what_went():
    mirror = Mirror()
    numbers = [mirror.cache.add() for _ in range(SLOTS + 1)]
    mirror.step([(number, 7) for number in numbers])
    assert mirror.cache.num_bytes == 4 * 7 * (SLOTS + 1) * 2 * (3 + 5)
    for number in numbers:
        mirror.cache.shelve(number)
    slot = 4 * ROOM * 2 * (3 + 5)
    assert mirror.cache.num_bytes == 2 * SLOTS * slot
    mirror.cache.remove(numbers[0])
    assert mirror.cache.num_bytes == SLOTS * slot
    for number in numbers[1:]:
        mirror.cache.remove(number)
    assert mirror.cache.num_bytes == 0 and mirror.cache.order() == []


def shelved(lens, widths, heads):
    """A cache of one layer with random sequences of these lengths, which are returned too, flat."""
    cache = KVCache(1)
    streams = [paddle.randn([sum(lens), heads, width]) for width in widths]
    numbers = [cache.add() for _ in lens]
    step = cache.step(list(zip(numbers, lens)))
    step.layer(0).pieces(streams)
    step.end()
    for number in numbers:
        cache.shelve(number)
    return cache, streams


@pytest.mark.parametrize("lens", [[1], [7, 2, ROOM - 1]])
def test_the_last_token_sees_all_that_is_kept(lens):
    cache, streams = shelved(lens, (8, 4), 2)
    new = [paddle.randn([len(lens), 2, width]) for width in (8, 4)]
    q_BHK = paddle.randn([len(lens), 2, 8])
    ends = np.cumsum(lens)
    whole = []
    for stream, added in zip(streams, new):
        parts = [[stream[end - n : end], added[i : i + 1]] for i, (n, end) in enumerate(zip(lens, ends))]
        whole.append(paddle.concat([part for pair in parts for part in pair]))
    expected = attention(q_BHK, *whole, [1] * len(lens), [n + 1 for n in lens], scale=0.3)
    ((rows, kept, shelf),) = cache.step().layer(0).last(new)
    found = attend_last(q_BHK[rows], *kept, shelf.mask(2), 0.3)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["nano_tiny", "nano_small"])
def test_decoding_copies_no_keys_and_values(family):
    """Every layer copied the keys and values of all tokens, twice, for each new one: MHA's and MLA's."""
    config = VL2Config.from_folder(GOLDENS / family).language
    layer = (LatentAttention if config.use_mla else MultiHeadAttention)(config)
    tokens = 20_000
    widths = [config.kv_lora_rank + config.qk_rope_head_dim] if config.use_mla else [config.head_dim] * 2

    def decode(cache: KVCache) -> None:
        step = cache.step()
        rope = layer.rope(step.position_ids(paddle.ones([1]).place), config)
        layer(paddle.ones([1, config.hidden_size]), rope, [1], LayerStep(step, 0))
        step.end()

    with paddle.no_grad():
        cache, _ = shelved([tokens], widths, 1 if config.use_mla else config.num_attention_heads)
        decode(cache)
        before = core.host_memory_stat_current_value("Allocated", 0)
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        decode(cache)
        made = core.host_memory_stat_peak_value("Allocated", 0) - before
    room = 2**15
    scores = 4 * config.num_attention_heads * room
    assert made < 5 * scores
    assert cache.num_bytes / SLOTS > made
