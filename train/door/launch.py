"""What launch.sh hands over to: reads the verb, checks the configuration and becomes the process that does the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.config import load, schema
from train.config.compose import to_yaml
from train.config.conf_files import ROOT
from train.config.fields import did_you_mean
from train.door import help
from train.door.shared_memory import spare_shared_memory
from train.machine.devices import choose_device, find_machine, physical_cores
from train.machine.disk import shared_memory_room
from vl2.errors import UserError

LOADERS: dict[str, Callable[[Sequence[str]], Any]] = {
    "train": load.load_config,
    "dryrun": load.load_config,
    "export": load.load_export_config,
    "infer": load.load_infer_config,
    "eval": load.load_eval_config,
    "serve": load.load_serve_config,
}
MODULES = {
    "train": "train.run.training",
    "dryrun": "train.run.dryrun",
    "export": "train.export.merged",
    "infer": "train.ask.infer",
    "eval": "train.ask.evaluate",
    "serve": "train.serve.service",
}
BENCHMARKS = (
    "cost",
    "data",
    "experts",
    "images",
    "launches",
    "length",
    "memory",
    "packing",
    "random_checkpoint",
    "serve",
    "soak",
    "step",
    "vision_cache",
    "watch",
)  # tests/bench/NAME.py
VERBS = (*LOADERS, "runs", "doctor", "config", "test", "bench", "help")
HELP = ("-h", "--help")
_MOST_TEST_PROCESSES = 4  # each holds some 2 GB
# Of third parties, at import time; what this repository warns of is never among it.
QUIET = (
    "ignore:No ccache found:UserWarning",
    "ignore:pkg_resources is deprecated as an API:UserWarning",
    "ignore:Setuptools is replacing distutils:UserWarning",
)


def main(argv: Sequence[str]) -> int:
    """Runs a verb; the working ones replace this process, so that signals and exit codes are theirs."""
    first = argv[0] if argv else "help"
    verb, arguments = ("train", list(argv)) if "=" in first else ("help" if first in HELP else first, list(argv[1:]))
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)} (verbs: {', '.join(VERBS)})")
    if verb in (*LOADERS, "runs", "doctor", "config") and any(argument in HELP for argument in arguments):
        verb, arguments = "help", [verb] if verb in help.SCHEMAS else []
    if verb in (
        "help",
        "config",
        "runs",
    ):  # `| head` ends them without a word, as it does other programs
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if verb == "help":
        print(help.verb_help(arguments[0]) if arguments and arguments[0] not in HELP else help.overview())
        return 0
    if verb == "config":
        named = arguments.pop(0) if arguments and arguments[0] in LOADERS else "train"
        print(to_yaml(LOADERS[named](arguments)), end="")
        return 0
    if verb == "runs":
        from train.door import runs  # here: help needs no installed package, and this one reads JSON with pydantic

        return runs.main(arguments)
    if verb == "doctor":
        from train.door import doctor  # here: it asks the hub, whose library takes half a second to import

        return doctor.main(arguments, child_environment(os.environ, 1))
    if verb == "test":
        return check(arguments)
    command, environ = prepare_benchmark(arguments) if verb == "bench" else prepare(verb, arguments)
    sys.stdout.flush()
    os.execve(command[0], command, environ)


def prepare(verb: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command line and environment that do a verb's work.

    Everything that can be said against the arguments is said here, once, before Paddle's seconds of import.

    Raises:
        UserError: as the verb's `load_*`, or a GPU that Paddle cannot use.
    """
    machine = find_machine()
    settings = LOADERS[verb](arguments)
    work = ["-u", "-m", "train.door.cli", MODULES[verb], *arguments]
    device = choose_device(settings.device, machine)
    tf32 = getattr(settings, "tf32", False)  # an export has no such key: it is verified in float32
    if verb == "dryrun" or not isinstance(settings, schema.TrainConfig):
        return [sys.executable, *work], child_environment(os.environ, 1, tf32=tf32)
    environ = child_environment(os.environ, settings.nproc, tf32=tf32)
    if settings.nproc * settings.nnodes == 1:
        return [sys.executable, *work], environ
    log = Path(settings.run_dir, "log")
    log.mkdir(parents=True, exist_ok=True)
    log.chmod(0o700)  # Paddle's launcher writes the whole environment into it, keys of wandb included
    launcher = ["-m", "train.door.ranks", device, "--nproc_per_node", str(settings.nproc), "--log_dir", str(log)]
    launcher += ["--log_level", "WARNING", "--enable_gpu_log", "False"]
    if device == "gpu":
        cards = machine.visible or tuple(str(card) for card in range(machine.gpus))
        launcher += ["--devices", ",".join(cards[: settings.nproc])]
        if settings.nproc > 1:
            spare_shared_memory(environ, shared_memory_room())
    if settings.nnodes > 1:
        launcher += ["--nnodes", str(settings.nnodes), "--master", settings.master, "--rank", str(settings.rank)]
    return [sys.executable, *launcher, sys.executable, *work], environ


