"""Work beside the steps: one piece at a time, and its error comes back once."""

import threading

import pytest

from train.run.background import Background


def test_one_piece_at_a_time_and_nobody_waits_before_join():
    work, may_end, done = Background("work"), threading.Event(), []
    work.start(lambda: (may_end.wait(60), done.append("first")))
    work.check()  # does not wait
    assert done == []
    threading.Timer(0.02, may_end.set).start()
    work.start(lambda: done.append("second"))  # waits for the first
    assert done[0] == "first"
    work.join()
    assert done == ["first", "second"]


@pytest.mark.parametrize("how", ["join", "start", "check"])
def test_an_error_comes_back_once(how):
    work, failed = Background("work"), threading.Event()

    def fail() -> None:
        try:
            raise OSError("full")
        finally:
            failed.set()

    work.start(fail)
    failed.wait(60)
    again = {"join": work.join, "start": lambda: work.start(lambda: None), "check": lambda: check_until_known(work)}
    with pytest.raises(OSError, match="full"):
        again[how]()
    work.check()
    work.join()


def check_until_known(work: Background) -> None:
    while True:  # the thread may still be on its way out
        work.check()
