"""Folders that were written before documents said their format are read like today's."""

import shutil
from pathlib import Path

import pytest

from tests.places import GOLDENS
from train.ask.source import find_source
from train.run.report import StartReport
from train.run.summary import Summary
from train.store.facts import read_fact

FOLDERS = GOLDENS / "folders_v1"


@pytest.fixture
def place(tmp_path, model_folder, monkeypatch):
    """A copy of the folders, with the base beside them; their paths are relative to it."""
    shutil.copytree(FOLDERS, tmp_path / "here")
    shutil.copytree(model_folder, tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("folder", "kind", "step"),
    [
        ("run", "adapter", None),
        ("run/adapter", "adapter", None),
        ("run/checkpoints/step-000001", "adapter", 1),
        ("adapter_peft", "adapter", None),
        ("weights", "weights", None),
    ],
)
def test_what_was_trained_is_found_with_its_provenance(place, folder, kind, step):
    source = find_source(folder)
    assert (source.kind, source.base, source.base_name) == (kind, Path("model"), "model")
    assert source.provenance is not None and source.provenance.base_fingerprint.startswith("52f56e4d7b3b")
    assert (source.provenance.step, source.max_tiles, source.precision, source.recipe) == (step, 9, "fp32", "sft_tiny")
    assert not source.rehearsal and source.random_seed is None


def test_what_a_run_says_at_its_start_and_end_is_read(place):
    report, summary = read_fact(StartReport, Path("run/report.json")), read_fact(Summary, Path("run/summary.json"))
    assert (report.plan.steps, report.lora[0].group, summary.steps) == (2, "dense_mlp", 2)


def test_an_export_is_a_base_that_knows_its_run(place):
    shutil.copytree("model", "exported")
    shutil.copy("export_run/export.json", "exported")
    source = find_source("exported")
    assert source.kind == "base" and source.provenance is None
    assert source.export is not None and source.export.adapter is None and source.export.layout == "hf"
    assert (source.recipe, source.export.verified["tensors_changed"]) == ("sft_tiny", 3)
