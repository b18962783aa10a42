"""Free memory and disk as the system tells them, and refusals with both figures."""

import shutil
from pathlib import Path

import pytest

from train.machine.disk import check_disk
from train.machine.memory import FreeMemory, check_memory, free_gpu_memory, free_ram, gigabytes
from vl2.errors import UserError


def system(root: Path, available_kb: int, cgroup: str, **files: str) -> Path:
    """A file system with /proc and /sys; `files` by path with __ for /."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available_kb} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_available_ram(tmp_path):
    assert free_ram(system(tmp_path, 2000, "0::/\n")) == FreeMemory(num_bytes=2_048_000, where="RAM, MemAvailable")
    assert free_ram(tmp_path / "nowhere") is None
    here = free_ram()
    assert here is not None and 10**8 < here.num_bytes < 10**13


def test_container_of_version_2_grants_less(tmp_path):
    """The limit may stand in a group above; pages of files that nobody uses are no obstacle."""
    root = system(
        tmp_path,
        8_000_000,
        "0::/pod/task\n",
        pod__task__memory_dot_max="max\n",
        pod__memory_dot_max="3000000000\n",
        pod__memory_dot_current="2500000000\n",
        pod__memory_dot_stat="anon 5\ninactive_file 200000000\nactive_file 1\n",
    )
    room = free_ram(root)
    assert room == FreeMemory(num_bytes=700_000_000, where="RAM, limit 3.00 GB of the container")


def test_container_of_version_1_grants_less(tmp_path):
    root = system(
        tmp_path,
        8_000_000,
        "5:cpu:/a\n4:memory:/a/b\n0::/\n",
        memory__a__b__memory_dot_limit_in_bytes="1000000000",
        memory__a__b__memory_dot_usage_in_bytes="400000000",
        memory__memory_dot_limit_in_bytes="9223372036854771712",
        memory__memory_dot_usage_in_bytes="1",
    )
    assert free_ram(root) == FreeMemory(num_bytes=600_000_000, where="RAM, limit 1.00 GB of the container")


def test_free_memory_of_a_gpu():
    asked = []

    def smi(*arguments):
        asked.append(arguments)
        return "23456\n"

    room = free_gpu_memory(1, {"CUDA_VISIBLE_DEVICES": "3,GPU-abc"}, smi)
    assert room == FreeMemory(num_bytes=23456 * 2**20, where="GPU GPU-abc, by nvidia-smi")
    assert asked == [("-i", "GPU-abc", "--query-gpu=memory.free", "--format=csv,noheader,nounits")]
    assert free_gpu_memory(0, {}, smi).where == "GPU 0, by nvidia-smi"
    assert free_gpu_memory(0, {}, lambda *arguments: None) is None
    assert free_gpu_memory(0, {}, lambda *arguments: "[N/A]\n") is None


def test_too_little_memory_is_said_with_both_figures():
    room = FreeMemory(num_bytes=24 * 10**9, where="RAM, MemAvailable")
    check_memory(24 * 10**9, "it", "go", room)
    with pytest.raises(UserError) as error:
        check_memory(24 * 10**9 + 1, "X takes 30 GB", "take less", room)
    assert str(error.value) == (
        "no room in memory: X takes 30 GB, 24.00 GB at the least, and 24.00 GB are available (RAM, MemAvailable); "
        "take less"
    )


def test_too_little_disk_is_said_with_both_figures(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_disk(tmp_path / "not" / "there", free // 2, "it")
    with pytest.raises(ValueError, match=r"no room on the disk: it takes 1000000\.00 GB, \d+\.\d\d GB are free"):
        check_disk(tmp_path / "not" / "there", 10**15, "it")


def test_bytes_in_words():
    assert (gigabytes(6_741_002_880), gigabytes(4_583_772)) == ("6.74 GB", "4.6 MB")
