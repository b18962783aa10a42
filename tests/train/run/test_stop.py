"""The first signal is a request, the second ends the process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.run.stop import StopRequest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signum == 0
        os.kill(os.getpid(), number)
        assert stop.signum == number
    assert signal.getsignal(number) is before
    assert f"{number.name}: finishing this step, then saving" in capfd.readouterr().err


def test_the_second_signal_ends_the_process():
    script = """
import os, signal
from train.stop import StopRequest
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
