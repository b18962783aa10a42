"""How an entry script ends."""

import errno
import os
import subprocess
import sys

import pytest

from data.shapes.write import write_shapes
from tests.places import ROOT
from train.door.cli import run_cli
from train.door.launch import child_environment


@pytest.mark.slow
def test_mistake_of_the_user_and_no_noise(tmp_path):
    """Paddle prints two lines about OMP_NUM_THREADS at import; only ours is left."""
    (tmp_path / "script.py").write_text(
        "import paddle\nfrom train.config.load import check_divides\n"
        "def main(argv):\n    check_divides(8, int(argv[0]))\n"
    )
    environ = {**child_environment(os.environ, 1), "PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "train.door.cli", "script", "3"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: packs_per_step=8 cannot be shared by 3 processes")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_warnings_reach_the_terminal(tmp_path):
    """A picture that broke during training was left out without a word: Paddle's log handler held a stream of ours."""
    (tmp_path / "script.py").write_text(
        "import logging\ndef main(argv):\n"
        "    logging.getLogger('data.packs').warning('%s; nothing is learned from this sample', 'a.jpg')\n"
        "    logging.getLogger('data.packs').info('nobody asked')\n"
    )
    environ = {**child_environment(os.environ, 1), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-m", "train.door.cli", "script"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == "warning: a.jpg; nothing is learned from this sample\n"


def test_exit_code_of_main(monkeypatch):
    monkeypatch.setattr("train.door.cli.import_paddle_quietly", lambda: None)
    for returned, code in ((None, 0), (0, 0), (143, 143)):
        with pytest.raises(SystemExit) as ended:
            run_cli(lambda argv, returned=returned: returned)
        assert ended.value.code == code


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_line(number, monkeypatch, capsys, tmp_path):
    """A disk that filled up while shapes were drawn, or while the curve was, ended in a traceback."""

    def draw(self, *_, **__):
        raise OSError(number, "No space left on device", str(tmp_path / "0.png"))

    monkeypatch.setattr("train.door.cli.import_paddle_quietly", lambda: None)
    monkeypatch.setattr("PIL.Image.Image.save", draw)
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda argv: write_shapes(tmp_path / "data", task="chinese", split="test", count=1, seed=0) and None)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / '0.png'}: the disk is full; free some space, what was saved before is whole\n"
    )
    assert list((tmp_path / "data").iterdir()) == []  # nothing half drawn is taken for data later


@pytest.mark.slow
def test_worker_that_ignores_signals_does_not_keep_the_process(tmp_path):
    """A run that failed inside an epoch hung for good: Python waited for workers that ignore SIGTERM."""
    (tmp_path / "script.py").write_text(
        "import multiprocessing, signal, time\n"
        "def work():\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    time.sleep(60)\n"
        "def main(argv):\n    multiprocessing.Process(target=work, daemon=True).start()\n    time.sleep(0.5)\n"
        "    raise TypeError('a fault')\n"
    )
    environ = {**child_environment(os.environ, 1), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-m", "train.door.cli", "script"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=40)
    assert done.returncode == 1
    assert "TypeError: a fault" in done.stderr


def test_fault_in_a_library_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("train.door.cli.import_paddle_quietly", lambda: None)
    with pytest.raises(ValueError, match="Invalid isoformat"):
        run_cli(lambda argv: __import__("datetime").date.fromisoformat("x"))
