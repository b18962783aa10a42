"""What counts as a GPU, and when a GPU that cannot be used is an error."""

import os
import subprocess

import pytest

from train.ask.load import load
from train.config.schema import TrainConfig
from train.door.launch import prepare
from train.machine import devices, environment
from train.machine.devices import (
    Machine,
    check_precision,
    check_room,
    choose_device,
    find_machine,
    gpu_fault,
    physical_cores,
    use_device,
)
from train.machine.environment import card_listing, detect_build, driver_report
from train.machine.memory import FreeMemory
from train.run.training import train

# Two cards as `nvidia-smi -L` lists them, the first of them cut into two instances.
FIRST, SECOND = "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77", "GPU-c8f2c6bc-52a3-7e6a-8d53-0f2d9b7a9b10"
LISTING = f"""\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: {FIRST})
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 3g.20gb     Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: {SECOND})
"""
TABLE = "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4     |"


def listing():
    return LISTING


def no_listing():
    return None


def test_nvidia_smi_decides_when_it_works(tmp_path):
    """A container that may use one of eight cards has the device files of all eight: a run took eight processes."""
    files = str(tmp_path / "nvidia[0-9]*")
    assert find_machine({}, no_listing, files).gpus == 0
    for number in range(8):
        (tmp_path / f"nvidia{number}").touch()
    (tmp_path / "nvidiactl").touch()
    assert find_machine({}, lambda: LISTING.split("GPU 1")[0], files).usable_gpus == 1
    assert find_machine({}, listing, files).gpus == 2
    broken = find_machine({"CUDA_VISIBLE_DEVICES": "0"}, no_listing, files)
    assert (broken.gpus, broken.driver, broken.visible) == (8, None, ("0",))


@pytest.mark.parametrize(
    ("value", "visible"),
    [
        (None, None),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("0,1", ("0", "1")),
        (" 1 , 0", ("1", "0")),
        ("0,-1,1", ("0",)),  # CUDA reads up to the first name that no card has
        ("0,2,1", ("0",)),
        (SECOND, (SECOND,)),
        (f"{SECOND[:12]},{FIRST}", (SECOND[:12], FIRST)),  # the beginning of a UUID will do
        ("GPU-00000000,1", ()),
        ("MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb", ("MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb",)),
        (f"MIG-{FIRST}/7/0", (f"MIG-{FIRST}/7/0",)),  # as drivers before 470 call an instance
        ("MIG-00000000-0000", ()),
    ],
)
def test_visible_devices(value, visible, tmp_path):
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    machine = find_machine(environ, listing, str(tmp_path / "none"))
    assert machine.visible == visible
    assert machine.hidden == (visible == ())
    assert machine.usable_gpus == (2 if visible is None else len(visible))


def test_names_are_believed_where_nvidia_smi_does_not_tell(tmp_path):
    (tmp_path / "nvidia0").touch()
    machine = find_machine({"CUDA_VISIBLE_DEVICES": f"7,{FIRST},what,1"}, no_listing, str(tmp_path / "nvidia*"))
    assert machine.visible == ("7", FIRST)


def test_missing_nvidia_smi_is_an_error(monkeypatch):
    """A container without the driver's `utility` capability has a GPU, and nothing that tells of it."""
    machine = Machine(gpus=2, driver=None, gpu_paddle=True)
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"2 NVIDIA GPUs, but nvidia-smi is missing: .*=compute,utility.*device=cpu"):
        choose_device("auto", machine)
    assert choose_device("cpu", machine) == "cpu"


def test_failing_nvidia_smi_is_an_error_with_its_words(monkeypatch):
    said = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.54\n"
    monkeypatch.setattr(environment.shutil, "which", lambda name: name)
    done = subprocess.CompletedProcess([], 18, stdout=said, stderr="")
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(ValueError, match=r"nvidia-smi fails \(Failed .* mismatch\): reload .* or give device=cpu"):
        choose_device("auto", Machine(gpus=1, driver=None, gpu_paddle=True))


def test_cpu_build_is_an_error_with_the_line_that_mends_it(monkeypatch):
    monkeypatch.setattr(devices, "detect_build", lambda: "cu126")
    machine = Machine(gpus=1, driver=LISTING, gpu_paddle=False)
    for device in ("auto", "gpu"):
        with pytest.raises(
            ValueError, match=r"Paddle is a CPU build: `.* paddlepaddle-gpu==3\S+ -i https://\S*/cu126/`"
        ):
            choose_device(device, machine)
    assert "uninstall -y paddlepaddle paddlepaddle-gpu &&" in gpu_fault(machine)


