"""`doctor`: kernels and a trial, what of them is a fault, and the file; exit codes as documented."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.places import ROOT
from tests.precision.emulation import half_precision_on_cpu
from train.door import doctor, launch
from train.door.kernels import KERNELS, TOLERANCE, Kernel, error_of, plan_trials
from train.door.trial import Trial, compare
from train.machine.devices import Machine
from train.machine.health import COMPUTING, PADDLE, Finding
from train.store.hub import hub_problem
from vl2.errors import UserError

FOUND = Trial(losses=[2.0, 1.0], grad_norms=[1.0, None], answers=["red cross", "blue star"], seconds=1.0, peak_gb=0.5)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.slow
def test_kernels_are_right_in_emulation_with_room_to_spare(kernel):
    """Each result and gradient once rounded is at most half a unit off; a card may sum in another order."""
    for dtype in ("float32", "bfloat16", "float16"):
        if (kernel, dtype) not in plan_trials(dtype if dtype != "float32" else ""):
            continue
        with half_precision_on_cpu():
            error = error_of(kernel, dtype, "cpu")
        assert error <= (TOLERANCE[dtype] if dtype == "float32" else TOLERANCE[dtype] / 4)


def test_lost_digits_of_float32_are_found():
    """TF32 keeps 10 bits of 23: 300 times what float32 is off by, and 10 times what is allowed."""
    product = KERNELS[0]

    def in_tf32(x, w):
        return product.call(*(operand.astype("float16").astype(operand.dtype) for operand in (x, w)))

    lossy = Kernel(name="lossy", shapes=product.shapes, call=in_tf32)
    assert error_of(lossy, "float32", "cpu") > 5 * TOLERANCE["float32"]


def test_what_differs_by_more_than_in_emulation_is_a_fault():
    near = replace(FOUND, losses=[2.001, 1.0])
    assert [line.code for line in compare(near, FOUND, "GPU in bf16")] == [0, 0, 0, 0]
    far = replace(FOUND, losses=[2.0, 1.02], grad_norms=[float("nan"), None], answers=["red cross", "blue"])
    lines = compare(far, FOUND, "GPU in bf16")
    assert [line.code for line in lines] == [COMPUTING, COMPUTING, COMPUTING, 0]
    assert "losses of 2 steps 2.00% off the CPU's float32" in lines[0].words
    assert lines[2].words.endswith("1 of 2 answers as in float32 on the CPU; 'blue' instead of 'blue star'")


def test_kernels_that_fail_are_named():
    results = [
        {"kernel": "product", "dtype": "float32", "error": 1e-6, "limit": 2e-5},
        {"kernel": "topk", "dtype": "bfloat16", "said": "The kernel `topk` is not registered"},
        {"kernel": "scatter", "dtype": "bfloat16", "error": 0.5, "limit": 2e-2},
    ]
    right, topk, scatter = doctor.judge(results)
    assert (right.words, right.code) == ("1 of 3 are right, forward and backward", 0)
    assert (topk.words, topk.code) == ("topk in bfloat16: The kernel `topk` is not registered", COMPUTING)
    assert scatter.words == "scatter in bfloat16: off by 5.0e-01 of the largest number, 2e-02 allowed"


@pytest.fixture
def process(monkeypatch):
    """Stands for `train.door.kernels`: a list of (lines printed, exit code), a process each; returns the commands."""
    commands = []

    def stand(*outcomes, words=""):
        left = list(outcomes)

        def run(command, **_):
            commands.append(command)
            lines, code = left.pop(0)
            return subprocess.CompletedProcess(command, code, "\n".join(map(json.dumps, lines)), words)

        monkeypatch.setattr(doctor.subprocess, "run", run)
        return commands

    return stand


BUILD = {"build": {"paddle": "3.3.1", "cuda": "12.6", "cudnn": "9.5", "nccl": "22304", "archs": ["80", "90"]}}
CARD = {"device": "Tesla T4", "capability": [7, 5]}
RIGHT = [{"kernel": "product", "dtype": "float32", "error": 0.0, "limit": 1.0}]


def test_kernel_that_takes_its_process_down_does_not_hide_the_others(process):
    trying = {"trying": {"kernel": "attention", "dtype": "bfloat16"}}
    commands = process(([BUILD, *RIGHT, trying], -6), ([BUILD, *RIGHT], 0), words="noise\nFatal: abort")
    facts, found = doctor.try_kernels("gpu", {})
    assert facts == BUILD["build"]
    assert [command[-1] for command in commands] == ["0", "2"]
    assert [line.code for line in found] == [0, 0, COMPUTING]
    assert found[1].words.startswith("2 of 3 are right")
    assert found[2].words == "attention in bfloat16: its process ended with exit code -6: Fatal: abort"


def test_build_without_the_card(process):
    process(([{"build": {**BUILD["build"], **CARD}}, *RIGHT], 0))
    build = doctor.try_kernels("gpu", {})[1][0]
    assert build.note and not build.code
    assert build.words.endswith("it sees Tesla T4; built for sm_80, sm_90, not for sm_75")


def test_paddle_that_does_not_start_is_its_fault(process):
    process(([], 2), words="error: Paddle cannot use this machine's GPU (it counts 0 GPUs): update the NVIDIA driver")
    facts, found = doctor.try_kernels("gpu", {})
    assert facts == {}
    assert [(line.part, line.code) for line in found] == [("paddle", PADDLE)]
    assert found[0].words.startswith("Paddle cannot use this machine's GPU")


@pytest.mark.parametrize("code", [0, 3, 4, 5, 6])
def test_exit_code_is_that_of_the_first_fault(code, monkeypatch, tmp_path, capsys):
    faults = [Finding(part="x", words="wrong", code=fault) for fault in {code, 6} if code]
    monkeypatch.setattr(doctor, "find_machine", lambda: Machine(gpus=0))
    monkeypatch.setattr(doctor, "hub_problem", lambda name: "")
    monkeypatch.setattr(doctor, "look_at_machine", lambda *_: [fault for fault in faults if fault.code != COMPUTING])
    computed = []

    def compute(device, place, environ, details):
        computed.append(device)
        return [fault for fault in faults if fault.code == COMPUTING]

    monkeypatch.setattr(doctor, "_compute", compute)
    assert launch.main(["doctor", f"out={tmp_path / 'd.txt'}"]) == code
    assert computed == ([] if code in (3, 4, 5) else ["cpu"])  # in vain where a fault is known
    text = (tmp_path / "d.txt").read_text()
    assert "## findings" in text and "## nvidia-smi" in text
    assert ("FAULT" in capsys.readouterr().out) == (code != 0)


def test_the_file_tells_no_secrets(monkeypatch):
    """It is for a bug report: of the environment only what decides where things run."""
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    text = doctor._report([], {})
    assert "secret" not in text and "CUDA_VISIBLE_DEVICES=" in text


def test_a_file_of_somebody_else_is_not_written_over(tmp_path):
    """It is said before minutes of work; what doctor wrote itself is replaced."""
    for name, text in (("mine.txt", "notes"), ("binary", "\0\1")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=r"there is something that doctor did not write; give another out="):
            launch.main(["doctor", f"out={tmp_path / name}"])
        assert (tmp_path / name).read_text() == text
    with pytest.raises(UserError, match=r"expected a folder, found a file"):
        doctor.check_out(tmp_path / "mine.txt" / "d.txt")
    (tmp_path / "ours.txt").write_text(doctor._report([], {}))
    doctor.check_out(tmp_path / "ours.txt")
    doctor.check_out(tmp_path / "new" / "d.txt")


def test_cards_that_do_not_reach_each_other(tmp_path, monkeypatch):
    """They wait for each other for ever; one line then, and what to try."""
    commands = []

    def run(command, **_):
        commands.append(command)
        raise subprocess.TimeoutExpired(command, 180, output=b"NCCL WARN\n")

    monkeypatch.setattr(doctor.subprocess, "run", run)
    found = doctor.try_exchange("gpu", ("2", "5"), tmp_path, {})
    assert found.code == COMPUTING
    assert found.words.startswith("2 cards do not sum: no end in 180 seconds; does NCCL_P2P_DISABLE=1 help?")
    assert "--nproc_per_node 2" in (text := " ".join(commands[0])) and "--devices 2,5 " in text


@pytest.mark.slow
def test_exchange_here(tmp_path):
    """Two processes on the CPU, through the launcher that runs take."""
    found = doctor.try_exchange("cpu", ("0", "1"), tmp_path, launch.child_environment(os.environ, 2))
    assert not found.code, found.words
    assert found.words.startswith("the sum is right; 2 processes, cpu: 64 MB at ")


def doctor_in(folder, path=""):
    """`bash launch.sh doctor`, with a folder before PATH and a hub that is out of reach."""
    path = os.pathsep.join([path, os.path.dirname(sys.executable), os.environ["PATH"]])
    environ = {**os.environ, "VENV": "none", "PATH": path, "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = ["bash", str(ROOT / "launch.sh"), "doctor", "out=d.txt"]
    return subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cuda", "code", "words"),
    [
        ("12.4", 4, "FAULT 4  paddle         this machine has 1 NVIDIA GPU, but Paddle is a CPU build: `"),
        ("11.4", 3, "FAULT 3  driver         the NVIDIA driver runs CUDA 11.4 at most; Paddle needs 11.8: update it"),
    ],
)
def test_doctor_with_a_card_that_cannot_be_used(cuda, code, words, tmp_path):
    """The driver is a stub; nothing is computed in vain."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\ncase "$1" in -L) echo "GPU 0: NVIDIA A100 (UUID: GPU-5d5b)";;\n'
        f'--query-gpu=index,m*) echo "0, 40000";; --query-gpu=index*) echo "0, 8.0, 40960";;\n'
        f'--query*) echo 8.0;; *) echo "Driver Version: 470.1  CUDA Version: {cuda}";; esac\n'
    )
    smi.chmod(0o755)
    done = doctor_in(tmp_path, str(tmp_path))
    assert done.returncode == code, done.stdout + done.stderr
    assert [line[: len(words)] for line in done.stdout.splitlines() if line.startswith("FAULT")] == [words]
    assert "GPU 0: NVIDIA A100, compute capability 8.0, 41.94 GB of 42.95 GB free" in done.stdout
    assert done.stdout.splitlines()[-1] == f"faults were found: exit code {code}; d.txt has all of it"


@pytest.mark.slow
def test_doctor_here(tmp_path):
    """On a machine without a card: all of it, on the CPU."""
    done = doctor_in(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "all is well; d.txt has all of it"
    assert {"driver", "paddle", "memory", "disk", "hub", "build", "kernels", "training", "answering"} <= {
        line[9:23].strip() for line in lines[:-1]
    }
    assert f"{len(KERNELS)} of {len(KERNELS)} are right" in done.stdout and "4 of 4 answers" in done.stdout
    figures = json.loads((tmp_path / "d.txt").read_text().split("## figures\n")[1])
    device, reference = (figures["trials"][name] for name in ("device", "reference"))
    assert len(device["losses"]) == 3 and device["losses"] == pytest.approx(reference["losses"], rel=1e-3)


def test_a_hub_out_of_reach_is_said_in_one_cause(monkeypatch):
    """It was 300 characters of three libraries' texts one inside the other, cut in the middle of a name."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert hub_problem("owner/name") == "http://127.0.0.1:9: ConnectionRefusedError: [Errno 111] Connection refused"
