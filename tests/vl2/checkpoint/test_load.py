"""Reading and writing the official layout: nothing lost, nothing invented, and errors that name the tensors."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from vl2.checkpoint.folder import read_checkpoint
from vl2.checkpoint.layouts import official_parts, official_tensors
from vl2.checkpoint.load import load_model
from vl2.checkpoint.planned_files import Wanted, plan_new
from vl2.checkpoint.tensor_files import write_safetensors
from vl2.config import VL2Config
from vl2.errors import UserError
from vl2.parameters import init_model


@pytest.fixture
def folder(golden_folder) -> Path:
    return golden_folder("nano_tiny")


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the checkpoint's {name: array} and write it back."""
    stored = read_checkpoint(folder).tensors
    arrays = {name: tensor.read() for name, tensor in stored.items()}
    change(arrays)
    write_safetensors(folder / "model.safetensors", arrays, dict.fromkeys(arrays, "bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 200_000])
def test_load_save_returns_every_tensor_bit_for_bit(folder, tmp_path_factory, monkeypatch, dtype, shard_bytes):
    """Through the model's stacked experts and out again, into files that are planned anew."""
    monkeypatch.setattr("vl2.checkpoint.planned_files.MAX_SHARD_BYTES", shard_bytes)
    out, model = tmp_path_factory.mktemp("saved"), load_model(folder, dtype=dtype)
    values = dict(model.named_parameters())
    tensors = {
        name: piece
        for path, parts in official_parts(model)
        for name, piece in official_tensors(path, values[path].astype("bfloat16").numpy(), parts)
    }
    plan = plan_new({name: Wanted("bfloat16", piece.shape) for name, piece in tensors.items()}, "hf")
    sizes = []
    for file in plan.files:
        file.write(out, tensors.__getitem__, sizes.append)
    if plan.index is not None:
        (out / "model.safetensors.index.json").write_bytes(plan.index)
    assert plan.num_bytes == sum(path.stat().st_size for path in out.iterdir()) > sum(sizes)
    before, after = read_checkpoint(folder).tensors, read_checkpoint(out).tensors
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == "bfloat16"
        assert np.array_equal(tensor.read(), after[name].read()), name
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard_bytes == 200_000)


def test_bfloat16_storage_computes_the_same_numbers(folder, monkeypatch):
    """The golden weights are exact in bfloat16, so storing them so must not change one bit of the result.

    A CPU that multiplies bfloat16 adds up the same products in another order.
    """
    batch = {"input_ids": np.arange(3, 40), "position_ids": np.arange(37), "seq_lens": np.array([37])}
    with paddle.no_grad():
        full, half = load_model(folder)(batch), load_model(folder, dtype="bfloat16")
        here = half(batch)
        monkeypatch.setattr("vl2.stored_products.takes_bfloat16", lambda: False)
        cast = half(batch)
    assert here.dtype == cast.dtype == paddle.float32
    assert np.array_equal(full.numpy(), cast.numpy())
    np.testing.assert_allclose(here.numpy(), full.numpy(), atol=2e-6 * float(full.abs().max()))


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
    with pytest.raises(UserError) as error:
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


def shard(folder: Path, *groups: str) -> dict[str, str]:
    """Spread the single file over shards, by what a name contains; returns the weight_map that is written."""
    stored = read_checkpoint(folder).tensors
    weight_map = {name: next((g for g in groups if g in name), "rest") + ".safetensors" for name in stored}
    for file in set(weight_map.values()):
        arrays = {name: tensor.read() for name, tensor in stored.items() if weight_map[name] == file}
        write_safetensors(folder / file, arrays, dict.fromkeys(arrays, "bfloat16"))
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_missing_shards_are_named(folder):
    shard(folder, "vision", "layers.1")
    assert len(read_checkpoint(folder).tensors) > 90
    (folder / "vision.safetensors").unlink()
    (folder / "layers.1.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"shards that are not there: layers\.1\.safetensors, vision\.safetensors; fetch"
    ):
        load_model(folder)


def test_shards_of_another_checkpoint_are_refused(folder):
    weight_map = shard(folder, "vision")
    name = "vision.norm.weight"
    write_index(folder, {**weight_map, name: "rest.safetensors"})
    with pytest.raises(
        ValueError, match=rf"rest\.safetensors: not the shard that .* 1 tensors .* \({name}\); index and"
    ):
        load_model(folder)
    del weight_map[name]
    write_index(folder, weight_map)
    with pytest.raises(ValueError, match=rf"vision\.safetensors: not the shard .* 1 tensors .* \({name}\)"):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000, '{"weight_map": {"a": 1}}'])
def test_index_that_is_none_is_refused(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    message = (
        r"index\.json: (not JSON|expected a JSON object|weight_map is (None|3); expected a table of tensors to files|"
        r"expected the name of a file beside it for a, found 1)"
    )
    with pytest.raises(UserError, match=message):
        load_model(folder)


@pytest.mark.parametrize("place", ["{outside}", "../{name}/x.safetensors", "sub/x.safetensors", "..", "", "a\\b"])
def test_shards_outside_of_the_folder_are_refused(folder, tmp_path_factory, place):
    """An index from elsewhere had weights read from any place of the disk, by an absolute name or by `..`."""
    outside = tmp_path_factory.mktemp("outside")
    weight_map = shard(folder, "vision")
    shutil.copy(folder / "vision.safetensors", outside / "x.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(folder / "vision.safetensors", folder / "sub" / "x.safetensors")
    place = place.format(outside=outside / "x.safetensors", name=outside.name)
    write_index(folder, {name: place if "vision" in file else file for name, file in weight_map.items()})
    with pytest.raises(UserError, match=r"expected the name of a file beside it for vision\."):
        load_model(folder)


def test_config_of_another_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["language_config"]["num_hidden_layers"] -= 1
    config["language_config"]["n_routed_experts"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        load_model(folder)
    text = str(error.value)
    assert "the weights are not those of the model that config.json describes" in text
    assert "missing (6): language.model.layers.1.mlp.experts.8.gate_proj.weight" in text
    assert re.search(r"unknown \(\d+\): .*language\.model\.layers\.3\.", text)
    assert "wrong shape (2): language.model.layers.1.mlp.gate.weight is [8, 64], expected [9, 64]" in text


def test_tokenizer_of_another_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["language_config"]["vocab_size"] = 500
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"984 entries, up to the id 983, but language_config\.vocab_size is 500; .* belong"
    ):
        load_model(folder)


def test_ids_beyond_the_embedding_are_refused(folder):
    """Few enough entries, one with an id that the embedding has no row for: it failed in the middle of an answer."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["beyond"] = 4_000_000_000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        UserError, match=r"985 entries, up to the id 4000000000, but language_config\.vocab_size is 1024"
    ):
        load_model(folder)


def test_paddles_pickle_is_read(folder):
    """paddle.save's file is looked into and never unpickled; it takes part where there are no safetensors."""
    expected = load_model(folder).state_dict()
    tensors = {name: paddle.to_tensor(tensor.read()) for name, tensor in read_checkpoint(folder).tensors.items()}
    paddle.save(tensors, str(folder / "model_state.pdparams"))
    (folder / "model.safetensors").unlink()
    found = load_model(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name].numpy(), expected[name].numpy()) for name in expected)


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
