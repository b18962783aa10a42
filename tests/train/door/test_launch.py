"""launch.sh itself, run by bash as a user runs it, with the Python that runs these tests (VENV=none)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.places import ROOT
from train.config.load import load_config
from train.door import launch
from train.machine.devices import Machine


def door(*arguments, cwd=ROOT, path="", **environ):
    """Runs `bash launch.sh ...`; `path` goes before PATH."""
    search = os.pathsep.join(filter(None, [path, str(Path(sys.executable).parent), os.environ["PATH"]]))
    return subprocess.run(
        ["bash", str(ROOT / "launch.sh"), *arguments],
        cwd=cwd,
        env={**os.environ, "VENV": "none", "PATH": search, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_arguments_it_prints_verbs_and_recipes():
    shown = door()
    assert shown.returncode == 0
    assert "bash launch.sh export run=FOLDER" in shown.stdout
    assert "sft_tiny" in shown.stdout
    assert door("help").stdout == shown.stdout


def test_help_needs_no_installed_package(tmp_path):
    """A newcomer reads the help before anything is downloaded."""
    bare = tmp_path / "python3.11"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: no site-packages
    bare.chmod(0o755)
    shown = door("help", "train", path=str(tmp_path), VENV="")
    assert shown.returncode == 0, shown.stderr
    assert "data.max_tokens" in shown.stdout


def test_python_that_does_not_run_is_passed_over(tmp_path):
    """pyenv puts names on PATH that only say "command not found" and fail."""
    for name in ("python3.11", "python3.12", "python3.10", "python", "python3"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n")
        (tmp_path / name).chmod(0o755)
    found = door("help", path=str(tmp_path), PATH=f"{tmp_path}:/usr/bin:/bin", VENV="none")
    assert found.returncode == 2
    assert "error: no Python 3.10, 3.11 or 3.12 runs here" in found.stderr


def test_process_becomes_the_work(tmp_path):
    """No shell stays between: a signal to launch.sh reaches the work, and its exit code is launch.sh's."""
    stub = tmp_path / "python"
    stub.write_text(
        '#!/bin/sh\ncase "$*" in *environment.py*) echo "$0";; *train.door.launch*) echo $$; exit 7;; esac\n'
    )
    stub.chmod(0o755)
    environ = {**os.environ, "VENV": "none", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    door = subprocess.Popen(["bash", str(ROOT / "launch.sh"), "conf=x"], env=environ, stdout=subprocess.PIPE, text=True)
    assert door.communicate(timeout=60)[0].strip() == str(door.pid)
    assert door.returncode == 7


TEXTS = [
    "这是什么？",
    "<|ref|>the red cat<|/ref|>, (left)",
    "he said \"no\" and 'yes'",
    "a=b, c=${d} $HOME `x` \\n {e: f} [g]",
    "1",
    "null",
    "true",
    " two  spaces and a\nnew line ",
    "~tilde !bang #hash @at %p *star ;",
]


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_prompt_arrives_as_typed(text):
    shown = door("config", "infer", "model=m", f"prompt={text}")
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout)["prompt"] == text


def test_other_texts_arrive_as_typed():
    awkward = "a b, (1)=『圖』'\"<|det|>.x"
    keys = ["data.path", "data.eval_path", "run_dir", "resume", "model.path", "lora.init", "wandb.name"]
    shown = door("config", "conf=sft_tiny", *(f"{key}={awkward}{key}" for key in keys))
    assert shown.returncode == 0, shown.stderr
    config = yaml.safe_load(shown.stdout)
    for key in keys:
        value = config
        for part in key.split("."):
            value = value[part]
        assert value in (f"{awkward}{key}", [f"{awkward}{key}"])


def test_images_messages_and_model_arrive_as_typed():
    images = ["a, b.png", "c=(d).png", "图 1.png"]
    arguments = ["model=out, (1)=x", "messages=对话 'a'.json", *(f"image={image}" for image in images)]
    config = yaml.safe_load(door("config", "infer", *arguments).stdout)
    assert (config["image"], config["model"], config["messages"]) == (images, "out, (1)=x", "对话 'a'.json")
    config = yaml.safe_load(door("config", "export", "run=out, (1)=x").stdout)
    assert config["run"] == "out, (1)=x"


