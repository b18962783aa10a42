"""The plan: every sample once, budgets kept, few packs, and no dependence on ranks or on how long the run is."""

import math

import numpy as np
import pytest

from data.plan import EMPTY_PACK, Plan, make_plan, pack_epoch
from data.sizes import Size, Sizes
from vl2.tiles import num_image_tokens, tile_grid

CANDIDATES = [(384 * w, 384 * h) for w in range(1, 10) for h in range(1, 10) if w * h <= 9]


def mixed_sizes(count: int, seed: int) -> list[Size]:
    """Half text of 20 to 600 tokens, half one to three pictures and a few words, all within 4096 tokens."""
    random = np.random.default_rng(seed)
    sizes: list[Size] = []
    while len(sizes) < count:
        if len(sizes) % 2 == 0:
            tokens = int(random.integers(20, 601))
            sizes.append(Size(tokens=tokens, supervised=max(1, tokens // 3), grids=()))
            continue
        num_images = int(random.integers(1, 4))
        pixels = random.integers(100, 2000, (num_images, 2)).tolist()
        grids = tuple(tile_grid((w, h), num_images, CANDIDATES) for w, h in pixels)
        tokens = int(random.integers(20, 301)) + sum(map(num_image_tokens, grids))
        if tokens <= 4096:
            sizes.append(Size(tokens=tokens, supervised=int(random.integers(1, 20)), grids=grids))
    return sizes


SIZES = mixed_sizes(2000, seed=0)


def plan(sizes=SIZES, **changed) -> Plan:
    settings = {"max_tokens": 4096, "max_tiles_per_pack": 32, "packs_per_step": 8, "seed": 1}
    return make_plan(Sizes.of(sizes), **{**settings, "epochs": 1, **changed})


@pytest.mark.parametrize("seed", range(5))
def test_2000_mixed_samples_fill_their_packs(seed):
    sizes = mixed_sizes(2000, seed)
    packed = plan(sizes)
    at_least = math.ceil(sum(size.tokens for size in sizes) / 4096)
    assert at_least <= packed.num_packs <= 1.03 * at_least
    assert packed.fill > 0.97


@pytest.mark.parametrize("max_tiles", [20, 32])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_sample_once_within_both_budgets(epoch, max_tiles):
    packed = plan(epochs=2, max_tiles_per_pack=max_tiles)
    first = sum(packed.steps_per_epoch[:epoch]) * 8
    packs = packed.packs[first : first + packed.steps_per_epoch[epoch] * 8]
    assert sorted(sample for pack in packs for sample in pack.samples) == list(range(2000))
    for pack in packs:
        members = [SIZES[sample] for sample in pack.samples]
        assert pack.tokens == sum(size.tokens for size in members) <= 4096
        assert pack.tiles == sum(size.tiles for size in members) <= max_tiles
        assert pack.supervised == sum(size.supervised for size in members)


def test_tile_budget_alone_can_decide():
    """Eight samples of five tiles: two in a pack of twelve tiles, however few tokens they have."""
    sizes = [Size(tokens=10, supervised=1, grids=((2, 2),))] * 8
    assert plan(sizes, max_tiles_per_pack=12).num_packs == 4


def test_exact_fit_is_found():
    """Best fit puts 60 with 40 and 70 with 30, where the first pack with room would waste both."""
    packs = pack_epoch(np.array([60, 30, 40, 70]), np.zeros(4, np.int64), 100, 1, seed=0, epoch=0)
    assert sorted(map(sorted, packs)) == [[0, 2], [1, 3]]


def test_short_last_step_is_filled_with_empty_packs():
    packed = plan(SIZES[:100], packs_per_step=16, epochs=2)
    per_epoch = packed.num_packs // 2
    assert per_epoch % 16
    assert packed.steps_per_epoch == (math.ceil(per_epoch / 16),) * 2
    assert len(packed.packs) == packed.num_steps * 16
    assert packed.step(packed.steps_per_epoch[0] - 1)[-1] == packed.packs[-1] == EMPTY_PACK
    assert all(packed.supervised(step) > 0 for step in range(packed.num_steps))


def test_supervised_counts_the_step():
    packed = plan()
    assert sum(packed.supervised(step) for step in range(packed.num_steps)) == sum(size.supervised for size in SIZES)
    assert packed.supervised(3) == sum(pack.supervised for pack in packed.packs[24:32])
    assert sum(packed.samples(step) for step in range(packed.num_steps)) == len(SIZES)
    assert packed.samples(3) == sum(len(pack.samples) for pack in packed.packs[24:32])


@pytest.mark.parametrize("longer", [{"epochs": 3}, {"epochs": 5, "max_steps": 150}, {"epochs": None, "max_steps": 200}])
def test_longer_run_keeps_its_past(longer):
    short, long = plan(epochs=1), plan(**longer)
    assert long.num_steps > short.num_steps
    assert long.packs[: len(short.packs)] == short.packs
    assert long.fingerprint == short.fingerprint


def test_epochs_differ_and_seeds_differ():
    packed = plan(epochs=2)
    half = len(packed.packs) // 2
    assert packed.packs[:half] != packed.packs[half:]
    assert plan(seed=2).packs != plan().packs
    assert plan().packs == plan().packs


def test_epochs_put_other_samples_together():
    """Without jitter 63 % of the pairs of one epoch come again in the next."""
    tokens = np.array([size.tokens for size in SIZES])
    tiles = np.array([size.tiles for size in SIZES])

    def pairs(epoch: int) -> set[tuple[int, int]]:
        packs = pack_epoch(tokens, tiles, 4096, 32, seed=1, epoch=epoch)
        return {(a, b) for pack in packs for a in pack for b in pack if a < b}

    first, second = pairs(0), pairs(1)
    assert len(first & second) < 0.2 * len(first)


def test_max_steps_and_parts_of_epochs():
    whole = plan()
    assert plan(max_steps=5).num_steps == 5
    assert plan(max_steps=5).packs == whole.packs[:40]
    half = plan(epochs=0.5)
    assert half.num_steps == math.ceil(whole.num_steps / 2)
    assert half.packs == whole.packs[: len(half.packs)]
    assert plan(epochs=1.5).num_steps == whole.num_steps + half.num_steps
    assert plan(epochs=1, max_steps=10**6).num_steps == whole.num_steps


def test_epoch_of_a_step():
    packed = plan(epochs=2)
    first = packed.steps_per_epoch[0]
    assert [packed.epoch(step) for step in (0, first - 1, first, packed.num_steps - 1)] == [0, 0, 1, 1]


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_ranks_share_a_step_evenly(num_ranks):
    packed = plan()
    for step in range(packed.num_steps):
        dealt = packed.rank_order(step, num_ranks)
        assert [len(own) for own in dealt] == [8 // num_ranks] * num_ranks
        assert sorted(index for own in dealt for index in own) == list(range(8 * step, 8 * step + 8))


def test_ranks_get_similar_work():
    """Packs of one image-heavy step, dealt by turns, would leave one rank most of the tiles."""
    sizes = [Size(tokens=4000, supervised=1, grids=((3, 3),) if i % 2 else ()) for i in range(8)]
    packed = plan(sizes, packs_per_step=8)
    loads = [sum(packed.packs[i].cost for i in own) for own in packed.rank_order(0, 2)]
    assert loads[0] == loads[1]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_order_deals_each_rank_its_packs(num_ranks):
    packed = plan()
    order = packed.order(num_ranks)
    assert sorted(order.tolist()) == list(range(len(packed.packs)))
    for step in (0, packed.num_steps - 1):
        positions = order[step * 8 : step * 8 + 8]
        for rank in range(num_ranks):
            expected = range(8 * step, 8 * step + 8) if num_ranks == 1 else packed.rank_order(step, num_ranks)[rank]
            assert positions[rank::num_ranks].tolist() == list(expected)


def test_ranks_must_divide_packs_per_step():
    with pytest.raises(ValueError, match="packs_per_step=8 cannot be dealt to 3 ranks"):
        plan().order(3)


@pytest.mark.parametrize(
    "changed",
    [{"max_tokens": 4095}, {"max_tiles_per_pack": 31}, {"packs_per_step": 4}, {"seed": 3}, {"data_fingerprint": "x"}],
)
def test_fingerprint_follows_what_decides_the_plan(changed):
    assert plan(SIZES[:50], **changed).fingerprint != plan(SIZES[:50]).fingerprint


def test_fingerprint_follows_the_sizes():
    assert plan(SIZES[:50]).fingerprint != plan(SIZES[1:51]).fingerprint


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": []}, "empty dataset"),
        ({"packs_per_step": 0}, "packs_per_step=0: expected a number above 0"),
        ({"epochs": 0}, "epochs=0: expected a number above 0"),
        ({"epochs": None}, "epochs and max_steps are both null"),
        ({"max_tokens": 500}, r"record \d+ has \d+ tokens and \d+ tiles, expected at most data\.max_tokens=500"),
    ],
)
def test_bad_settings(changed, message):
    with pytest.raises(ValueError, match=message):
        plan(**changed)


def test_windows_pack_well(monkeypatch):
    """A large data set is packed window by window; each window wastes at most the end of its last packs."""
    monkeypatch.setattr("data.plan.WINDOW", 250)
    packed = plan()
    assert packed.num_packs <= 1.03 * math.ceil(sum(size.tokens for size in SIZES) / 4096)
    assert sorted(sample for pack in packed.packs for sample in pack.samples) == list(range(2000))


def test_file_order_keeps_neighbours_together_and_every_sample_once():
    """A curriculum: easy rows first must be trained on first; packs change places within 128 rows only."""
    sizes = Sizes.of(Size(tokens=50 + i % 40, supervised=5, grids=()) for i in range(1000))
    plan = make_plan(
        Sizes.of(sizes), max_tokens=400, max_tiles_per_pack=32, packs_per_step=2, seed=1, epochs=1, order="file"
    )
    samples = [sample for pack in plan.packs for sample in pack.samples]
    assert sorted(samples) == list(range(1000))
    assert max(abs(sample - place) for place, sample in enumerate(samples)) <= 128
    assert plan.settings["data.order"] == "file"
    shuffled = make_plan(sizes, max_tokens=400, max_tiles_per_pack=32, packs_per_step=2, seed=1, epochs=1)
    assert shuffled.fingerprint != plan.fingerprint
