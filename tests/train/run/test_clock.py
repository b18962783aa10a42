"""What is due by the clock, with a clock that is set by hand."""

import pytest

from train.config.load import load_config
from train.run.clock import Deadline, SaveSchedule, seconds_since_start
from vl2.errors import UserError


class Hand:
    """A clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_checkpoint_is_due_by_steps_by_the_clock_and_at_the_end(arguments, tmp_path):
    config = load_config(arguments(tmp_path, "save_steps=4", "save_minutes=1"))
    hand = Hand()
    schedule = SaveSchedule(config, 10, hand)
    assert [step for step in range(1, 11) if schedule.is_due(step)] == [4, 8, 10]
    hand.now = 59.9
    assert not schedule.is_due(5)
    hand.now = 60.0
    assert schedule.is_due(5)
    schedule.saved()
    assert not schedule.is_due(6)
    hand.now = 120.0
    assert schedule.is_due(7)
    config = load_config(arguments(tmp_path, "save_steps=0"))
    assert [step for step in range(1, 11) if SaveSchedule(config, 10, hand).is_due(step)] == [10]


def test_a_run_ends_while_there_is_time_for_another_turn_the_checkpoint_and_the_end():
    """The example of the docstring; the first checkpoint's time is guessed from its bytes."""
    hand = Hand()
    deadline = Deadline(100 / 60, saved_bytes=10**9, clock=hand)
    while not deadline.ends_turn():
        hand.now += 8.0
    assert hand.now == 80.0
    hand.now = 0.0
    quick = Deadline(100 / 60, saved_bytes=10**9, clock=hand)
    quick.saving_took(2.0)  # measured: it counts instead of the guess
    hand.now = 80.0
    quick._turn_began = 72.0
    assert not quick.ends_turn()
    quick.saving_begins()  # 80 + 8 + 2 * 2 + 5 fits, with 80 + 8 + 2 * 4 + 5 it does not
    assert not quick.ends_turn()
    quick.saving_took(4.0)
    assert not quick.ends_turn()
    quick.saving_begins()
    assert quick.ends_turn()
    quick.saving_took(20.0)
    assert quick.ends_turn()


def test_the_first_validation_on_the_way_is_reckoned_with():
    """No turn had one yet, and it may take longer than all of them: the run was killed in the middle of it."""
    hand = Hand()
    deadline = Deadline(100 / 60, saved_bytes=10**9, validation=40.0, clock=hand)
    while not deadline.ends_turn():
        hand.now += 8.0
    assert hand.now == 48.0


def test_a_run_without_a_limit_goes_on():
    hand = Hand()
    deadline = Deadline(None, saved_bytes=10**9, clock=hand)
    hand.now = 1e9
    assert not deadline.ends_turn()


def test_a_process_has_an_age():
    assert 0 < seconds_since_start() < 1e6


@pytest.mark.parametrize("key", ["save_minutes", "max_minutes"])
@pytest.mark.parametrize("value", ["0", "-1", "soon"])
def test_no_time_is_refused(arguments, tmp_path, key, value):
    with pytest.raises(UserError, match=rf"{key}={value}(\.0)?: expected"):
        load_config(arguments(tmp_path, f"{key}={value}"))
