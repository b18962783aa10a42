"""Where an export may be written, and what it replaces."""

import shutil
from pathlib import Path

import pytest

from tests.places import GOLDENS
from train.ask.source import find_source
from train.config.load import default_export
from train.config.schema import ExportConfig
from train.export.folder import check_out
from train.export.merged import export
from train.store.whole_folder import damage, read_manifest


@pytest.fixture
def place(tmp_path, model_folder, monkeypatch) -> Path:
    """A run's folder, and a place to work in."""
    shutil.copytree(GOLDENS / "folders_v1", tmp_path / "here")
    shutil.copytree(model_folder, tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def write(**settings) -> None:
    export(ExportConfig(run="run", out="out", adapter="peft", **settings))


def test_an_export_replaces_an_export_and_nothing_foreign(place):
    """overwrite=true deleted everything in a folder that held any file named export.json."""
    write()
    with pytest.raises(ValueError, match="there is an export already; give overwrite=true"):
        write()
    (place / "out" / "README.md").write_text("Ours, of November.")
    write(overwrite=True)
    assert (place / "out" / "README.md").read_text() == "Ours, of November."
    assert "README.md" in read_manifest(place / "out").files
    (place / "out" / "deeper").mkdir()
    (place / "out" / "deeper" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"out=out: deeper/thesis\.tex: not written by the export"):
        write(overwrite=True)
    assert (place / "out" / "deeper" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("content", ["{}", "[]", "", '{"run": 1}'])
def test_any_export_json_makes_no_export(place, content):
    (place / "out").mkdir()
    (place / "out" / "export.json").write_text(content)
    (place / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="there are files that no export wrote"):
        write(overwrite=True)
    assert (place / "out" / "thesis.tex").read_text() == "mine"


def test_a_link_is_followed(place, tmp_path):
    (tmp_path / "disk").mkdir()
    (place / "out").symlink_to(tmp_path / "disk")
    write()
    write(overwrite=True)
    assert (place / "out").is_symlink() and damage(tmp_path / "disk") is None


def test_no_export_below_a_file_or_in_a_checkpoint(place):
    source = find_source("run")
    (place / "file").write_text("")
    for out, found in (("file", "a file"), ("file/a/b", f"{place}/file, a file")):
        with pytest.raises(ValueError, match=f"out={out}: expected a folder, found {found}"):
            check_out(Path(out), source, overwrite=True)
    with pytest.raises(ValueError, match="lies in a checkpoint, which its run may delete"):
        check_out(Path("run/checkpoints/step-000001/adapter/export"), source, overwrite=False)


@pytest.mark.parametrize(
    ("run", "adapter", "expected"),
    [
        ("outputs/mine", "", "outputs/mine/export"),
        ("outputs/mine", "peft", "outputs/mine/adapter_peft"),
        ("outputs/mine/checkpoints/step-000200", "", "outputs/mine/export-step-000200"),
        ("outputs/mine/checkpoints/step-000200/adapter", "paddle", "outputs/mine/adapter_paddle-step-000200"),
        ("/data/mine/checkpoints/step-000200/", "", "/data/mine/export-step-000200"),
        ("/data/checkpoints/mine", "", "/data/checkpoints/mine/export"),
    ],
)
def test_an_export_of_a_checkpoint_lies_beside_the_checkpoints(run, adapter, expected):
    """It was written into the checkpoint, and deleted with it when the run went on."""
    assert default_export(run, adapter) == expected


def test_from_within_a_checkpoint(place, monkeypatch):
    monkeypatch.chdir(place / "run" / "checkpoints" / "step-000001")
    assert default_export(".", "") == "../../export-step-000001"
