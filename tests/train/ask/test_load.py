"""From a folder to a model: what is read of it, how often, with which imports, and what is said meanwhile."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import vl2.checkpoint.tensor_files as tensor_files
from tests.places import ROOT
from train.ask import load as loading
from train.ask.load import load
from train.config.schema import ExportConfig
from train.export.merged import export
from vl2.checkpoint.folder import INDEX_FILE, SINGLE_FILE
from vl2.checkpoint.tensor_files import read_header, write_safetensors

READ_ONCE = ("config.json", "tokenizer.json", "tokenizer_config.json", INDEX_FILE)


@pytest.fixture(scope="module")
def sharded(golden_folder) -> Path:
    """A model in two shards."""
    folder = golden_folder("nano_tiny")
    stored = read_header(folder / SINGLE_FILE).tensors
    weight_map = {name: f"{'vision' if 'vision' in name else 'rest'}.safetensors" for name in stored}
    for file in set(weight_map.values()):
        part = {name: tensor.read() for name, tensor in stored.items() if weight_map[name] == file}
        write_safetensors(folder / file, part, dict.fromkeys(part, "bfloat16"))
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (folder / SINGLE_FILE).unlink()
    return folder


@pytest.fixture(scope="module")
def trained(run, sharded, tmp_path_factory) -> Path:
    """A run on the sharded model."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert run(run_dir, f"model.path={sharded}", "max_steps=1") == 0
    return run_dir


OPENED: Counter | None = None


def count_opened(event: str, arguments: tuple) -> None:
    """Counts every file that Python opens while OPENED is a counter; an audit hook cannot be removed again."""
    if OPENED is not None and event == "open" and isinstance(arguments[0], str):
        OPENED[os.path.realpath(arguments[0])] += 1


sys.addaudithook(count_opened)


@pytest.fixture
def opened(monkeypatch):
    """opened(FOLDER) -> how often each of its files was opened since the test began; of shards, their headers."""
    found, headers, read = Counter(), Counter(), tensor_files._raw_header

    def counting(path: Path):
        headers[os.path.realpath(path)] += 1
        return read(path)

    monkeypatch.setattr(tensor_files, "_raw_header", counting)
    monkeypatch.setattr(sys.modules[__name__], "OPENED", found)

    def of(folder: Path) -> dict[str, int]:
        files = {file.name: os.path.realpath(file) for file in folder.iterdir()}
        counts = {name: found[file] for name, file in files.items() if name in READ_ONCE}
        return {**counts, **{name: headers[file] for name, file in files.items() if name.endswith(".safetensors")}}

    return of


def once_each(folder: Path) -> dict[str, int]:
    return {file.name: 1 for file in folder.iterdir() if file.name in READ_ONCE or file.suffix == ".safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "run", "adapter", "export"])
def test_each_file_of_a_model_is_opened_once(kind, sharded, trained, tmp_path, opened):
    """An adapter's base was parsed three to five times: for its tokenizer, its type, its size, its weights, and again
    for the fingerprint."""
    folder = {"model": sharded, "run": trained, "adapter": trained / "adapter", "export": tmp_path / "out"}[kind]
    base = folder if kind == "export" else sharded
    if kind == "export":
        export(ExportConfig(run=str(trained), out=str(folder)))
        assert once_each(folder).keys() == once_each(sharded).keys()
        before = opened(base)
    else:
        before = dict.fromkeys(once_each(base), 0)
    load(folder)
    assert {name: count - before[name] for name, count in opened(base).items()} == once_each(base)
    assert len(once_each(base)) == 6


@pytest.mark.slow
def test_each_file_of_a_base_is_opened_once_by_a_run(run, sharded, tmp_path, opened):
    assert run(tmp_path / "run", f"model.path={sharded}", "max_steps=1", "eval.questions=0") == 0
    assert opened(sharded) == once_each(sharded)


@pytest.mark.slow
def test_an_export_needs_no_paddlenlp(golden_folder):
    """A comment claimed so, but the import of `infer` brought PaddleNLP in by four others: 3.2 of 5.0 seconds."""
    program = (
        "import sys, train.ask.evaluate, train.ask.infer, train.ask.load\n"
        "loaded = train.ask.load.load(sys.argv[1])\n"
        "assert loaded.model.parameters()\n"
        "assert 'paddlenlp' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(golden_folder("nano_tiny"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_bar_is_shown_where_there_is_something_to_wait_for(sharded, monkeypatch, capsys):
    """46 seconds of silence for a real model; nothing for one that is there at once."""
    load(sharded)
    assert "load weights" not in capsys.readouterr().err
    monkeypatch.setattr(loading, "_BAR_BYTES", 1_000_000)
    load(sharded)
    assert "load weights: 100%" in capsys.readouterr().err
