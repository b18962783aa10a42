"""How an entry script starts and ends: without Paddle's noise; a user's mistake is one line and exit code 2.

The door runs `python -m train.door.cli train.ask.infer ...`: Paddle must come in quietly before the script imports it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import logging
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from train.machine.disk import is_full
from vl2.errors import UserError

# Printed by `import paddle` itself, so that no warning filter reaches it.  Threads are set by the door on purpose.
NOISE = ("WARNING: OMP_NUM_THREADS set to", "PLEASE USE OMP_NUM_THREADS WISELY")


def run_cli(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs an entry script's `main(arguments)` and exits with its code.

    A UserError, or a full disk, is the user's to mend: `error: ...` and exit code 2.  Anything else is a fault of ours
    and keeps its traceback.
    """
    import_paddle_quietly()
    try:
        code = _code_of(main)
    except Exception:
        if not _one_of_several():
            raise
        traceback.print_exc()
        code = 1
    finally:
        # After an exception Python waits for its children, and a data loader's worker that ignores SIGTERM never ends.
        for child in multiprocessing.active_children():
            child.kill()
    if _one_of_several():
        _leave(code)
    sys.exit(code)


def _code_of(main: Callable[[list[str]], int | None]) -> int:
    try:
        return main(sys.argv[1:]) or 0
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        if not is_full(problem):
            raise
        where = f"{problem.filename}: " if problem.filename else ""
        print(f"error: {where}the disk is full; free some space, what was saved before is whole", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _one_of_several() -> bool:
    """Whether this process has met the others of its run."""
    distributed = sys.modules.get("paddle.distributed")
    return distributed is not None and distributed.is_initialized()


def _leave(code: int) -> NoReturn:
    """Ends the process as Python does, but its libraries are not taken down.

    The process that the others met at serves them to its end in a thread. When one hangs up after the log of Paddle's
    libraries is gone, that thread aborts, and a run that has saved everything is reported as failed.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does first
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            stream.flush()
    os._exit(code)


def import_paddle_quietly() -> None:
    """Imports Paddle without its warning about OMP_NUM_THREADS; what else it prints, and what is logged, comes through.

    Example: `logger.warning("a.jpg cannot be read")` anywhere is "warning: a.jpg cannot be read" on stderr.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            import paddle  # noqa: F401
    finally:
        for line in said.getvalue().splitlines():
            if not line.startswith(NOISE):
                print(line, file=sys.stderr)
    # Paddle gives the root logger a handler, and that one holds `said`: what is logged later would go nowhere.
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING, force=True)


if __name__ == "__main__":
    import_paddle_quietly()
    run_cli(importlib.import_module(sys.argv.pop(1)).main)