def test_gpu_build_without_a_gpu_is_an_error():
    """As in a Docker image that was started without --gpus: it began a rehearsal."""
    machine = Machine(gpus=0, gpu_paddle=True)
    with pytest.raises(ValueError, match=r"no NVIDIA GPU is to be seen here: start the container with --gpus all, or"):
        choose_device("auto", machine)
    assert choose_device("cpu", machine) == "cpu"
    assert choose_device("auto", Machine(gpus=0, gpu_paddle=True, visible=())) == "cpu"  # turned off on purpose


def test_two_paddles_are_an_error_whatever_the_device(monkeypatch):
    """Each has overwritten files of the other: what is imported is neither."""
    monkeypatch.setattr(devices, "detect_build", lambda: "cu126")
    both = {"paddlepaddle": "3.3.1", "paddlepaddle-gpu": "3.3.1"}
    monkeypatch.setattr(environment, "installed", both.get)
    machine = find_machine({}, listing, "none")
    for device in ("auto", "cpu", "gpu"):
        with pytest.raises(
            ValueError, match=r"both installed.*`.* uninstall -y paddlepaddle paddlepaddle-gpu && .*126/`"
        ):
            choose_device(device, machine)
    with pytest.raises(ValueError, match=r"&& \S+ -m pip install paddlepaddle==[\d.]+`$"):
        choose_device("auto", find_machine({}, lambda: "", "none"))
    assert environment.TWO_PADDLES in environment.active_faults()


def test_gpu_that_works():
    assert choose_device("auto", Machine(gpus=1, driver=LISTING, gpu_paddle=True)) == "gpu"
    assert choose_device("cpu", Machine(gpus=1, driver=LISTING, gpu_paddle=True)) == "cpu"


def test_no_gpu():
    assert choose_device("auto", Machine(gpus=0)) == "cpu"
    with pytest.raises(ValueError, match="device=gpu, but no NVIDIA GPU found"):
        choose_device("gpu", Machine(gpus=0))


def test_hidden_gpu():
    machine = Machine(gpus=1, driver=LISTING, gpu_paddle=True, visible=())
    assert choose_device("auto", machine) == "cpu"
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES hides every GPU"):
        choose_device("gpu", machine)


def test_full_card_is_an_error_that_names_an_emptier_one():
    def free(num_bytes):
        return lambda index: FreeMemory(num_bytes=num_bytes, where="GPU 0, by nvidia-smi")

    check_room(0, free(2 * 10**9), dict)
    check_room(0, lambda index: None, dict)  # a MIG instance, of which nvidia-smi does not tell
    with pytest.raises(
        ValueError, match=r"has 50\.0 MB free .* take card 1, with 40\.00 GB \(CUDA_VISIBLE_DEVICES=1\)"
    ):
        check_room(0, free(5 * 10**7), lambda: {0: 5 * 10**7, 1: 4 * 10**10})
    with pytest.raises(ValueError, match=r"nvidia-smi names them; end them, or give device=cpu"):
        check_room(0, free(5 * 10**7), lambda: {0: 5 * 10**7})


@pytest.fixture
def card(monkeypatch):
    """A GPU with this compute capability, as Paddle would tell of it; returns what was switched."""
    switched = {}

    def see(major, minor):
        monkeypatch.setattr(devices, "find_machine", lambda: Machine(gpus=1, driver=LISTING, gpu_paddle=True))
        monkeypatch.setattr(devices, "free_gpu_memory", lambda index: None)
        monkeypatch.setattr(devices, "check_room", lambda index: None)
        monkeypatch.setattr("paddle.device.cuda.device_count", lambda: 1)
        monkeypatch.setattr("paddle.set_device", lambda name: switched.update(device=name))
        monkeypatch.setattr("paddle.get_device", lambda: "gpu:0")
        monkeypatch.setattr("paddle.device.get_device", lambda: "gpu:0")
        monkeypatch.setattr("paddle.device.cuda.get_device_capability", lambda: (major, minor))
        monkeypatch.setattr("paddle.device.cuda.get_device_name", lambda: "Tesla V100")
        for library in ("cublas", "cudnn"):
            monkeypatch.setattr(
                f"paddle.base.core.set_{library}_switch", lambda on, library=library: switched.update({library: on})
            )
        return switched

    return see


