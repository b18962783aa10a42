"""Reading and writing the official layout: nothing lost, nothing invented, and errors that name the tensors."""

import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from vl2.config import VL2Config
from vl2.weights import (
    checkpoint_tensors,
    init_model,
    load_model,
    read_header,
    save_model,
    write_safetensors,
)

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture
def folder(tmp_path) -> Path:
    for source in (GOLDENS / "nano_tiny", GOLDENS / "nano_bpe"):
        for file in source.iterdir():
            if file.suffix != ".npz":
                shutil.copy(file, tmp_path / file.name)
    return tmp_path


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the checkpoint's {name: array} and write it back."""
    stored = checkpoint_tensors(folder)
    arrays = {name: tensor.read() for name, tensor in stored.items()}
    change(arrays)
    write_safetensors(folder / "model.safetensors", arrays, dict.fromkeys(arrays, "bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 200_000])
def test_load_save_returns_every_tensor_bit_for_bit(folder, tmp_path_factory, monkeypatch, dtype, shard_bytes):
    monkeypatch.setattr("vl2.weights.MAX_SHARD_BYTES", shard_bytes)
    out = tmp_path_factory.mktemp("saved")
    save_model(load_model(folder, dtype=dtype), out, dtype="bfloat16")
    before, after = checkpoint_tensors(folder), checkpoint_tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == "BF16"
        assert np.array_equal(tensor.read(), after[name].read()), name
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard_bytes == 200_000)


def test_bfloat16_storage_computes_the_same_numbers(folder):
    """The golden weights are exact in bfloat16, so storing them so must not change one bit of the result."""
    batch = {"input_ids": np.arange(3, 40), "position_ids": np.arange(37), "seq_lens": np.array([37])}
    with paddle.no_grad():
        full, half = load_model(folder)(batch), load_model(folder, dtype="bfloat16")(batch)
    assert half.dtype == paddle.float32
    assert np.array_equal(full.numpy(), half.numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_stored_in_the_type_asked_for(folder, dtype):
    """A regression: "bfloat16" ends in "float16", so a bfloat16 checkpoint stayed what it was."""
    assert {str(p.dtype) for p in load_model(folder, dtype=dtype).parameters()} == {f"paddle.{dtype}"}


def test_missing_unknown_and_wrongly_shaped_tensors_are_listed(folder):
    def damage(arrays):
        del arrays["language.model.layers.1.mlp.experts.3.up_proj.weight"]
        arrays["language.model.layers.9.extra"] = np.zeros([2], np.uint16)
        arrays["image_newline"] = np.zeros([5], np.uint16)

    rewrite(folder, damage)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    text = str(error.value)
    assert "missing (1): language.model.layers.1.mlp.experts.3.up_proj.weight" in text
    assert "unknown (1): language.model.layers.9.extra" in text
    assert "wrong shape (1): image_newline is [5], expected [64]" in text


def test_truncated_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        load_model(folder)


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)


def test_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load_model(folder)


def test_random_init_depends_on_the_seed_only(folder):
    config = VL2Config.from_folder(folder)
    first, again, other = (init_model(config, 976, seed=seed) for seed in (1, 1, 2))
    same = [np.array_equal(a.numpy(), b.numpy()) for a, b in zip(first.parameters(), again.parameters())]
    assert len(same) > 90 and all(same)
    weight = "language.lm_head.weight"
    assert not np.array_equal(first.state_dict()[weight].numpy(), other.state_dict()[weight].numpy())


def test_header_is_aligned_and_keeps_metadata(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones([3], np.float32)}, {"a": "float32"}, {"format": "pt", "note": "é"})
    tensors, metadata = read_header(path)
    assert metadata == {"format": "pt", "note": "é"}
    assert tensors["a"].offset % 8 == 0
    assert tensors["a"].read().tolist() == [1, 1, 1]
