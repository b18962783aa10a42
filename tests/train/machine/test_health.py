"""What `doctor` says of a machine: one line each, and exit codes told apart. The driver is a stub."""

import pytest

from train.machine import environment, health
from train.machine.devices import find_machine
from train.machine.health import CARD, DRIVER, PADDLE, look_at_machine

UUIDS = ("GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77", "GPU-c8f2c6bc-52a3-7e6a-8d53-0f2d9b7a9b10")
MIG = "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f"


class Driver:
    """nvidia-smi of a machine with some cards: (name, capability, free MiB)."""

    def __init__(self, *cards, cuda="12.4", instances=()):
        self.cards, self.cuda, self.instances = cards, cuda, instances

    def listing(self) -> str:
        lines = []
        for index, (name, _, _) in enumerate(self.cards):
            lines.append(f"GPU {index}: {name} (UUID: {UUIDS[index]})")
            lines += [f"  MIG 3g.20gb     Device  {i}: (UUID: {name})" for i, name in enumerate(self.instances)]
        return "\n".join(lines) + "\n"

    def report(self) -> str:
        return f"| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: {self.cuda}     |"

    def smi(self, query, *_) -> str:
        fields = query.removeprefix("--query-gpu=").split(",")
        rows = []
        for index, (_, capability, free) in enumerate(self.cards):
            facts = {"index": index, "compute_cap": capability, "memory.free": free, "memory.total": 40960}
            rows.append(", ".join(str(facts[field]) for field in fields))
        return "\n".join(rows) + "\n"


A100, SECOND = ("NVIDIA A100-SXM4-40GB", "8.0", 40000), ("NVIDIA A100-SXM4-40GB", "8.0", 39000)


@pytest.fixture
def look(monkeypatch, tmp_path):
    """look(driver, "paddlepaddle-gpu", visible=...): the findings that are not all right, as (part, code, words)."""

    def look(driver, *paddles, visible=None, device="auto", files=0):
        monkeypatch.setattr(environment, "installed", lambda name: "3.3.1" if name in paddles else None)
        monkeypatch.setattr("train.machine.devices.installed", environment.installed)
        monkeypatch.setattr("train.machine.devices.detect_build", lambda: "cu126")
        monkeypatch.setattr(health, "shared_memory_room", lambda: 10**11)
        for number in range(files):
            (tmp_path / f"nvidia{number}").touch()
        environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        machine = find_machine(environ, driver.listing if driver else lambda: None, str(tmp_path / "nvidia*"))
        smi, report = (driver.smi, driver.report) if driver else (lambda *_: None, lambda: None)
        found = look_at_machine(machine, device, environ, smi, report)
        assert all(len(str(line).splitlines()) == 1 for line in found)
        return [
            (line.part, line.code, line.words) for line in found if (line.code or line.note) and line.part != "disk"
        ]

    return look


def test_all_is_well(look):
    assert look(Driver(A100, SECOND), "paddlepaddle-gpu") == []
    assert look(None, "paddlepaddle") == []  # no card, and a CPU build


def test_driver_too_old(look):
    ((part, code, words),) = look(Driver(A100, cuda="11.4"), "paddlepaddle-gpu")
    assert (part, code) == ("driver", DRIVER)
    assert words == "the NVIDIA driver runs CUDA 11.4 at most; Paddle needs 11.8: update it"


