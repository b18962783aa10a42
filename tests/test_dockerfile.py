"""The Dockerfile names what is here: files, the lock's Paddle, commands. Nothing is built."""

import re
import shlex

import pytest

from tests.places import ROOT
from train.config.load import load_config
from train.machine.devices import Machine
from train.machine.environment import read_lock

TEXT = (ROOT / "Dockerfile").read_text("utf-8")
IGNORE = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
# (instruction, arguments), continued lines joined.
STEPS = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if line
]


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in STEPS if name == instruction]


def test_every_image_has_a_version_and_it_is_the_locks():
    (version,) = read_lock()[0]["paddlepaddle"]
    images = re.findall(r"\S*paddlepaddle/paddle\S*|PADDLE_IMAGE=\.\.\.\S+", TEXT)
    assert len(images) == 2 and arguments("FROM") == ["${PADDLE_IMAGE}"]
    for image in images:
        assert re.search(rf":{re.escape(version)}-gpu-cuda\d+\.\d+-cudnn\d+\.\d+\.?$", image), image
    assert "latest" not in TEXT


def test_what_is_copied_is_here_and_not_ignored():
    copied = [word for rest in arguments("COPY") for word in rest.split()[:-1]]
    assert {"requirements.lock", "launch.sh", "conf", "vl2", "data", "train", "tests"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert sorted(line[1:] for line in IGNORE if line.startswith("!")) == sorted(copied)
    assert "*" in IGNORE  # everything else stays out: runs, data, .git


def test_the_packages_are_the_locks_but_for_paddle():
    install = next(rest for rest in arguments("RUN") if "pip install" in rest)
    assert "grep -v '^paddlepaddle==' requirements.lock > /tmp/requirements.txt" in install
    assert "--no-deps -r /tmp/requirements.txt" in install  # the lock overrides some of paddlenlp's pins
    pattern = re.search(r"grep -v '(.*?)'", install)[1]
    lines = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    assert len([line for line in lines if re.search(pattern, line)]) == 1
    assert any("VENV=none" in rest for rest in arguments("ENV"))


def test_its_commands_are_taken():
    (check,) = [rest for rest in arguments("RUN") if "launch.sh" in rest]
    words = shlex.split(check.partition(">")[0])
    assert words[:3] == ["bash", "launch.sh", "config"]
    # A build sees no GPU, and the image has a GPU build of Paddle: without device=cpu that is refused.
    assert load_config(words[3:], Machine(gpus=0, driver="", gpu_paddle=True)).recipe == "sft_tiny"
    assert arguments("ENTRYPOINT") == ['["bash", "/opt/deepseek-vl2-finetune/launch.sh"]']
    assert "/opt/deepseek-vl2-finetune" in arguments("WORKDIR")


@pytest.mark.parametrize("name", ["README.gpu.md", "Dockerfile"])
def test_the_commands_that_start_it_are_one(name):
    text = (ROOT / name).read_text("utf-8")
    assert "docker build -t deepseek-vl2-finetune ." in text
    assert 'docker run --rm -it --gpus all --shm-size=1g -v "$PWD:/data" deepseek-vl2-finetune doctor' in text
