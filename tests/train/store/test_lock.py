"""One process at a time in a folder; the lock ends with its holder, however that ends."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.places import ROOT
from train.store.lock import hold
from train.store.run_dir import hold_run_dir
from train.store.whole_folder import write_folder

HOLD = """
import os, sys, time
from pathlib import Path
from train.store.lock import hold
with hold(Path(sys.argv[1]), "x"):
    if os.fork() == 0:  # a data worker, which outlives its parent
        print("held", flush=True)  # and has let go of the parent's lock by now
    time.sleep(30)
"""


def test_a_second_one_is_refused_by_process_and_host(tmp_path):
    """Two runs, or two resume=auto, in one run_dir were both admitted and mixed their files."""
    message = rf"run_dir=x: in use by process {os.getpid()} on {socket.gethostname()}"
    with hold(tmp_path / ".lock", "run_dir=x"):
        with pytest.raises(ValueError, match=message), hold(tmp_path / ".lock", "run_dir=x"):
            pass
        assert (tmp_path / ".lock").exists()  # the refused one took nothing away
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / ".lock", "run_dir=x"):
        pass


def test_a_killed_holder_holds_no_longer_though_its_child_lives(tmp_path):
    lock = tmp_path / ".lock"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on "), hold(lock, "x"):
            pass
        process.kill()
        process.wait(timeout=20)
        with hold(lock, "x"):
            assert lock.read_text().startswith(f"process {os.getpid()} ")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_a_lock_file_that_its_holder_removes_is_not_taken_for_the_new_one(tmp_path, monkeypatch):
    """Opened before the holder removed it and locked afterwards: a third one could lock the new file besides."""
    lock = tmp_path / ".lock"
    import fcntl

    flock, removed = fcntl.flock, []

    def remove_first(file, operation):
        flock(file, operation)
        if not removed:
            removed.append(lock.unlink())

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with hold(lock, "x"), pytest.raises(ValueError, match="in use"), hold(lock, "x"):
        pass
    assert removed


def test_a_run_dir_that_stays_empty_goes_again(tmp_path):
    with hold_run_dir(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run").is_dir()
    assert list(tmp_path.iterdir()) == []
    with hold_run_dir(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["file"]
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with hold_run_dir(link):
        (link / "file").touch()
    assert link.is_symlink() and (tmp_path / "elsewhere" / "file").exists()


def test_two_that_write_one_folder_are_told(tmp_path):
    """Two exports into one `out` deleted each other's half-written files."""

    def write(folder):
        with pytest.raises(ValueError, match=r"out: in use by process \d+"):
            write_folder(tmp_path / "out", lambda again: None)
        (folder / "file").touch()

    write_folder(tmp_path / "out", write)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "manifest.json", "out"]
