"""Copies of the goldens' models, for tests that read a model folder or write into one."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.places import GOLDENS, NANO_BPE


@pytest.fixture(scope="session")
def golden_folder(tmp_path_factory) -> Callable[[str], Path]:
    """golden_folder("nano_tiny"): a new copy of the model with its tokenizer; 0.5 M random weights, true structure."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        for source in (GOLDENS / family, NANO_BPE):
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                if (source / name).is_file():
                    shutil.copy(source / name, folder)
        return folder

    return make


@pytest.fixture
def nfs(monkeypatch) -> list[str]:
    """A file system that locks only what is open for writing, as NFS does; the files that were locked."""
    flock, locked = fcntl.flock, []

    def strict(file, operation):
        number = file if isinstance(file, int) else file.fileno()
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        locked.append(os.readlink(f"/proc/self/fd/{number}"))
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", strict)
    return locked


@pytest.fixture
def single_threaded_tokenizers(monkeypatch) -> None:
    """Training and batches of `tokenizers` start no threads.

    After they did, the library complains of every fork of the process, and measuring, which never starts them and is
    tested for that, would be blamed.
    """
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(params=["loop", pytest.param("batches", marks=pytest.mark.slow)])
def expert_way(request, monkeypatch) -> str:
    """Experts computed as on a CPU, then as on a GPU."""
    monkeypatch.setattr("vl2.ways.takes_batches", lambda place: request.param == "batches")
    return request.param
