"""Held-out rows are chosen by what they say: nothing else moves one from one side to the other."""

import numpy as np
import pytest

from data.held_out import DEFAULT_FRACTION, hold_out
from vl2.errors import UserError


def keys(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


def held(content_keys, fraction=0.1, rows=None) -> set[int]:
    """Keys of the held-out rows that are asked."""
    return set(content_keys[hold_out(content_keys, fraction=fraction, rows=rows).asked].tolist())


def test_every_row_is_on_one_side():
    split = hold_out(keys(1000), fraction=0.1, rows=None)
    assert sorted([*split.trained, *split.asked]) == list(range(1000))
    assert 70 < len(split.asked) < 130
    assert split.unused == 0


def test_rows_that_come_or_go_move_no_other():
    """A split of the shuffled rows trained, after a row was added, on rows that it had held out before."""
    some, more = keys(1000), np.concatenate([keys(500, seed=1), keys(1000)])
    assert held(some) == held(more) & set(some.tolist())
    assert held(some[:300]) == held(some) & set(some[:300].tolist())
    assert held(some[::-1]) == held(some)


def test_keys_that_are_close_are_spread_too():
    split = hold_out(np.arange(10_000, dtype=np.uint64), fraction=0.2, rows=None)
    assert 1800 < len(split.asked) < 2200


def test_equal_conversations_are_on_the_same_side():
    twice = np.tile(keys(200), 2)
    split = hold_out(twice, fraction=0.3, rows=None)
    assert set(twice[split.asked].tolist()).isdisjoint(twice[split.trained].tolist())


def test_a_larger_fraction_holds_out_more_and_none_less():
    assert held(keys(1000), 0.05) < held(keys(1000), 0.2)


def test_number_of_rows_does_not_move_the_border():
    """The ten smallest hashes of more rows would be others; only which of the held-out rows are asked may change."""
    few, all_of_them = hold_out(keys(1000), fraction=None, rows=10), hold_out(keys(1000), fraction=None, rows=None)
    assert few.trained.tolist() == all_of_them.trained.tolist()
    assert (len(few.asked), few.unused) == (10, len(all_of_them.asked) - 10)
    assert set(few.asked.tolist()) < set(all_of_them.asked.tolist())
    assert abs(len(all_of_them.asked) - DEFAULT_FRACTION * 1000) < 25
    assert few.asked.tolist() == sorted(few.asked.tolist())
    both = hold_out(keys(1000), fraction=0.3, rows=10)
    assert both.asked.tolist() == few.asked.tolist()
    assert len(both.trained) < len(few.trained)


def test_choice_is_the_same_everywhere():
    """A literal of the first choice: the salt and the hash may never change, or trained rows would be asked."""
    assert hold_out(np.arange(100, dtype=np.uint64), fraction=0.1, rows=None).asked.tolist() == PINNED


PINNED = [6, 18, 29, 35, 42, 51, 55, 72, 95]


@pytest.mark.parametrize(
    ("count", "fraction", "rows", "message"),
    [
        (
            3,
            0.001,
            None,
            r"^data\.eval_fraction=0\.001: none of the 3 rows is held out, of which about 0\.001 should be",
        ),
        (3, None, 2, r"^data\.eval_rows: none of the 3 rows is held out, of which about 0\.05 should be; raise data"),
        (1, 0.9, None, r"^data\.eval_fraction=0\.9: all 1 rows are held out, none is left to train on; lower"),
    ],
)
def test_an_empty_side_is_an_error(count, fraction, rows, message):
    with pytest.raises(UserError, match=message):
        hold_out(np.arange(7, 7 + count, dtype=np.uint64), fraction=fraction, rows=rows)
