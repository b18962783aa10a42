"""Whoever reads a folder with a manifest looks into it: the files of an adapter whole, those of a model by size."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.places import GOLDENS
from train.ask.load import load
from train.ask.predictions import check_predictions
from train.ask.source import find_source
from train.config.load import load_config
from train.config.schema import ExportConfig
from train.export.merged import export
from train.run.training import train


def flip(path: Path) -> None:
    """Change one bit, as a disk may."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.fixture
def place(tmp_path, model_folder, monkeypatch) -> Path:
    """A run with its checkpoint, an adapter exported for PEFT, trained weights and an export, all whole."""
    here = tmp_path / "here"
    shutil.copytree(GOLDENS / "folders_v1", here)
    shutil.copytree(model_folder, here / "model")
    shutil.copytree(model_folder, here / "export_model", dirs_exist_ok=True)
    monkeypatch.chdir(here)
    return here


ADAPTERS = {
    "run": "run/adapter/peft_model.safetensors",
    "run/adapter": "run/adapter/peft_model.safetensors",
    "run/checkpoints/step-000001": "run/checkpoints/step-000001/adapter/peft_model.safetensors",
    "adapter_peft": "adapter_peft/adapter_model.safetensors",
    "weights": "weights/trained.safetensors",
}


@pytest.mark.parametrize(("folder", "file"), ADAPTERS.items())
def test_a_flipped_bit_in_what_was_trained_is_found(place, folder, file):
    """`infer` answered garbage and `export` called it verified; the checksum lay beside, unread."""
    find_source(folder)
    flip(place / file)
    readers: list[Callable] = [load, lambda name: export(ExportConfig(run=name, out="out"))]
    if folder != "weights":
        readers.append(lambda name: export(ExportConfig(run=name, out="out", adapter="peft")))
    for read in readers:
        with pytest.raises(ValueError, match=r"damaged: the checksum of .*\.safetensors is wrong; take another copy"):
            read(folder)
    assert not (place / "out").exists()


def test_only_the_adapter_of_a_checkpoint_is_read_for_an_answer(place):
    """Its optimizer state, twice as large, is what resuming reads."""
    flip(place / "run/checkpoints/step-000001/optimizer.safetensors")
    assert find_source("run/checkpoints/step-000001").kind == "adapter"


def test_an_adapter_to_start_from_is_read(place, arguments, data_file):
    flip(place / "run/adapter/peft_model.safetensors")
    settings = [*arguments(place / "new"), "lora.init=run/adapter"]
    with pytest.raises(ValueError, match=r"run/adapter: damaged: the checksum of peft_model\.safetensors is wrong"):
        train(load_config(settings))
    assert not (place / "new").exists()


def test_an_export_is_looked_at_by_size_and_read_on_request(place):
    """55 GB are not read twice for one answer; `check=full` does."""
    flip(place / "export_model" / "model.safetensors")
    assert find_source("export_model").kind == "base"
    with pytest.raises(ValueError, match=r"export_model: damaged: the checksum of model\.safetensors is wrong"):
        load("export_model", check="full")
    with pytest.raises(ValueError, match=r"export_model: damaged: the checksum of model\.safetensors is wrong"):
        export(ExportConfig(model="export_model", out="out", check="full"))
    with pytest.raises(ValueError, match=r"export_model: damaged: the checksum"):  # as the base of an adapter
        find_source("run", base="export_model", checksums=True)
    with (place / "export_model" / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    for read in (find_source, load, lambda folder: find_source("run", base=folder)):
        with pytest.raises(ValueError, match=r"damaged: tokenizer_config\.json has 398 bytes instead of 397"):
            read("export_model")


def test_training_looks_at_an_export_too(place, arguments):
    (place / "export_model" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"export_model: damaged: model\.safetensors has 5 bytes"):
        train(load_config(arguments(place / "new", "model.path=export_model")))


def test_a_text_for_people_may_be_edited(place):
    (place / "adapter_peft" / "README.md").write_text("Ours, of November.")
    assert find_source("adapter_peft").kind == "adapter"


@pytest.mark.slow
def test_a_base_is_found_from_another_folder(place, run, monkeypatch, tmp_path):
    """Trained with model.path=model, then used from elsewhere: "which is not there now"."""
    assert run(Path("new"), "model.path=model", "max_steps=1", "lora.rank=1", "lora.groups=[dense_mlp]") == 0
    monkeypatch.chdir(tmp_path)
    source = find_source(place / "new")
    assert (source.base, source.base_name) == (place / "model", "model")
    shutil.copytree(place / "model", tmp_path / "moved")
    shutil.rmtree(place / "model")
    with pytest.raises(ValueError, match="trained on the base model model, which is not there now"):
        find_source(place / "new")
    assert find_source(place / "new", base="moved").base == Path("moved")


def test_predictions_below_a_file_or_in_a_pipe_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"expected a folder, found a file"):
        check_predictions(tmp_path / "file" / "predictions.jsonl")
    with pytest.raises(ValueError, match=r"a file that no evaluation wrote"):
        check_predictions(tmp_path)
