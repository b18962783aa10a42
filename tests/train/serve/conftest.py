"""A running service on nano, which the tests of this folder share; what `infer` says to the same requests."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.places import ROOT
from train.config.schema import NANO


@dataclass(frozen=True)
class Running:
    """A service in a process of its own."""

    url: str
    process: subprocess.Popen

    @property
    def api(self) -> str:
        return f"{self.url}/v1"


def start(*arguments: str) -> subprocess.Popen:
    """`serve` with these arguments, on a free port."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        ["bash", str(ROOT / "launch.sh"), "serve", "port=0", "device=cpu", *arguments],
        env={**os.environ, "VENV": "none", "PATH": search, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ready(process: subprocess.Popen) -> Running:
    """Wait until it says where it listens."""
    line = process.stdout.readline()
    assert " at http://" in line, line + process.stderr.read()
    return Running(line.split(" at ")[1].split()[0], process)


@pytest.fixture(scope="session")
def service() -> Iterator[Running]:
    process = start(f"model={NANO}")
    yield ready(process)
    process.terminate()
    assert process.wait(60) == 0
