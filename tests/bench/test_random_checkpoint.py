"""`bench random_checkpoint`: a folder that loads like a downloaded one, written whole or not at all."""

import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from tests.bench import random_checkpoint
from tests.bench.random_files import tensor_shapes
from tests.places import GOLDENS, NANO_BPE
from vl2.checkpoint.folder import read_checkpoint
from vl2.checkpoint.load import load_model
from vl2.config import VL2Config


@pytest.mark.parametrize("kind", ["nano_tiny", "nano_small", "nano_base"])
def test_written_model_loads_and_computes(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 300_000)
    out = tmp_path / "parent" / "out"
    random_checkpoint.main([str(GOLDENS / kind), f"--tokenizer={NANO_BPE}", f"--out={out}", "--seed=1"])
    config = VL2Config.from_folder(out)
    stored = read_checkpoint(out).tensors
    assert {name: tensor.shape for name, tensor in stored.items()} == tensor_shapes(config)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert index["weight_map"] == {name: tensor.path.name for name, tensor in stored.items()}
    assert index["metadata"]["total_size"] == sum(tensor.num_bytes for tensor in stored.values())
    assert (out / "config.json").read_bytes() == (GOLDENS / kind / "config.json").read_bytes()
    model = load_model(out)
    with paddle.no_grad():
        hidden = model({"input_ids": np.arange(5, 30), "position_ids": np.arange(25), "seq_lens": np.array([25])})
        logits = model.language.logits(hidden).numpy()
    assert np.isfinite(logits).all() and logits.std() > 0.01
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert f"written to {out}" in capsys.readouterr().out


def test_description_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random_checkpoint.main(["base", "--numbers=none"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "\tBF16\t" in line]) == 6973
    bias = (
        "language.model.layers.15.mlp.gate.e_score_correction_bias\tBF16\t[72]\t144\tmodel-00005-of-000008.safetensors"
    )
    assert bias in lines
    assert lines[-1] == "6973 tensors, 27.48 B numbers in bfloat16, 54.96 GB"
    assert list(tmp_path.iterdir()) == []


def test_holes_have_the_size_and_take_no_space(tmp_path, capsys):
    """All 32 GB of Small, in a temporary folder."""
    out = tmp_path / "small"
    random_checkpoint.main(["small", f"--out={out}", "--numbers=holes"])
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) > 32.29e9
    assert sum(path.stat().st_blocks * 512 for path in out.iterdir()) < 5e6
    assert len(read_checkpoint(out).tensors) == 5639
    assert "Zeros" in (out / "README.md").read_text()


def test_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="there is something already; expected a new or empty folder"):
        random_checkpoint.main(["nano", f"--out={tmp_path}"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ValueError, match=r"no room on the disk: the checkpoint x takes 6\.74 GB, 5\.00 GB are free"):
        random_checkpoint.main(["tiny", f"--out={tmp_path / 'x'}"])
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_with_more_entries_than_the_embedding_is_refused(tmp_path):
    small = json.loads((GOLDENS / "nano_tiny" / "config.json").read_text())
    small["language_config"]["vocab_size"] = 100
    (tmp_path / "config.json").write_text(json.dumps(small))
    with pytest.raises(ValueError, match=r"has 984 entries, up to the id 983, but language_config\.vocab_size is 100"):
        random_checkpoint.main([str(tmp_path), f"--tokenizer={NANO_BPE}", f"--out={tmp_path / 'x'}"])


def test_arguments(capsys):
    order = random_checkpoint.read_arguments(["tiny"])
    assert order.out == Path("outputs/random/tiny")
    assert order.model == "deepseek-ai/deepseek-vl2-tiny"
    with pytest.raises(SystemExit, match="2"):
        random_checkpoint.read_arguments([])
    assert "the following arguments are required: model" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no config\.json there"):
        random_checkpoint.main(["tny"])
