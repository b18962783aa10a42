"""paddle.distributed.launch with four corrections; run as `python -m train.door.ranks cpu|gpu <its arguments>`.

1. SIGTERM, SIGINT and SIGHUP go on to every process once, and then it waits: a process finishes its step, saves and
   exits, and its exit code is ours.  Paddle's launcher signals three times, kills after 30 seconds and exits with 15.
2. A failed run shows the failing process's words once, and nothing of the launcher's. The others are told, save the
   step before where they can, and end within a minute.
3. `cpu` holds on a machine with GPUs too: the processes talk through gloo.
4. Processes whose launcher was killed are asked to stop: they save and end.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from train.door.cli import import_paddle_quietly
from train.run.stop import PEER_LOST, TIME_IS_UP, stop_with_parent, write_or_detach
from train.store.checkpoints import checkpoints
from train.store.names import CHECKPOINTS

GRACE = 30.0  # seconds for the others to save and end when one process failed
SILENT = 60.0  # seconds after which a process that is stopped is told of
TAIL = 3000  # characters shown of a failed process's log


def pass_on(controller: Any, number: int, frame: FrameType | None) -> None:
    """Signal handler of the launcher: hands the signal to its processes; `watch` waits for them."""
    controller.stopping = True
    if number == signal.SIGHUP:  # the terminal may be gone, where `watch` will still write
        for descriptor in (1, 2):
            write_or_detach(descriptor, "\n")
    processes = processes_of(controller)
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
    if not processes:
        sys.exit(128 + number)


def processes_of(controller: Any) -> list[subprocess.Popen[bytes]]:
    """The processes that this launcher has started."""
    return [container._proc._proc for container in controller.pod.containers if container._proc]


def watch(controller: Any) -> bool:
    """Shows rank 0's words until every process has ended; one that fails by itself takes the others with it."""
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, controller.signal_handler)
    processes, code = processes_of(controller), 0
    stopped: dict[int, float] = {}
    while any(process.poll() is None for process in processes):
        controller.pod.logs()
        time.sleep(0.1)
        tell_of_stopped(processes, stopped)
        # One that a signal ended comes first: another's error may be that its connection is gone.
        failed = sorted(
            (process.returncode > 0, rank)
            for rank, process in enumerate(processes)
            if process.poll() not in (None, 0, TIME_IS_UP)  # on which all of them agree
        )
        if failed and not getattr(controller, "stopping", False):
            rank = failed[0][1]
            code = processes[rank].returncode
            end_all(processes)
            while controller.pod.logs():
                pass
            show_failure(controller.pod.containers[rank], shown=rank == 0)
            print(how_to_go_on(Path(controller.ctx.args.log_dir).parent), file=sys.stderr)
    while controller.pod.logs():
        pass
    if code:  # not that of a process that was ended for another's sake
        controller.master.stop()
        sys.exit(code if code > 0 else 128 - code)
    return True


def end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ends the processes that still run, which wait for one that will not come: a word, and some time to save."""
    for process in processes:
        process.send_signal(PEER_LOST)
    deadline = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def show_failure(container: Any, *, shown: bool) -> None:
    """Says which process failed, with the end of its log where that is not on the screen yet (as rank 0's is)."""
    code = container.exit_code
    how = f"failed (exit {code})" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    if -code == signal.SIGKILL:
        how += " (out of memory?)"
    print(f"error: process {container.rank} of this machine {how}: {container.errfile}", file=sys.stderr)
    if not shown:
        print(Path(container.errfile).read_text("utf-8", "replace")[-TAIL:], file=sys.stderr)


def how_to_go_on(run_dir: Path) -> str:
    """Where a run that has failed can go on from."""
    saved = checkpoints(run_dir / CHECKPOINTS)
    if not saved:
        return "no checkpoint was written"
    return f"the newest checkpoint is {saved[-1]}; the same command with resume=auto goes on"


def tell_of_stopped(processes: list[subprocess.Popen[bytes]], since: dict[int, float]) -> None:
    """Names each process that has been stopped (SIGSTOP) for a while: it is not gone, and all wait for it.

    Args:
        since: rank -> when it was first seen so; infinite once it was told of.
    """
    for rank, process in enumerate(processes):
        if not is_stopped(process.pid):
            since.pop(rank, None)
        elif time.monotonic() - since.setdefault(rank, time.monotonic()) > SILENT:
            since[rank] = math.inf
            print(
                f"process {rank} of this machine (id {process.pid}) has been stopped for {SILENT:.0f} seconds, and "
                f"the others wait for it: kill -CONT {process.pid} lets it go on",
                file=sys.stderr,
            )


def is_stopped(process: int) -> bool:
    """Whether a process is there and does not run because a signal stopped it; False where the system has no /proc."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def main() -> None:
    """Corrects the launcher's classes and runs it."""
    import_paddle_quietly()
    from paddle.distributed.launch.context.device import Device, DeviceType
    from paddle.distributed.launch.controllers.controller import ControllerBase
    from paddle.distributed.launch.main import launch
    from paddle.distributed.launch.utils.process_context import ProcessContext

    launcher, start = os.getpid(), ProcessContext._start

    def begin() -> None:  # in the new process, before it becomes Python again
        os.setsid()  # as without us: a Ctrl-C reaches the launcher alone
        stop_with_parent(launcher)

    def start_rank(process: Any) -> None:
        process._preexec_fn = begin
        start(process)

    ProcessContext._start = start_rank
    if sys.argv.pop(1) == "cpu":

        def no_accelerator() -> Any:
            device = Device()
            device._dtype, device._labels = DeviceType.CPU, []
            return device

        Device.parse_device = staticmethod(no_accelerator)
    ControllerBase.signal_handler = pass_on
    ControllerBase.watch = watch
    launch()


if __name__ == "__main__":
    main()
