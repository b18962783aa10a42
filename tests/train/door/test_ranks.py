"""Several processes: a signal reaches each of them once, all of them finish, and their exit code is the launcher's."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.places import ROOT
from train.door.ranks import watch
from train.run.stop import TIME_IS_UP

pytestmark = pytest.mark.slow

WAITS = """
import os, signal, sys, time
rank, folder = int(os.environ["PADDLE_TRAINER_ID"]), sys.argv[1]
got = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: got.append(number))
open(f"{folder}/ready{rank}", "w").close()
while not got:
    time.sleep(0.05)
time.sleep(4 if rank == 0 else 0)  # rank 0 still writes its checkpoint when rank 1 has gone
with open(f"{folder}/end{rank}", "w") as file:
    file.write(f"{got} of {os.environ['PADDLE_TRAINERS_NUM']}, {os.environ['PADDLE_DISTRI_BACKEND']}, {sys.argv[2]}")
sys.exit(143)
"""
FAILS = """
import os, sys, time
if os.environ["PADDLE_TRAINER_ID"] == "1":
    sys.exit("error: rank 1 cannot go on")
print("rank 0 waits", flush=True)
time.sleep(60)
"""
# Rank 0 lingers where its libraries are taken down already (its pause, registered before theirs, comes after them) and
# still serves the ranks' meeting place, which a library kept; meanwhile rank 1 hangs up.
LINGERS = """
import ctypes, os, sys, time
rank = int(os.environ["PADDLE_TRAINER_ID"])
if rank == 0:
    libc = ctypes.CDLL(None)
    libc.__cxa_atexit(libc.usleep, ctypes.c_void_p(3_000_000), None)
from train.door.cli import run_cli
def main(argv):
    import paddle.distributed as dist
    from paddle.base import core
    dist.init_parallel_env()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(core.create_or_get_global_tcp_store()))
    dist.barrier()
    if rank == 1:
        time.sleep(1)
    print("done", rank)
    return 75
run_cli(main)
"""


def start(folder, script, *arguments):
    (folder / "rank.py").write_text(script)
    launcher = [
        sys.executable,
        "-m",
        "train.door.ranks",
        "cpu",
        "--log_dir",
        str(folder / "log"),
        "--enable_gpu_log",
        "False",
    ]
    work = [sys.executable, "-u", str(folder / "rank.py"), str(folder), "prompt=a b, （--x"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        [*launcher, *arguments, *work], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(paths, processes):
    end = time.monotonic() + 90
    while not all(path.exists() and (path.stat().st_size or "ready" in path.name) for path in paths):
        assert time.monotonic() < end and all(process.poll() is None for process in processes), (
            processes[0].communicate()[0].decode()
        )
        time.sleep(0.1)


@pytest.mark.slow
def test_signal_reaches_each_process_once(tmp_path):
    """Paddle's own launcher sends SIGTERM three times and ends the others 3 seconds after the first has gone."""
    launcher = start(tmp_path, WAITS, "--nproc_per_node", "2", "--log_level", "WARNING")
    wait_for([tmp_path / "ready0", tmp_path / "ready1"], [launcher])
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=60)[0].decode()
    assert launcher.returncode == 143, said
    for rank in (0, 1):
        assert (tmp_path / f"end{rank}").read_text() == f"[{signal.SIGTERM:d}] of 2, gloo, prompt=a b, （--x"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "arrives"), [(signal.SIGKILL, signal.SIGTERM), (signal.SIGHUP, signal.SIGHUP)])
def test_the_launcher_is_killed_or_its_terminal_closes(tmp_path, number, arrives):
    """Ranks whose launcher was gone trained on, each on a GPU that nobody knew to be taken."""
    launcher = start(tmp_path, WAITS, "--nproc_per_node", "2", "--log_level", "WARNING")
    wait_for([tmp_path / "ready0", tmp_path / "ready1"], [launcher])
    if number == signal.SIGHUP:
        launcher.stdout.close()  # what the launcher says from here on cannot be written
    launcher.send_signal(number)
    ended = [tmp_path / "end0", tmp_path / "end1"]
    wait_for(ended, [])
    assert [path.read_text().partition(" of ")[0] for path in ended] == [f"[{arrives:d}]"] * 2
    assert launcher.wait(timeout=60) == (143 if number == signal.SIGHUP else -number)


@pytest.mark.slow
def test_two_machines(tmp_path):
    """nnodes=2, both on this machine: each launcher starts its rank of one job."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [
        start(tmp_path, WAITS, "--nproc_per_node", "1", "--nnodes", "2", "--master", master, "--rank", str(rank))
        for rank in (0, 1)
    ]
    wait_for([tmp_path / "ready0", tmp_path / "ready1"], nodes)
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    assert [node.wait(timeout=60) for node in nodes] == [143, 143]
    assert (tmp_path / "end1").read_text().startswith("[15] of 2, gloo")


@pytest.mark.slow
def test_failed_process_takes_the_others_with_it(tmp_path):
    """The words of the one that failed are shown once; rank 0, which waits for it, is ended."""
    launcher = start(tmp_path, FAILS, "--nproc_per_node", "2", "--log_level", "WARNING")
    said = launcher.communicate(timeout=50)[0].decode()
    assert launcher.returncode == 1, said
    assert said.count("error: rank 1 cannot go on") == 1
    assert said.count("rank 0 waits") == 1
    assert "process 1 of this machine failed (exit 1)" in said


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("return 75", 75), ("raise TypeError('a fault')", 1)])
def test_taking_libraries_down_does_not_fail_a_run(tmp_path, end, code):
    """Rank 0 was aborted at its very end when another hung up after Paddle's log was gone and before its server was."""
    launcher = start(tmp_path, LINGERS.replace("return 75", end), "--nproc_per_node", "2", "--log_level", "WARNING")
    said = launcher.communicate(timeout=90)[0].decode()
    assert launcher.returncode == code and "killed" not in said, said
    assert said.count("done 0") == 1
    assert ("TypeError: a fault" in said) is (code == 1)  # a fault of ours keeps its traceback


def test_processes_whose_time_is_up_have_not_failed(capfd):
    """All of them stop before max_minutes are over: the first that ended was reported as failed, with its log."""
    processes = [subprocess.Popen(["sh", "-c", f"sleep {after}; exit {TIME_IS_UP}"]) for after in (0.3, 0)]
    containers = [SimpleNamespace(_proc=SimpleNamespace(_proc=process)) for process in processes]
    controller = SimpleNamespace(
        pod=SimpleNamespace(containers=containers, logs=lambda: False), signal_handler=signal.SIG_DFL
    )
    before = signal.getsignal(signal.SIGHUP)
    try:
        assert watch(controller)  # the launcher then exits with the processes' code
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [process.returncode for process in processes] == [TIME_IS_UP, TIME_IS_UP]
    assert capfd.readouterr().err == ""
