"""A run with a vision cache: the same numbers, and no tower once every picture is there."""

import json
import re
import shutil
from pathlib import Path

import pytest

from train.config.load import load_config
from train.run.dryrun import dry_run
from train.run.memory import training_memory
from vl2.config import VL2Config
from vl2.vision import VisionTower


def lines(run_dir: Path) -> list[tuple[float, float]]:
    read = map(json.loads, (run_dir / "metrics.jsonl").read_text("utf-8").splitlines())
    return [(line["loss"], line["grad_norm"]) for line in read if "loss" in line]


@pytest.fixture
def tower_calls(monkeypatch):
    """Tiles of each call of the tower."""
    calls, forward = [], VisionTower.forward
    monkeypatch.setattr(
        VisionTower, "forward", lambda self, tiles, dtype: calls.append(len(tiles)) or forward(self, tiles, dtype)
    )
    return calls


@pytest.mark.slow
def test_losses_are_those_without_it(run, whole, data_file, tmp_path, tower_calls, capsys, caplog):
    """Bit for bit: in the epoch that fills it, in later ones, resumed, with a damaged entry, and from another's run."""
    folder, run_dir = tmp_path / "cache", tmp_path / "run"
    assert run(run_dir, f"data.vision_cache={folder}", "save_steps=2") == 0
    assert lines(run_dir) == lines(whole)
    assert 3 <= sum(tower_calls) <= 6  # three pictures of one tile each, and none is seen in a later epoch
    assert "3 pictures" in capsys.readouterr().out
    report = json.loads((run_dir / "report.json").read_text("utf-8"))

    tower_calls.clear()
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    settings = (
        f"data.vision_cache={folder}",
        f"resume={again / 'checkpoints' / 'step-000004'}",
        f"data.eval_path={data_file}",
        "eval.questions=1",
    )
    assert run(again, *settings, "data.workers=1") == 0
    assert "all there: the vision tower is not loaded" in capsys.readouterr().out
    assert tower_calls == [] and "loaded after all" not in caplog.text
    assert lines(again)[4:] == lines(whole)[4:]
    assert json.loads((again / "report.json").read_text("utf-8"))["memory"] != report["memory"]

    damaged, *_ = (path for path in folder.glob("*/seen/*/*"))
    damaged.write_bytes(b"x")
    shutil.rmtree(again)
    shutil.copytree(run_dir, again)
    assert run(again, *settings[:2]) == 0
    assert lines(again) == lines(whole)
    assert tower_calls == [1] and "the vision tower is loaded after all" in caplog.text


@pytest.mark.slow
def test_a_tower_in_few_bits(run, tmp_path, caplog):
    """Its features have a place of their own, and it is as it was where it is loaded after all."""
    folder, frozen = tmp_path / "cache", "model.frozen=nf4"
    assert run(tmp_path / "without", frozen, "max_steps=6") == 0
    for name in ("first", "second"):
        assert run(tmp_path / name, frozen, "max_steps=6", f"data.vision_cache={folder}") == 0
        assert lines(tmp_path / name) == lines(tmp_path / "without")
        damaged, *_ = (path for path in folder.glob("*/seen/*/*"))
        damaged.write_bytes(b"x")
    assert "the vision tower is loaded after all" in caplog.text
    assert run(tmp_path / "whole", "max_steps=1", f"data.vision_cache={folder}") == 0
    assert len(list(folder.glob("*/seen"))) == 2


def test_a_dry_run_says_it_and_writes_nothing(arguments, tmp_path):
    config = load_config(arguments(tmp_path / "run", f"data.vision_cache={tmp_path / 'cache'}"))
    found = dry_run(config, tmp_path)
    (note,) = (note for note in found.notes if note.startswith("vision cache"))
    assert re.search(r"3 pictures, [\d.]+ [kM]B; [\d.]+ [kM]B to be written, 0\.0% of the [\d.]+ .B free there", note)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["lora.groups=[attention,vision]"], "lora.groups"),
        (["lora.also_train=[vision]"], "lora.also_train"),
        (["lora.rank=0", "trainable=[vision,projector]", "lora.groups=[]"], "trainable"),
    ],
)
def test_a_trained_tower_is_refused(arguments, tmp_path, settings, key):
    wanted = rf"data\.vision_cache=.*the vision tower trains in this run \({key} has vision\)"
    with pytest.raises(ValueError, match=wanted):
        load_config(arguments(tmp_path, *settings, f"data.vision_cache={tmp_path}"))


def test_a_file_is_no_folder(run, data_file, tmp_path):
    with pytest.raises(ValueError, match=r"data\.vision_cache=.*expected a folder, or none yet; found a file"):
        run(tmp_path / "run", f"data.vision_cache={data_file}")


def test_memory_without_the_tower(arguments, model_folder, tmp_path):
    config, model = load_config(arguments(tmp_path)), VL2Config.from_folder(model_folder)
    there, absent = (training_memory(model, config, on_gpu=True, tower=tower) for tower in (True, False))
    sizes = 4 * sum(p.size for p in VisionTower(model.vision).parameters())
    assert there.frozen - absent.frozen == sizes
    assert absent.num_bytes < there.num_bytes