def prepare_benchmark(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command line and environment of `bench NAME ...`: tests/bench/NAME.py under the settings of a run.

    Raises:
        UserError: no such benchmark.
    """
    name = arguments[0] if arguments else ""
    if name not in BENCHMARKS:
        raise UserError(f"bench {name}: expected one of {', '.join(BENCHMARKS)}{did_you_mean(name, BENCHMARKS)}")
    work = ["-u", "-m", "train.door.cli", f"tests.bench.{name}", *arguments[1:]]
    return [sys.executable, *work], child_environment(os.environ, 1)


def child_environment(environ: Mapping[str, str], num_processes: int, *, tf32: bool = False) -> dict[str, str]:
    """The environment of the work: threads shared out, known noise of third parties off; what is set stays.

    Args:
        environ: ours.
        num_processes: that share the cores.
        tf32: whether NVIDIA's libraries may multiply float32 in TF32.
    """
    child = dict(environ)
    child.pop("NVIDIA_TF32_OVERRIDE", None)
    if not tf32:
        child["NVIDIA_TF32_OVERRIDE"] = "0"
    child.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's numbers; CUDA alone puts the fastest card first
    child.setdefault("OMP_NUM_THREADS", str(max(1, physical_cores() // num_processes)))
    # A product's threads wait a millisecond for the next one and then leave their cores to the loops of `vl2.threads`.
    child.setdefault("KMP_BLOCKTIME", "1")
    if "HOME" in environ:  # beside the sources, which is numba's usual place, not everybody may write
        cache = Path(environ.get("XDG_CACHE_HOME") or Path(environ["HOME"], ".cache"))
        child.setdefault("NUMBA_CACHE_DIR", str(cache / "deepseek-vl2-finetune" / "kernels"))
    child.setdefault("GLOG_minloglevel", "1")  # no INFO lines of Paddle's C++
    child["PYTHONWARNINGS"] = ",".join([*QUIET, *filter(None, [environ.get("PYTHONWARNINGS")])])
    return child


def check(arguments: Sequence[str]) -> int:
    """Linter, formatter, types and tests, all of them whatever fails; what CI runs.

    Tests without arguments run in several processes, file by file, in order: most of them use one core.

    Args:
        arguments: of pytest. `quick` in front leaves out the slow tests, `lint` in front runs no test at all.

    Returns:
        The first failing exit code, or 0.
    """
    tier = arguments[0] if arguments and arguments[0] in ("quick", "lint") else "all"
    commands = [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]]
    rest = list(arguments if tier == "all" else arguments[1:])
    processes = 1 if rest else min(physical_cores(), _MOST_TEST_PROCESSES)
    if tier == "lint" and rest:
        raise UserError(f"test lint runs no test and takes no arguments, found {' '.join(rest)}")
    if tier != "lint":
        share = ["-n", str(processes), "--dist", "loadfile", "--no-loadscope-reorder"] if processes > 1 else []
        commands.append(["pytest", *share, *(["-m", "not slow"] if tier == "quick" else []), *rest])
    environ, codes = child_environment(os.environ, processes), []
    for command in commands:
        print("+", *command, file=sys.stderr, flush=True)
        codes.append(subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environ).returncode)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
