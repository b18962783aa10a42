"""Loops that are shared out among threads, and tensors that several threads let go of."""

import os
import subprocess
import sys

import numpy as np
import paddle
import pytest

from vl2 import cpu_kernels, threads
from vl2.arrays import empty, read

LETTING_GO = """
import threading
import paddle
from vl2.norm import RMSNorm

norm = RMSNorm(8, 1e-6)
done = threading.Event()

def others():
    while not done.is_set():
        norm(paddle.ones([4, 8]))

other = threading.Thread(target=others)
other.start()
for _ in range(300):
    x = paddle.ones([4, 8])
    x.stop_gradient = False
    y = x
    for _ in range(30):
        y = norm(y)
    y.sum().backward()
done.set()
other.join()
"""


@pytest.fixture
def three(monkeypatch):
    """Threads, whatever the machine has, for loops of any size."""
    monkeypatch.setattr(threads, "THREADS", 3)
    monkeypatch.setattr(threads, "LEAST", 1)
    monkeypatch.setattr(threads, "_pool", None)
    yield
    threads._threads().shutdown()


def test_every_row_is_done_once(three):
    for rows in (1, 2, 5, 12, 100):
        done = np.zeros(rows, int)

        def work(start, stop, done=done):
            done[start:stop] += 1

        threads.in_parts(work, rows, 1000)
        assert (done == 1).all()


def test_numbers_do_not_depend_on_threads(three, monkeypatch):
    scores = np.random.default_rng(0).normal(0, 5, (60, 33)).astype(np.float32)
    found = []
    for number in (3, 1):
        monkeypatch.setattr(threads, "THREADS", number)
        weights, notes = scores.copy(), np.empty((60, 2), np.float32)
        cpu_kernels.softmax(weights, 20, 7, notes)
        found.append((weights, notes))
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def test_a_fault_in_a_part_is_raised(three):
    def work(start, stop):
        raise ValueError(f"{start} to {stop}")

    with pytest.raises(ValueError, match=" to "):
        threads.in_parts(work, 12, 1000)


def test_a_forked_child_starts_threads_of_its_own(three):
    threads.in_parts(lambda start, stop: None, 12, 1000)
    child = os.fork()
    if not child:
        done = np.zeros(12, int)
        threads.in_parts(lambda start, stop: done.__setitem__(slice(start, stop), 1), 12, 1000)
        os._exit(0 if done.all() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_that_let_go_of_tensors_do_not_wait_for_each_other():
    """Results of kernels held both Paddle's lock and Python's on their way out; a backward beside it hung for ever."""
    subprocess.run([sys.executable, "-c", LETTING_GO], check=True, timeout=120)


def test_memory_is_let_go_of():
    """With every tensor: some gigabytes pass through here."""

    def held() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = held()
    for _ in range(200):
        tensor, array = empty([1 << 20])
        array[:] = 1
        other = tensor.reshape([1 << 10, 1 << 10])[3:]
        del tensor, array
    assert float(other.sum()) == other.size
    assert held() - before < 64 << 20


def test_arrays_keep_the_memory_of_their_tensors_alive():
    def made():
        tensor, array = empty([3, 4])
        array[:] = 7
        assert (tensor.numpy() == 7).all()
        return read(tensor * 1)

    array = made()
    paddle.ones([3, 4])
    assert (array == 7).all() and not array.flags.writeable
    assert read(paddle.ones([2, 3], "bfloat16")).dtype == np.uint16 and read(paddle.zeros([0, 3])).shape == (0, 3)