def test_float32_keeps_its_digits(card):
    """Paddle multiplies float32 in TF32 by default: logits move by 3.5e-4, where an export's check allows 1e-4."""
    switched = card(8, 0)
    assert use_device("auto") == "gpu:0"
    assert switched == {"device": "gpu:0", "cublas": False, "cudnn": False}
    use_device("auto", tf32=True)
    assert switched == {"device": "gpu:0", "cublas": True, "cudnn": True}


def test_a_fixed_order_is_for_who_asks(card, monkeypatch):
    """Resuming was bit for bit on a CPU only: a GPU's flash attention and embedding add gradients up in any order."""
    card(8, 0)
    flags: dict[str, object] = {}
    monkeypatch.setattr("paddle.set_flags", flags.update)
    use_device("auto")
    assert flags == {}
    use_device("auto", deterministic=True)
    assert flags == {"FLAGS_cudnn_deterministic": True, "FLAGS_embedding_deterministic": 1}


def test_a_run_asks_for_its_order(monkeypatch):
    asked: dict[str, object] = {}

    def use(device: str, **options: object) -> None:
        asked.update(options)
        raise InterruptedError

    monkeypatch.setattr("train.run.training.use_device", use)
    with pytest.raises(InterruptedError):
        train(TrainConfig(deterministic=True))
    assert asked == {"tf32": False, "deterministic": True}


def test_a_cpu_has_a_fixed_order_anyway(monkeypatch):
    """Its build does not know these flags."""
    monkeypatch.setattr("paddle.set_flags", lambda flags: pytest.fail("set"))
    assert use_device("cpu", deterministic=True) == "cpu"


def test_bfloat16_on_an_old_card_is_refused_before_anything_is_loaded(card, monkeypatch):
    """The weights were loaded, and the first product failed with "cublas bf16 gemm requires ... >= 80"."""
    card(7, 0)
    with pytest.raises(ValueError, match=r"Tesla V100\) has compute capability 7\.0, .* needs 8\.0 .*precision=fp16$"):
        check_precision("bfloat16")
    check_precision("float16")
    check_precision("float32")
    monkeypatch.setattr("train.ask.load.resolve_model", lambda path: pytest.fail("it was fetched"))
    with pytest.raises(ValueError, match="give precision=fp16"):
        load("deepseek-ai/deepseek-vl2-tiny")  # precision=auto
    card(8, 9)
    check_precision("bfloat16")


def test_stored_bfloat16_is_refused_before_loading(card, monkeypatch, golden_folder, tmp_path):
    """`precision=auto` of a folder takes the type of its files."""
    card(7, 5)
    monkeypatch.setattr("train.ask.load.stored_dtype", lambda folder: "bfloat16")
    monkeypatch.setattr("train.ask.load.load_model", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"7\.5, .*give precision=fp16"):
        load(golden_folder("nano_tiny"))


def test_training_refuses_bfloat16_before_it_looks_at_anything(card, monkeypatch, tmp_path):
    from train.config.load import load_config
    from train.run import training

    card(7, 0)
    monkeypatch.setattr(training, "hold_run_dir", lambda folder: pytest.fail("it went on"))
    machine = Machine(gpus=1, driver=LISTING, gpu_paddle=True)
    config = load_config(["conf=sft_tiny", f"run_dir={tmp_path / 'run'}"], machine)
    with pytest.raises(ValueError, match="give precision=fp16"):
        training.train(config)
    assert not (tmp_path / "run").exists()


def test_nvidia_smi_is_asked_once(tmp_path, monkeypatch):
    """It takes up to seconds, and a start called it ten times. Set-up, another process, reads the table."""
    asked = tmp_path / "asked"
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\necho \"asked: $@\" >> {asked}\ncase \"$1\" in -L) echo '{LISTING}';; *) echo '{TABLE}';; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    for probe in (card_listing, driver_report):
        probe.cache_clear()
    try:
        prepare("train", ["conf=sft_tiny", "device=cpu", "run_dir=nowhere"])
        assert find_machine().gpus == 2
        assert asked.read_text() == "asked: -L\n"
        assert detect_build() == "cu126"
    finally:
        for probe in (card_listing, driver_report):
            probe.cache_clear()
    assert asked.read_text() == "asked: -L\nasked: \n"


def test_physical_cores():
    assert 1 <= physical_cores() <= len(os.sched_getaffinity(0))
