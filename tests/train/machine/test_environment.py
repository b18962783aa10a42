"""Which Paddle is installed, and when. Nothing is downloaded: `create` and `install` are replaced."""

import errno
import subprocess
import sys
from types import SimpleNamespace

import pytest

from train.machine import environment


def smi(cuda):
    return f"| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: {cuda}     |"


@pytest.mark.parametrize(
    ("cuda", "capabilities", "build"),
    [
        ("11.8", None, "cu118"),
        ("12.2", "8.0", "cu126"),  # any driver for CUDA 12 runs a build for 12.6
        ("12.8", "8.0", "cu126"),
        ("12.9", "9.0", "cu129"),
        ("13.0", "9.0\n12.0", "cu130"),
        ("13.0", "7.0", "cu126"),  # a V100 with a new driver: later builds leave it out
    ],
)
def test_build_for_a_driver(cuda, capabilities, build):
    assert environment.paddle_build(smi(cuda), capabilities) == build


def test_no_driver_and_old_driver():
    assert environment.paddle_build(None) == "cpu"
    with pytest.raises(ValueError, match=r"runs CUDA 11.4 at most; Paddle needs 11.8: update it"):
        environment.paddle_build(smi("11.4"))


def test_old_driver_has_an_exit_code_of_its_own(monkeypatch, tmp_path, capsys):
    """`doctor`'s for the driver: it cannot start where no build of Paddle can be installed."""
    monkeypatch.setattr(environment, "driver_report", lambda: smi("11.4"))
    monkeypatch.setattr(environment.sys, "argv", ["environment.py", str(tmp_path / "venv")])
    assert environment.main() == 3
    assert capsys.readouterr().err == (
        "error: the NVIDIA driver runs CUDA 11.4 at most; Paddle needs 11.8: update it\n"
    )


def test_cards_are_asked_for_where_they_decide(monkeypatch):
    """Each call of nvidia-smi may take seconds, and only builds for CUDA 12.9 and later leave cards out."""
    asked = []
    monkeypatch.setattr(environment, "nvidia_smi", lambda *arguments: asked.append(arguments) or "7.0\n")
    monkeypatch.setattr(environment, "driver_report", lambda: smi("12.4"))
    assert (environment.detect_build(), asked) == ("cu126", [])
    monkeypatch.setattr(environment, "driver_report", lambda: smi("13.0"))
    assert (environment.detect_build(), len(asked)) == ("cu126", 1)


def test_setting_up_on_nfs(log, tmp_path, nfs):
    """NFS refuses to lock what is open for reading only, and a checkout's files may not be ours to write."""
    environment.LOCK.chmod(0o444)
    before = environment.LOCK.read_bytes()
    environment.ensure(tmp_path / "venv")
    assert nfs == [str(tmp_path / "venv.lock")]
    assert environment.LOCK.read_bytes() == before
    assert log


