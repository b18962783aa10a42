"""Packs come in the order of the plan; whoever is killed, no worker stays and the packs that are left still come."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import paddle
import pytest
from paddle.io import BatchSampler, SequenceSampler

from tests.places import ROOT
from tests.processes import assert_end
from train.run.pack_loader import PackLoader
from train.run.stop import WORKER_KILLED, StopRequest
from vl2.errors import UserError


class Packs(paddle.io.Dataset):
    """Ten packs of 2 MB, more than a pipe holds, with and without tiles.

    Args:
        broken: index of a pack with a record that cannot be used.
        fault: index of one that our code fails at.
        slow: index of one that takes a minute.
    """

    def __init__(self, broken: int | None = None, fault: int | None = None, slow: int | None = None):
        super().__init__()
        self.broken, self.fault, self.slow = broken, fault, slow

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index == self.broken:
            raise UserError(f"data.jsonl, row {index}: broken")
        if index == self.fault:
            raise ValueError("a fault of ours")
        if index == self.slow:
            time.sleep(60)
        pack = {"pack": np.array(index), "input_ids": np.arange(250_000) + index}
        return {**pack, "tiles": np.full((2, 3), index, dtype=np.uint8)} if index % 2 else pack


def make_loader(packs: Packs, num_workers: int, on_worker_killed=None) -> PackLoader:
    sampler = BatchSampler(sampler=SequenceSampler(packs), batch_size=1)
    return PackLoader(packs, batch_sampler=sampler, num_workers=num_workers, on_worker_killed=on_worker_killed)


@pytest.mark.parametrize("num_workers", [0, 1, 3, 20])
def test_packs_come_in_order_and_as_they_are(num_workers):
    packs = Packs()
    loader = make_loader(packs, num_workers)
    found = list(loader)
    loader.close()
    assert len(found) == len(loader) == len(packs)
    for index, pack in enumerate(found):
        assert set(pack) == set(packs[index])
        for name, array in packs[index].items():
            assert pack[name].dtype == array.dtype and np.array_equal(pack[name], array)
    assert multiprocessing.active_children() == []


def test_nothing_lies_in_shared_memory():
    """Paddle's loader left about 22 segments there for each run that was killed."""
    loader = make_loader(Packs(), 2)
    next(iter(loader))
    time.sleep(0.2)  # the workers have built ahead
    processes = [os.getpid(), *(worker.process.pid for worker in loader._workers)]
    loader.close()
    # Paddle names them paddle_PID_...; other runs of this machine may have some.
    assert not [name for name in os.listdir("/dev/shm") if any(f"_{process}_" in name for process in processes)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_record_is_an_error_when_its_pack_is_due(num_workers):
    loader = make_loader(Packs(broken=3), num_workers)
    packs = iter(loader)
    assert [int(next(packs)["pack"]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"^data\.jsonl, row 3: broken$"):
        next(packs)
    loader.close()


def test_a_fault_in_a_worker_keeps_its_traceback(capfd):
    loader = make_loader(Packs(fault=1), 2)
    with pytest.raises(RuntimeError, match="exit code 1; its traceback stands above"):
        list(loader)
    loader.close()
    assert "ValueError: a fault of ours" in capfd.readouterr().err


def test_a_killed_worker_asks_for_a_stop_and_its_packs_still_come(capfd):
    """It was a traceback in the middle of a step, and no checkpoint: the system short of memory kills the largest."""
    stop, packs = StopRequest(), Packs()
    loader = make_loader(packs, 2, stop.worker_killed)
    coming = iter(loader)
    found = [int(next(coming)["pack"])]
    assert stop.code == 0
    os.kill(loader._workers[1].process.pid, signal.SIGKILL)
    found += [int(pack["pack"]) for pack in coming]
    loader.close()
    assert found == list(range(10))
    assert stop.code == WORKER_KILLED
    assert capfd.readouterr().err.count("a data worker was killed by SIGKILL (out of memory?): finishing") == 1


def test_workers_ignore_the_signals_that_ask_for_a_stop():
    """A Ctrl-C reaches the whole process group; the packs of the last step must still come."""
    loader = make_loader(Packs(), 2)
    packs = iter(loader)
    next(packs)
    next(packs)  # both have started
    for worker in loader._workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(worker.process.pid, number)
    assert len(list(packs)) == 8
    loader.close()


@pytest.mark.slow
def test_workers_end_with_a_killed_run():
    """They stayed, 330 MB each, and took no SIGTERM: one that builds a pack, and one that waits to hand it over."""
    script = """
import os, signal, sys
sys.path.insert(0, "tests/train/run")
from test_pack_loader import Packs, make_loader
loader = make_loader(Packs(slow=2), 2)
next(iter(loader))
print(*(worker.process.pid for worker in loader._workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = [int(number) for number in done.stdout.split()]
    assert len(workers) == 2
    assert_end(workers)
