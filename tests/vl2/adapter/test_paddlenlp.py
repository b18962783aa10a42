"""Adapters of PaddleNLP, built by hand: what they mean, and what is refused."""

import json
import pickle

import numpy as np
import paddle
import pytest

from tests.vl2.adapter.handmade import check, make_paddle, skeleton
from vl2.adapter.folder import open_adapter
from vl2.adapter.formats import OWN_FILE, PADDLE_CONFIG, adapter_metadata
from vl2.checkpoint.tensor_files import read_header


def test_an_adapter_of_paddlemix(tmp_path):
    factors = make_paddle(tmp_path)
    check(tmp_path, factors, 8.0)
    settings = open_adapter(tmp_path, skeleton()).settings
    assert (settings.groups, settings.alpha, settings.dropout) == (("attention", "experts"), 32.0, 0.05)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rslora": 1}, r"lora_config\.json: rslora is 1; expected true or false"),
        ({"pissa": True}, r"pissa is True; only plain LoRA"),
        ({"loraga": True}, r"loraga is True; only plain LoRA"),
        ({"use_mora": True}, r"use_mora is True; only plain LoRA"),
        ({"lora_use_mixer": True}, r"lora_use_mixer is True; only plain LoRA"),
        ({"trainable_bias": "all"}, r"trainable_bias is 'all'; only plain LoRA"),
        ({"trainable_modules": [".*norm"]}, r"trainable_modules is \['\.\*norm'\]; no weight of this model has such"),
        ({"trainable_modules": [r".*model\.norm\.weight"]}, r"missing \(1\): language\.model\.norm\.weight"),
        ({"r": 2}, r"wrong shape \(.*is \[64, 4\], expected \[64, 2\]"),
        ({"target_modules": None}, r"target_modules is None; expected a list of regular expressions"),
    ],
)
def test_paddlenlp_settings_that_cannot_be_read(tmp_path, config, message):
    make_paddle(tmp_path, **config)
    with pytest.raises(ValueError, match=message):
        open_adapter(tmp_path, skeleton())


def test_a_part_of_a_tensor_parallel_adapter(tmp_path):
    make_paddle(tmp_path)
    path = tmp_path / PADDLE_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "tensor_parallel_degree": 2}))
    with pytest.raises(ValueError, match=r"tensor_parallel_degree is 2; merge its parts first"):
        open_adapter(tmp_path, skeleton())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_saved_by_paddlenlp_itself(tmp_path, dtype):
    """A state dictionary that paddle.save wrote, as LoRAModel.save_pretrained does: its arrays, never unpickled."""
    make_paddle(tmp_path)
    tensors = {name: t.read() for name, t in read_header(tmp_path / OWN_FILE)[0].items()}
    (tmp_path / OWN_FILE).unlink()
    state = {name: paddle.to_tensor(array).astype(dtype) for name, array in tensors.items()}
    paddle.save(state, str(tmp_path / "lora_model_state.pdparams"))
    adapter = open_adapter(tmp_path, skeleton())
    name = "language.model.layers.1.mlp.experts.{}.up_proj.lora_A"
    found = adapter.factor("language.model.layers.1.mlp.experts.lora.up_A")
    assert len(found) == 8
    for expert, array in enumerate(found):
        assert np.array_equal(array, state[name.format(expert)].astype("float32").numpy())
    assert adapter_metadata(tmp_path) == {"base": ""}


def test_a_pickle_with_anything_but_arrays_is_not_run(tmp_path):
    """The loader's own tests show that nothing in it is executed; here, that it is the loader that reads it."""
    make_paddle(tmp_path)
    (tmp_path / OWN_FILE).unlink()
    (tmp_path / "lora_model_state.pdparams").write_bytes(pickle.dumps({"a": print}, protocol=4))
    with pytest.raises(ValueError, match=r"lora_model_state\.pdparams: .* is no part of a dictionary of arrays"):
        open_adapter(tmp_path, skeleton())