def test_setting_up_without_locks(log, tmp_path, monkeypatch, capsys):
    """Lustre without -o flock, and folders that nobody may write to: the environment is made all the same."""

    def no_locks(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(environment.fcntl, "flock", no_locks)
    assert environment.ensure(tmp_path / "venv").exists()
    assert "venv.lock: not locked (Function not implemented)" in capsys.readouterr().err


def test_lock_pins_what_the_repository_needs():
    pins, direct = environment.read_lock()
    assert len(pins) > 100
    assert {"paddlepaddle", "paddlenlp", "datasets", "pillow", "wandb", "hydra-core", "numpy"} <= direct
    assert pins["paddlenlp"] == {"3.0.0b4"}
    assert "pytest" in pins
    assert "pytest" not in direct


def test_wheel_comes_from_paddles_own_index():
    (version,) = environment.read_lock()[0]["paddlepaddle"]
    wheel = environment.paddle_wheel("cu126")
    assert wheel == [f"paddlepaddle-gpu=={version}", "-i", "https://www.paddlepaddle.org.cn/packages/stable/cu126/"]


@pytest.fixture
def log(tmp_path, monkeypatch):
    """What `ensure` did to tmp_path/venv: recorded, not done."""
    done = []
    lock = tmp_path / "requirements.lock"
    lock.write_text("numpy==1.26.4\n    # via x (pyproject.toml)\npaddlepaddle==3.3.1\n")
    monkeypatch.setattr(environment, "LOCK", lock)
    monkeypatch.setattr(environment, "detect_build", lambda: "cpu")

    def create(folder):
        done.append("create")
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        (folder / "bin" / "python").unlink(missing_ok=True)
        (folder / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(environment, "create", create)
    monkeypatch.setattr(environment, "run", lambda command: done.append(" ".join(command)))
    return done


def test_installs_once(log, tmp_path):
    assert environment.ensure(tmp_path / "venv") == tmp_path / "venv" / "bin" / "python"
    assert log[0] == "create"
    assert log[1].endswith(f"--no-deps -r {tmp_path / 'requirements.lock'}")
    assert len(log) == 2
    environment.ensure(tmp_path / "venv")
    assert len(log) == 2


def test_installs_again_when_the_lock_changed(log, tmp_path):
    environment.ensure(tmp_path / "venv")
    with open(tmp_path / "requirements.lock", "a") as lock:
        lock.write("tqdm==4.70.1\n")
    environment.ensure(tmp_path / "venv")
    assert [step.split()[0] for step in log].count("create") == 1
    assert len(log) == 3


def test_interrupted_install_is_done_again(log, tmp_path, monkeypatch):
    def interrupted(command):
        raise subprocess.CalledProcessError(130, command)

    with monkeypatch.context() as patch:
        patch.setattr(environment, "run", interrupted)
        with pytest.raises(subprocess.CalledProcessError):
            environment.ensure(tmp_path / "venv")
    environment.ensure(tmp_path / "venv")
    assert log[0] == "create"
    assert len(log) == 2


def test_gpu_that_came_later_gets_a_fresh_environment(log, tmp_path, monkeypatch):
    environment.ensure(tmp_path / "venv")
    monkeypatch.setattr(environment, "detect_build", lambda: "cu126")
    environment.ensure(tmp_path / "venv")
    assert log[2] == "create"
    assert "requirements-without-paddle.txt" in log[3]
    assert "paddlepaddle" not in (tmp_path / "venv" / "requirements-without-paddle.txt").read_text()
    assert log[4].endswith("paddlepaddle-gpu==3.3.1 -i https://www.paddlepaddle.org.cn/packages/stable/cu126/")


def test_broken_environment_is_made_anew(log, tmp_path):
    environment.ensure(tmp_path / "venv")
    (tmp_path / "venv" / "bin" / "python").unlink()
    environment.ensure(tmp_path / "venv")
    assert [step.split()[0] for step in log].count("create") == 2


def test_python_without_ensurepip(tmp_path, monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(environment, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    with pytest.raises(ValueError, match=r"has no ensurepip: install python3.\d+-venv"):
        environment.create(tmp_path / "venv")


def test_active_python_that_fits():
    assert environment.active_faults() == []


def test_active_python_that_does_not_fit(monkeypatch):
    found = {"paddlepaddle-gpu": "3.2.0", "paddlepaddle": None, "paddlenlp": None, "numpy": "2.1.0"}
    real = environment.installed
    monkeypatch.setattr(environment, "installed", lambda name: found[name] if name in found else real(name))
    faults = environment.active_faults()
    assert len(faults) == 3
    assert "numpy: needs 1.26.4, found 2.1.0" in faults
    assert "paddlenlp: needs 3.0.0b4, found none" in faults
    assert any(fault.startswith("paddlepaddle-gpu or paddlepaddle: needs 3.3.1, found 3.2.0") for fault in faults)


def test_docker_image_with_a_gpu_paddle(monkeypatch):
    real = environment.installed
    monkeypatch.setattr(
        environment, "installed", lambda name: {"paddlepaddle-gpu": "3.3.1", "paddlepaddle": None}.get(name, real(name))
    )
    assert environment.active_faults() == []
