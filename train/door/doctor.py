"""`bash launch.sh doctor`: looks at machine and Paddle, trains and answers on nano, and writes what it found to a file.

Nothing here imports Paddle, which may be what is broken: what needs it is done by processes of its own.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.config.load import load_doctor_config
from train.door.shared_memory import spare_shared_memory
from train.door.trial import Trial, compare, read_trial
from train.machine.devices import find_machine
from train.machine.disk import shared_memory_room
from train.machine.environment import driver_report, read_lock
from train.machine.health import CARD, COMPUTING, DRIVER, PADDLE, Finding, look_at_machine
from train.store.hub import hub_problem
from train.store.run_dir import check_place
from vl2.errors import UserError

_TINY = "deepseek-ai/deepseek-vl2-tiny"
_FIRST_LINE = "## findings"
_EXCHANGE_PATIENCE = 180  # seconds; cards that do not reach each other wait for ever
_PATIENCE = 600  # seconds for one process; they take some twenty
_MOST_RESTARTS = 3  # of the kernels' process, when one of them has taken it down
# Of the environment, those that decide what runs where; nothing else of it goes into the file.
_TOLD = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
_TOLD_PREFIXES = ("FLAGS_", "NCCL_", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "MKL_", "VENV")


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """The verb.

    Args:
        arguments: `key=value`, see `DoctorConfig`.
        environ: of the processes that use Paddle.

    Returns:
        Exit code, see `DoctorConfig`.
    """
    config = load_doctor_config(arguments)
    check_out(Path(config.out))
    started, machine = time.perf_counter(), find_machine()
    findings: list[Finding] = []

    def tell(*found: Finding) -> None:
        findings.extend(found)
        for one in found:
            print(one, flush=True)

    tell(*look_at_machine(machine, config.device))
    problem = hub_problem(_TINY)
    tell(Finding(part="hub", words=problem or f"it answers for {_TINY}", note=bool(problem)))
    details: dict[str, Any] = {}
    if any(finding.code in (DRIVER, PADDLE, CARD) for finding in findings):
        tell(Finding(part="training", words="not tried: mend the faults above first", note=True))
    else:
        gpu = config.device != "cpu" and machine.usable_gpus > 0
        with tempfile.TemporaryDirectory(prefix="doctor-") as place:
            if gpu and machine.usable_gpus > 1:
                cards = machine.visible or tuple(str(number) for number in range(machine.gpus))
                tell(try_exchange("gpu", cards[: machine.usable_gpus], Path(place), environ))
            tell(*_compute("gpu" if gpu else "cpu", Path(place), environ, details))
    code = min((finding.code for finding in findings if finding.code), default=0)
    tell(Finding(part="time", words=f"{time.perf_counter() - started:.0f} s", note=True))
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    Path(config.out).write_text(_report(findings, details), encoding="utf-8")
    print(f"{'all is well' if not code else f'faults were found: exit code {code}'}; {config.out} has all of it")
    return code


def check_out(path: Path) -> None:
    """Refuse to write over a file of somebody else, before minutes of work.

    Raises:
        UserError: saying what to do.
    """
    check_place(path.parent, f"out={path}")
    try:
        ours = not path.exists() or (path.is_file() and path.read_text("utf-8", "replace").startswith(_FIRST_LINE))
    except OSError:
        ours = False
    if not ours:
        raise UserError(f"out={path}: there is something that doctor did not write; give another out=")


def try_exchange(device: str, cards: Sequence[str], place: Path, environ: Mapping[str, str]) -> Finding:
    """A sum over one process a card, through the launcher of runs.

    Args:
        device: gpu; cpu in tests, with gloo in the place of NCCL.
        cards: their names; of a CPU only their number counts.
        place: for the launcher's logs.
        environ: of the processes.
    """
    environ = dict(environ)
    spare_shared_memory(environ, shared_memory_room())
    launcher = ["-m", "train.door.ranks", device, "--nproc_per_node", str(len(cards)), "--log_dir", str(place / "log")]
    launcher += ["--log_level", "WARNING", "--enable_gpu_log", "False"]
    launcher += ["--devices", ",".join(cards)] if device == "gpu" else []
    command = [sys.executable, *launcher, *_command(["train.door.exchange", device])]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_EXCHANGE_PATIENCE)
        code, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        code, said = -9, f"{_text(late.stdout)}\nno end in {_EXCHANGE_PATIENCE} seconds"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if code:
        last = lines[-1][:300] if lines else f"exit code {code}"
        words = f"{len(cards)} cards do not sum: {last}; does NCCL_P2P_DISABLE=1 help? NCCL_DEBUG=INFO tells more"
        return Finding(part="exchange", words=words, code=COMPUTING)
    told = next((line for line in lines if "GB/s" in line), "")
    return Finding(part="exchange", words=f"the sum is right; {told}")


def _compute(device: str, place: Path, environ: Mapping[str, str], details: dict[str, Any]) -> list[Finding]:
    """Kernels on the device; a trial there and one in float32 on the CPU, at the same time."""
    facts, found = try_kernels(device, environ)
    details["build"] = facts
    if not facts:
        return found
    half = "fp16" if facts.get("capability", [8])[0] < 8 else "bf16"
    trials = {name: place / name for name in ("device", "reference")}
    processes = {}
    for (name, folder), (where, precision) in zip(trials.items(), ((device, half), ("cpu", "fp32")), strict=True):
        folder.mkdir()
        processes[name] = _start(["train.door.trial", str(folder), where, precision], environ, folder / "said.txt")
    results: dict[str, Trial] = {}
    for name, process in processes.items():
        folder = trials[name]
        try:
            code = process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code == 0:
            results[name] = read_trial(folder)
            continue
        said = (folder / "said.txt").read_text("utf-8", "replace").strip()
        details[f"trial of the {name}"] = said[-8000:]
        where = f"{device.upper()} in {half}" if name == "device" else "CPU in fp32"
        last = said.splitlines()[-1] if said else ""
        found.append(Finding(part="training", words=f"{where}: exit code {code}: {last[:300]}", code=COMPUTING))
    if len(results) == 2:
        details["trials"] = {name: vars(result) for name, result in results.items()}
        found += compare(results["device"], results["reference"], f"{device.upper()} in {half}")
    return found


def try_kernels(device: str, environ: Mapping[str, str]) -> tuple[dict[str, Any], list[Finding]]:
    """Run `train.door.kernels`, again after a kernel that took its process down.

    Returns:
        (what it tells of Paddle's build, empty where it did not come so far; a line for the build, one for all kernels
        that are right, one for each that is not).
    """
    facts: dict[str, Any] = {}
    results: list[dict[str, Any]] = []
    said = ""
    for _ in range(_MOST_RESTARTS + 1):
        command = _command(["train.door.kernels", device, str(len(results))])
        try:
            done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_PATIENCE)
        except subprocess.TimeoutExpired as late:
            done = subprocess.CompletedProcess(command, -9, _text(late.stdout), f"no end in {_PATIENCE} seconds")
        said, trying = done.stderr.strip(), None
        for line in done.stdout.splitlines():
            fact = json.loads(line) if line.startswith("{") else {}
            if "trying" in fact:
                trying = fact["trying"]
            elif "build" in fact:
                facts = fact["build"]
            elif fact:
                results.append(fact)
                trying = None
        if trying:
            last = said.splitlines()[-1] if said else ""
            results.append({**trying, "said": f"its process ended with exit code {done.returncode}: {last[:200]}"})
        if done.returncode == 0 or not facts:
            break
    if not facts:
        last = said.splitlines()[-1] if said else f"exit code {done.returncode}"
        return {}, [Finding(part="paddle", words=last.removeprefix("error: ")[:500], code=PADDLE)]
    return facts, [_build(facts), *judge(results)]


def judge(results: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """One line for all kernels that are right, one for each that is not."""
    bad = [result for result in results if "said" in result or result["error"] > result["limit"]]
    right = len(results) - len(bad)
    found = [Finding(part="kernels", words=f"{right} of {len(results)} are right, forward and backward")]
    for result in bad:
        told = (
            result.get("said") or f"off by {result['error']:.1e} of the largest number, {result['limit']:.0e} allowed"
        )
        found.append(Finding(part="kernels", words=f"{result['kernel']} in {result['dtype']}: {told}", code=COMPUTING))
    return found


def _build(facts: Mapping[str, Any]) -> Finding:
    """What Paddle was built for, and whether the card is among it."""
    words, note = f"Paddle {facts['paddle']}", False
    if "capability" in facts:
        words += f" for CUDA {facts['cuda']}, cuDNN {facts['cudnn']}, NCCL {facts['nccl']}; it sees {facts['device']}"
        card, archs = "".join(map(str, facts["capability"])), ["".join(filter(str.isdigit, a)) for a in facts["archs"]]
        if archs and card not in archs:
            words, note = f"{words}; built for sm_{', sm_'.join(archs)}, not for sm_{card}", True
    return Finding(part="build", words=words, note=note)


def _command(work: Sequence[str]) -> list[str]:
    return [sys.executable, "-u", "-m", "train.door.cli", *work]


def _start(work: Sequence[str], environ: Mapping[str, str], said: Path) -> subprocess.Popen[bytes]:
    with said.open("wb") as file:
        return subprocess.Popen(_command(work), env=environ, stdout=file, stderr=subprocess.STDOUT)


def _text(said: bytes | str | None) -> str:
    return said.decode("utf-8", "replace") if isinstance(said, bytes) else said or ""


def _report(findings: Sequence[Finding], details: Mapping[str, Any]) -> str:
    """The file: findings, versions, the environment that matters, nvidia-smi's table, and all figures."""
    pins = read_lock()[0]
    variables = {name: value for name, value in os.environ.items() if name in _TOLD or name.startswith(_TOLD_PREFIXES)}
    parts = {
        "findings": "\n".join(map(str, findings)),
        "system": f"{platform.platform()}\nPython {platform.python_version()}\n{sys.executable}",
        "versions of the lock": json.dumps({name: sorted(pins[name]) for name in ("paddlepaddle", "paddlenlp")}),
        "environment": "\n".join(f"{name}={value}" for name, value in sorted(variables.items())),
        "nvidia-smi": driver_report() or "missing, or it fails",
        "figures": json.dumps(details, indent=1, default=str),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items()) + "\n"
