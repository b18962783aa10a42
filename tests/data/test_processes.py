"""Child processes end with their parent, also when it was killed or had ended before they looked."""

import os
import signal
import subprocess
import sys
import time

import pytest

from data.processes import map_forked
from tests.places import ROOT
from tests.processes import assert_end
from vl2.errors import UserError

MEASURES = """
import os, sys, time
from pathlib import Path
from data.processes import map_forked

def work(item):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(60)

list(map_forked(work, range(4), 2))
"""
ORPHAN = """
import os, signal, sys, time
from data.processes import end_with_parent
parent = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == parent:
    time.sleep(0.01)
end_with_parent(parent, signal.SIGTERM)
open(sys.argv[1], "w").close()
"""


def start(script: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_measuring_processes_end_with_a_killed_run(tmp_path):
    """They stayed, and measured on for whoever had gone."""
    parent = start(MEASURES, str(tmp_path))
    try:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.iterdir())) < 2:  # until two processes measure
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.wait()
    assert_end(int(path.name) for path in tmp_path.iterdir())


def test_a_parent_that_ended_before_is_noticed(tmp_path):
    """The kernel sends nothing for a parent that ended before it was asked to."""
    mark = tmp_path / "went on"
    script = start(ORPHAN, str(mark))
    assert script.wait(timeout=60) == 0
    time.sleep(0.5)
    assert not mark.exists()


def test_a_killed_measuring_process_is_said():
    """It was the traceback of a BrokenProcessPool."""

    def work(item):
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(
        UserError, match=r"killed \(out of memory\?\): 2 were at work; give data\.measure_workers=1, which"
    ):
        list(map_forked(work, range(6), 2))


def test_forked_work_comes_back_in_order():
    """A child sees what the parent holds, without it being sent, and encodes without threads."""
    held = object()

    def work(item):
        return item, id(held), os.environ["TOKENIZERS_PARALLELISM"]

    assert list(map_forked(work, range(50), 3)) == [(i, id(held), "false") for i in range(50)]