@pytest.mark.slow
def test_repository_in_an_awkward_place(tmp_path):
    place = tmp_path / "my models, (1)=x"
    place.mkdir()
    for name in ("launch.sh", "requirements.lock"):
        shutil.copy(ROOT / name, place)
    for name in ("conf", "train", "vl2"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shown = subprocess.run(
        ["bash", str(place / "launch.sh"), "config", "conf=sft_tiny"],
        env={**os.environ, "VENV": "none", "PATH": search},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout)["model"]["path"] == str(place / "vl2" / "nano")


@pytest.mark.slow
def test_works_from_any_folder(tmp_path):
    """Relative paths stay those of the folder where the command is typed; folders there hide none of ours."""
    for name in ("train", "data", "vl2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()
    shown = door("config", "conf=sft_tiny", "data.path=data/mine.jsonl", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    config = yaml.safe_load(shown.stdout)
    assert config["data"]["path"] == ["data/mine.jsonl"]
    assert not Path(config["run_dir"]).is_absolute()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "error: unknown verb 'trian'; did you mean train? (verbs: "),
        (["conf=sft_tny"], "error: unknown recipe 'sft_tny'; did you mean sft_tiny?"),
        (["conf=sft_tiny", "optm.lr=1"], "error: unknown key 'optm.lr'; did you mean optim.lr?"),
        (["infer", "prompt=x"], "error: infer needs model=FOLDER"),
        (["help", "trian"], "error: no keys for 'trian'"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(arguments, message):
    refused = door(*arguments)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith(message)
    assert refused.stderr.count("\n") == 1


def test_gpu_that_paddle_cannot_use_is_an_error_and_no_rehearsal(tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\ncase "$1" in -L) echo "GPU 0: NVIDIA A100 (UUID: GPU-5d5b)";;\n'
        '--query*) echo 8.0;; *) echo "CUDA Version: 12.6";; esac\n'
    )
    smi.chmod(0o755)
    refused = door("config", "conf=sft_tiny", path=str(tmp_path))
    assert refused.returncode == 2
    assert "this machine has 1 NVIDIA GPU, but Paddle is a CPU build" in refused.stderr
    assert "pip install paddlepaddle-gpu==" in refused.stderr


def test_environment_that_does_not_fit_is_listed(tmp_path):
    """VENV=none with a Python that lacks the packages."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    refused = door("conf=sft_tiny", path=str(tmp_path))
    assert refused.returncode == 2
    assert "does not fit requirements.lock:" in refused.stderr
    assert "paddlenlp: needs 3.0.0b4, found none" in refused.stderr


# --- what the door hands over to


@pytest.fixture
def machine(monkeypatch):
    """Sets what the probes see."""

    def see(machine):
        monkeypatch.setattr(launch, "find_machine", lambda: machine)
        monkeypatch.setitem(launch.LOADERS, "train", lambda argv: load_config(argv, machine))

    return see


def test_one_process_is_run_directly(machine):
    machine(Machine(gpus=0))
    command, _ = launch.prepare("train", ["conf=sft_tiny", "wandb.name=a b"])
    assert command == [
        sys.executable,
        "-u",
        "-m",
        "train.door.cli",
        "train.run.training",
        "conf=sft_tiny",
        "wandb.name=a b",
    ]
    command, _ = launch.prepare("eval", ["model=m", "data.path=d"])
    assert command[2:] == ["-m", "train.door.cli", "train.ask.evaluate", "model=m", "data.path=d"]


def test_several_processes_go_through_paddles_launcher(machine, tmp_path):
    machine(Machine(gpus=4, driver="CUDA Version: 12.6", gpu_paddle=True, visible=("3", "5", "6", "7")))
    arguments = ["conf=sft_tiny", f"run_dir={tmp_path}", "nproc=2", "nnodes=2", "master=10.0.0.1:6170", "rank=1"]
    command, _ = launch.prepare("train", arguments)
    text = " ".join(command)
    assert command[:4] == [sys.executable, "-m", "train.door.ranks", "gpu"]
    assert "--nproc_per_node 2" in text
    assert "--devices 3,5 " in text
    assert "--nnodes 2 --master 10.0.0.1:6170 --rank 1" in text
    assert command[-len(arguments) :] == arguments
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0  # the launcher writes the environment there


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(launch, "physical_cores", lambda: 8)
    assert launch.child_environment({}, 2)["OMP_NUM_THREADS"] == "4"
    assert launch.child_environment({}, 16)["OMP_NUM_THREADS"] == "1"
    assert launch.child_environment({"OMP_NUM_THREADS": "3"}, 2)["OMP_NUM_THREADS"] == "3"


def test_compiled_kernels_are_kept_in_the_users_cache():
    kept = [
        launch.child_environment(environ, 1).get("NUMBA_CACHE_DIR")
        for environ in (
            {"HOME": "/h"},
            {"HOME": "/h", "XDG_CACHE_HOME": "/c"},
            {"HOME": "/h", "NUMBA_CACHE_DIR": "/k"},
            {},
        )
    ]
    assert kept == ["/h/.cache/deepseek-vl2-finetune/kernels", "/c/deepseek-vl2-finetune/kernels", "/k", None]


def test_float32_is_exact_and_cards_are_numbered_as_by_nvidia_smi():
    """cublasLt does not look at Paddle's switch for TF32; and CUDA alone gives number 0 to the fastest card."""
    assert launch.child_environment({}, 1)["NVIDIA_TF32_OVERRIDE"] == "0"
    assert launch.child_environment({"NVIDIA_TF32_OVERRIDE": "1"}, 1)["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "NVIDIA_TF32_OVERRIDE" not in launch.child_environment({"NVIDIA_TF32_OVERRIDE": "0"}, 1, tf32=True)
    assert launch.child_environment({}, 1)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert launch.child_environment({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, 1)["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


@pytest.mark.parametrize("verb", ["train", "infer", "eval"])
def test_tf32_is_for_who_asks(verb, machine):
    machine(Machine(gpus=0))
    arguments = {"train": ["conf=sft_tiny"], "infer": ["model=m", "prompt=p"], "eval": ["model=m", "data.path=d"]}[verb]
    assert launch.prepare(verb, arguments)[1]["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "NVIDIA_TF32_OVERRIDE" not in launch.prepare(verb, [*arguments, "tf32=true"])[1]
    assert launch.prepare("export", ["run=r"])[1]["NVIDIA_TF32_OVERRIDE"] == "0"


def test_little_shared_memory_is_not_used(machine, tmp_path, monkeypatch, capsys):
    """Docker gives 64 MB of /dev/shm, which NCCL overruns with several cards."""
    machine(Machine(gpus=2, driver="", gpu_paddle=True))
    arguments = ["conf=sft_tiny", f"run_dir={tmp_path}"]
    monkeypatch.setattr(launch, "shared_memory_room", lambda: 64 * 2**20)
    assert launch.prepare("train", arguments)[1]["NCCL_SHM_DISABLE"] == "1"
    assert "note: /dev/shm has 67.1 MB free" in (said := capsys.readouterr().err) and "--shm-size=1g" in said
    assert "NCCL_SHM_DISABLE" not in launch.prepare("train", [*arguments, "nproc=1"])[1]  # one card talks to nobody
    monkeypatch.setattr(launch, "shared_memory_room", lambda: 2**30)
    assert "NCCL_SHM_DISABLE" not in launch.prepare("train", arguments)[1]
    assert capsys.readouterr().err == ""


def test_only_known_noise_is_quiet():
    """Ours and every other warning comes through."""
    environ = launch.child_environment({**os.environ, "PYTHONWARNINGS": "always::FutureWarning"}, 1)
    script = (
        "import warnings\nfor text in ('No ccache found. Please', 'pkg_resources is deprecated as an API', 'ours'):\n"
    )
    script += "    warnings.warn(text)\nwarnings.warn('later', FutureWarning)"
    said = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True).stderr
    assert "ccache" not in said
    assert "pkg_resources" not in said
    assert "ours" in said
    assert "later" in said
