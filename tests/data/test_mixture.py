"""Mixtures: how often each row of each source is taken, exactly, whatever the length of the run."""

import numpy as np
import pytest

from data.mixture import Mixture
from data.plan import Plan, make_plan
from data.sizes import Size, Sizes
from vl2.errors import UserError


def mixture(*sources: tuple[int, float]) -> Mixture:
    """Of sources, each (rows, repeat)."""
    source_of = np.repeat(np.arange(len(sources), dtype=np.int32), [rows for rows, _ in sources])
    names = tuple("abcdef"[: len(sources)])
    return Mixture(source_of=source_of, repeats=tuple(repeat for _, repeat in sources), names=names)


def times(mixed: Mixture, epochs: range, seed: int = 3) -> np.ndarray:
    """How often each row is taken in these epochs."""
    taken = [mixed.members(seed=seed, epoch=epoch) for epoch in epochs]
    return np.bincount(np.concatenate(taken), minlength=len(mixed.source_of))


def sizes(count: int) -> Sizes:
    return Sizes.of(Size(tokens=20 + i % 7, supervised=3 + i % 5, grids=()) for i in range(count))


def plan(mixed: Mixture, **changed) -> Plan:
    settings = {"max_tokens": 100, "max_tiles_per_pack": 32, "packs_per_step": 2, "seed": 3, "epochs": 1}
    return make_plan(sizes(len(mixed.source_of)), mixture=mixed, **{**settings, **changed})


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
@pytest.mark.parametrize(
    ("repeat", "epochs", "each"),
    [(1, 1, 1), (2, 1, 2), (2.5, 2, 5), (0.5, 2, 1), (0.1, 10, 1), (0.3, 10, 3), (1.75, 4, 7), (0.333333, 3, 1)],
)
def test_after_whole_rounds_every_row_was_taken_equally_often(rows, repeat, epochs, each):
    mixed = mixture((rows, repeat), (5, 1))
    for first in (0, epochs, 7 * epochs):
        found = times(mixed, range(first, first + epochs))
        assert found[:rows].tolist() == [each] * rows
        assert found[rows:].tolist() == [epochs] * 5


@pytest.mark.parametrize("repeat", [2.5, 0.3, 1.05])
def test_each_epoch_takes_the_exact_number_of_rows(repeat):
    """No epoch takes more than a row too many, and the error does not add up over 1000 epochs."""
    mixed, total = mixture((101, repeat)), 0
    for epoch in range(1000):
        rows = mixed.members(seed=0, epoch=epoch)
        total += len(rows)
        assert total == int((epoch + 1) * 101 * round(repeat * 100)) // 100
        found = np.bincount(rows, minlength=101)
        assert set(found.tolist()) <= {int(repeat), int(repeat) + 1}


def test_a_part_of_the_rows_changes_until_all_were_seen():
    found = [set(mixture((10, 0.5)).members(seed=1, epoch=epoch).tolist()) for epoch in range(4)]
    assert found[0] | found[1] == set(range(10))
    assert found[0].isdisjoint(found[1])
    assert found[0] == found[2]
    assert found[0] != set(mixture((10, 0.5)).members(seed=2, epoch=0).tolist())


def test_sources_do_not_change_each_other():
    alone, beside = mixture((10, 0.5)), mixture((10, 0.5), (40, 2.5))
    for epoch in range(3):
        rows = beside.members(seed=1, epoch=epoch)
        assert rows[rows < 10].tolist() == alone.members(seed=1, epoch=epoch).tolist()


def test_order_of_the_sources_and_passes():
    assert mixture((2, 2), (3, 1)).members(seed=0, epoch=0).tolist() == [0, 1, 0, 1, 2, 3, 4]


def test_plan_takes_what_the_mixture_says():
    mixed = mixture((40, 2.5), (30, 1), (50, 0.2))
    planned = plan(mixed, epochs=10)
    starts = np.cumsum([0, *planned.steps_per_epoch]) * 2
    for epoch in range(10):
        packs = planned.packs[starts[epoch] : starts[epoch + 1]]
        samples = [sample for pack in packs for sample in pack.samples]
        assert sorted(samples) == sorted(mixed.members(seed=3, epoch=epoch).tolist())
        assert all(pack.tokens == sum(20 + sample % 7 for sample in pack.samples) <= 100 for pack in packs)
        assert all(pack.supervised == sum(3 + sample % 5 for sample in pack.samples) for pack in packs)


@pytest.mark.parametrize("longer", [{"epochs": 5}, {"epochs": None, "max_steps": 200}])
def test_longer_run_keeps_its_past(longer):
    mixed = mixture((40, 2.5), (30, 0.3))
    short, long = plan(mixed, epochs=2), plan(mixed, **longer)
    assert long.packs[: len(short.packs)] == short.packs
    assert long.fingerprint == short.fingerprint


def test_taking_every_row_once_is_the_plan_of_one_file():
    assert plan(mixture((40, 1), (30, 1.0))) == plan(mixture((70, 1)))


def test_fingerprint_follows_the_mixture():
    """A run must not be resumed under other repeats, and the words say what changed."""
    before, now = plan(mixture((40, 2.5), (30, 1))), plan(mixture((40, 2), (30, 1)))
    assert before.fingerprint != now.fingerprint
    assert before.settings["data.sources"] == "40 rows x 2.5, 30 rows x 1"
    assert plan(mixture((40, 2.5), (30, 1))).fingerprint == before.fingerprint
    assert plan(mixture((30, 1), (40, 2.5))).fingerprint != before.fingerprint
    assert (
        plan(
            mixture(
                (40, 99.99995),
            )
        ).fingerprint
        != plan(
            mixture(
                (40, 100),
            )
        ).fingerprint
    )


def test_file_order_keeps_the_order_of_the_sources():
    planned = plan(mixture((200, 1), (200, 2)), order="file")
    samples = [sample for pack in planned.packs for sample in pack.samples]
    expected = [*range(200), *range(200, 400), *range(200, 400)]
    assert sorted(samples) == sorted(expected)
    assert max(samples[:100]) < 200 <= min(samples[-200:])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([(3, 1), (3, 0)], r"^source b: repeat=0: expected a number above 0$"),
        ([(3, -2.5)], r"^source a: repeat=-2\.5: expected a number above 0$"),
        ([(3, float("nan"))], r"^source a: repeat=nan: expected a number above 0$"),
        ([(3, 1), (0, 1)], r"^source b: expected at least one row to train on, found none$"),
        ([(30, 1), (5, 0.1)], r"^source b: repeat=0\.1 takes none of its 5 rows in 1 epoch\(s\); raise it$"),
        ([(5, 0.1)], r"^source a: repeat=0\.1 takes none of its 5 rows in 1 epoch\(s\); raise it$"),
    ],
)
def test_a_source_that_gives_nothing_is_named(sources, message):
    with pytest.raises(UserError, match=message):
        plan(mixture(*sources))


def test_an_epoch_without_a_row_is_passed_over():
    """Five rows of which each epoch takes a tenth: the first epoch has none, the run begins in the second."""
    planned = plan(mixture((5, 0.1)), epochs=None, max_steps=3)
    assert planned.num_steps == 3
    assert planned.steps_per_epoch[0] == 0
    assert planned.epoch(0) == 1