def test_device_files_without_a_driver(look, monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    ((part, code, words),) = look(None, "paddlepaddle-gpu", files=8)
    assert (part, code) == ("driver", DRIVER)
    assert words.startswith("8 device files, but nvidia-smi is missing: in a container start it with -e NVIDIA_DRIVER")


@pytest.mark.parametrize(
    ("driver", "paddles", "words"),
    [
        (Driver(A100), ["paddlepaddle"], "this machine has 1 NVIDIA GPU, but Paddle is a CPU build: `"),
        (
            None,
            ["paddlepaddle-gpu"],
            "Paddle is a GPU build, but no NVIDIA GPU is to be seen here: start the container",
        ),
        (Driver(A100), ["paddlepaddle", "paddlepaddle-gpu"], "paddlepaddle and paddlepaddle-gpu are both installed"),
    ],
)
def test_wrong_paddle(look, driver, paddles, words):
    ((part, code, said),) = look(driver, *paddles)
    assert (part, code) == ("paddle", PADDLE)
    assert said.startswith(words) and "pip uninstall -y paddlepaddle paddlepaddle-gpu && " in said


def test_old_card(look):
    """No fault: it computes in float16."""
    ((part, code, words),) = look(Driver(("Tesla V100-SXM2-32GB", "7.0", 30000)), "paddlepaddle-gpu")
    assert (part, code) == ("card", 0)
    assert words == (
        "GPU 0: Tesla V100-SXM2-32GB, compute capability 7.0, 31.46 GB of 42.95 GB free; "
        "it has no bfloat16: give precision=fp16"
    )


def test_one_of_two_cards_is_busy(look):
    busy = Driver(A100, ("NVIDIA A100-SXM4-40GB", "8.0", 51))
    ((part, code, words),) = look(busy, "paddlepaddle-gpu")
    assert (part, code) == ("card", CARD)
    assert words.endswith(
        "53.5 MB of 42.95 GB free; other processes fill it (nvidia-smi names them): end them, or leave it out "
        "with CUDA_VISIBLE_DEVICES=0"
    )
    for left in ("0", UUIDS[0]):
        assert look(busy, "paddlepaddle-gpu", visible=left) == []
    assert [code for _, code, _ in look(busy, "paddlepaddle-gpu", visible=UUIDS[1][:9])] == [CARD]


@pytest.mark.parametrize(
    ("visible", "notes"),
    [
        ("", ["CUDA_VISIBLE_DEVICES= hides every GPU; unset it to take them"]),
        ("-1", ["CUDA_VISIBLE_DEVICES=-1 hides every GPU; unset it to take them"]),
        ("0,1", []),
        (",".join(UUIDS), []),
        ("0,7,1", ["CUDA_VISIBLE_DEVICES=0,7,1: no card is called 7, CUDA reads up to 0"]),
        (
            f"{UUIDS[1]},GPU-0",
            [f"CUDA_VISIBLE_DEVICES={UUIDS[1]},GPU-0: no card is called GPU-0, CUDA reads up to {UUIDS[1]}"],
        ),
    ],
)
def test_visible_devices(look, visible, notes):
    assert look(Driver(A100, SECOND), "paddlepaddle-gpu", visible=visible) == [("visible", 0, note) for note in notes]


def test_instances_of_a_card(look):
    """nvidia-smi tells nothing of an instance's memory, and 0 of the card's."""
    cut = Driver(("NVIDIA A100-SXM4-40GB", "8.0", 0), instances=(MIG,))
    assert look(cut, "paddlepaddle-gpu") == []
    assert look(cut, "paddlepaddle-gpu", visible=MIG) == []
    ((part, _, words),) = look(cut, "paddlepaddle-gpu", visible="MIG-0")
    assert (part, words) == ("visible", "CUDA_VISIBLE_DEVICES=MIG-0 hides every GPU; unset it to take them")


def test_little_shared_memory(look, monkeypatch):
    """It is only for cards that talk to each other."""
    for cards, notes in (([A100, SECOND], 1), ([A100], 0)):
        driver = Driver(*cards)
        found = look(driver, "paddlepaddle-gpu")
        assert found == []
        monkeypatch.setattr(health, "shared_memory_room", lambda: 64 * 2**20)
        machine = find_machine({}, driver.listing, "none")
        found = look_at_machine(machine, "auto", {}, driver.smi, driver.report)
        assert sum("--shm-size=1g" in line.words and line.note for line in found) == notes
