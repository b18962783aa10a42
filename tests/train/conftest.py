"""A tiny model folder, a small data file and a way to train in this process, for the tests of the run."""

import json
import multiprocessing
import random
from pathlib import Path

import pytest
from PIL import Image

WORDS = ("red", "blue", "circle", "square", "two", "three", "left", "big")


@pytest.fixture(scope="session")
def model_folder(golden_folder) -> Path:
    return golden_folder("nano_tiny")


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    """20 conversations of 30 to 160 tokens; three of them with an image, of 421 tokens more."""
    return write_data(tmp_path_factory.mktemp("data"))


def write_data(folder: Path, *, rows: int = 20, images: int = 3, seed: int = 0) -> Path:
    """Write `rows` conversations, the first `images` of them with a picture, in shuffled order."""
    draw = random.Random(seed)
    lines = []
    for i in range(rows):
        question = " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 30)))
        names = []
        if i < images:
            names = [f"{i}.png"]
            Image.new("RGB", (60, 40), (40 * i % 255, 120, 60)).save(folder / names[0])
        messages = [
            {"role": "user", "content": ("<image>\n" if names else "") + question},
            {"role": "assistant", "content": question[::-1][:20].strip()},
        ]
        lines.append(json.dumps({"messages": messages, "images": names}) + "\n")
    draw.shuffle(lines)
    path = folder / "data.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def arguments(model_folder, data_file):
    """Makes the `key=value` arguments of a run; dropout on, images in some packs, an empty pack at each epoch's end."""

    def make(run_dir: Path, *more: str) -> list[str]:
        values = {
            "conf": "sft_tiny",
            "model.path": model_folder,
            "data.path": data_file,
            "run_dir": run_dir,
            "device": "cpu",
            "rehearse": "false",
            "precision": "fp32",
            "data.max_tokens": 640,
            "data.workers": 0,
            "max_steps": 6,
            "seed": 6,  # no router of it decides near a tie: see test_loss_curve_is_the_golden_one
            "packs_per_step": 4,
            "lora.dropout": 0.2,
            "optim.lr": 1e-2,
            "recompute": 0,
            "log": "[]",
            "keep_checkpoints": 2,
        }
        values.update(argument.split("=", 1) for argument in more)
        return [f"{key}={value}" for key, value in values.items()]

    return make


@pytest.fixture(scope="session")
def run(arguments):
    """Trains in this process: run(run_dir, "key=value", ...) -> exit code."""
    from train.config.load import load_config
    from train.run.training import train

    def go(run_dir: Path, *more: str, **options) -> int:
        return train(load_config(arguments(run_dir, *more)), **options)

    return go


@pytest.fixture(scope="session")
def whole(run, tmp_path_factory) -> Path:
    """Folder of a run of 6 steps, dropout on, that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run(run_dir, "save_steps=2") == 0
    return run_dir


@pytest.fixture(autouse=True)
def no_process_stays():
    """A worker that a test leaves behind would keep pytest from exiting after its last line."""
    yield
    left = multiprocessing.active_children()
    for process in left:
        process.kill()
    assert left == []


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """The size table is kept in the user's cache; not in that of whoever runs the tests."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
