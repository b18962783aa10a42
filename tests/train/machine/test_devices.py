"""What counts as a GPU, and when a GPU that cannot be used is an error."""

import os

import pytest

from train.door.launch import prepare
from train.machine.devices import Machine, choose_device, find_machine, gpu_fault, physical_cores
from train.machine.environment import detect_build, driver_report

# Two GPUs, the first of them cut into instances, and a process.
SMI = """\
| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
|   0  NVIDIA A100-SXM4-40GB          On  |   00000000:07:00.0 Off |                   On |
| N/A   29C    P0             43W /  400W |      87MiB /  40960MiB |     N/A      Default |
|   1  NVIDIA A100-SXM4-40GB          On  |   00000000:BD:00.0 Off |                    0 |
|  0    7   0   0  |              37MiB /  4864MiB    | 14      0 |  1   0    0    0    0 |
|    1   N/A  N/A      1234      C   python                                         430MiB |
"""


def smi():
    return SMI


def no_smi():
    return None


def test_find_machine(tmp_path):
    nothing = str(tmp_path / "nvidia[0-9]*")
    assert find_machine({}, no_smi, nothing) == Machine(gpus=0)
    assert find_machine({}, smi, nothing).gpus == 2
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    found = find_machine({"CUDA_VISIBLE_DEVICES": "0"}, no_smi, nothing)
    assert (found.gpus, found.driver, found.visible, found.usable_gpus) == (1, None, ("0",), 1)


@pytest.mark.parametrize(
    ("value", "hidden", "usable"), [("", True, 0), ("-1", True, 0), ("0,1", False, 2), (None, False, 2)]
)
def test_visible_devices(value, hidden, usable, tmp_path):
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    machine = find_machine(environ, smi, str(tmp_path / "none"))
    assert (machine.hidden, machine.usable_gpus) == (hidden, usable)


def test_driver_fault_is_an_error():
    machine = Machine(gpus=2, driver=None, gpu_paddle=True)
    with pytest.raises(ValueError, match=r"has 2 NVIDIA GPUs, but nvidia-smi is missing or fails.*driver.*device=cpu"):
        choose_device("auto", machine)
    assert choose_device("cpu", machine) == "cpu"


def test_cpu_build_is_an_error_with_the_line_that_mends_it(monkeypatch):
    monkeypatch.setattr("train.machine.devices.detect_build", lambda: "cu126")
    machine = Machine(gpus=1, driver=SMI, gpu_paddle=False)
    with pytest.raises(ValueError, match=r"Paddle is a CPU build: `.* paddlepaddle-gpu==3\S+ -i https://\S*/cu126/`"):
        choose_device("gpu", machine)
    assert "uninstall -y paddlepaddle &&" in gpu_fault(machine)


def test_gpu_that_works():
    assert choose_device("auto", Machine(gpus=1, driver=SMI, gpu_paddle=True)) == "gpu"
    assert choose_device("cpu", Machine(gpus=1, driver=SMI, gpu_paddle=True)) == "cpu"


def test_no_gpu():
    assert choose_device("auto", Machine(gpus=0)) == "cpu"
    with pytest.raises(ValueError, match="device=gpu, but no NVIDIA GPU found"):
        choose_device("gpu", Machine(gpus=0))


def test_hidden_gpu():
    machine = Machine(gpus=1, driver=SMI, gpu_paddle=True, visible=())
    assert choose_device("auto", machine) == "cpu"
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES hides every GPU"):
        choose_device("gpu", machine)


def test_nvidia_smi_is_asked_once(tmp_path, monkeypatch):
    """It takes up to seconds, and a start called it ten times."""
    asked = tmp_path / "asked"
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho \"asked: $@\" >> {asked}\necho '{SMI}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    driver_report.cache_clear()
    try:
        prepare("train", ["conf=sft_tiny", "device=cpu", "run_dir=nowhere"])
        assert find_machine().gpus == 2
        assert detect_build() == "cu126"
    finally:
        driver_report.cache_clear()
    assert asked.read_text() == "asked: \n"


def test_physical_cores():
    assert 1 <= physical_cores() <= len(os.sched_getaffinity(0))
