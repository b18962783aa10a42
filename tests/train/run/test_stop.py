"""The first signal is a request, the second ends the process; a hangup is a request however often it comes."""

import os
import signal
import subprocess
import sys

import pytest

from tests.places import ROOT
from train.run.stop import PEER_LOST, WORKER_KILLED, StopRequest, peer_lost


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_first_signal_is_noted_and_handlers_come_back(number, code, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.code == 0
        os.kill(os.getpid(), number)
        assert stop.code == code
    assert signal.getsignal(number) is before
    assert f"{number.name}: finishing this step, then saving" in capfd.readouterr().err


def test_the_second_signal_ends_the_process():
    script = """
import os, signal
from train.run.stop import StopRequest
with StopRequest():
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never said", flush=True)
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "still here\n"


def test_a_second_hangup_is_the_first_one_again():
    """A terminal that closes sends SIGHUP from the kernel and from the shell: the run must have time to save."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.code == 129


@pytest.mark.parametrize(("before", "code"), [(None, 129), (signal.SIGINT, 130)])
def test_what_is_said_after_the_terminal_has_gone_ends_nothing(tmp_path, before, code):
    """SIGHUP killed the run. Taken as a request, the next word to the terminal that is gone would: EIO.

    Also when a Ctrl-C came before: its checkpoint is still to be saved.
    """
    script = f"""
import os, signal
from train.run.stop import StopRequest
with StopRequest() as stop:
    if {before and int(before)}:
        os.kill(os.getpid(), {before and int(before)})
    input()
    os.kill(os.getpid(), signal.SIGHUP)
    print("saved", flush=True)
    open({str(tmp_path / "code")!r}, "w").write(str(stop.code))
"""
    environ, (controller, terminal) = {**os.environ, "PYTHONPATH": str(ROOT)}, os.openpty()
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=terminal, stderr=terminal)
    os.close(terminal)
    if before:
        os.read(controller, 100)  # what it says of the first signal
    os.close(controller)  # the terminal closes
    process.communicate(b"go on\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "code").read_text() == str(code)


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_after_a_killed_worker_is_the_first_signal():
    with StopRequest() as stop:
        stop.worker_killed("a data worker was killed")
        assert stop.code == WORKER_KILLED
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.code == 143


def test_word_of_a_lost_process_ends_nothing_after_the_steps():
    """It came while the last lines were written, to a process that did not take it any more: no curve, no state."""
    with StopRequest():
        pass
    try:
        os.kill(os.getpid(), PEER_LOST)
        assert peer_lost.is_set()
    finally:
        peer_lost.clear()
