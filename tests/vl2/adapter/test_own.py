"""The files of an adapter as a run writes them: read back bit for bit, or refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.vl2.random_models import logits, new_model, randomise
from vl2.adapter.folder import load_adapter, open_adapter, save_adapter
from vl2.adapter.formats import OWN_FILE
from vl2.checkpoint.tensor_files import read_header, write_safetensors
from vl2.lora import apply_lora
from vl2.lora_settings import GROUPS, LoRASettings


@pytest.fixture(scope="module")
def saved(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    settings = LoRASettings(groups=("attention", "experts"), rank=4, alpha=12.0, ranks={"experts": 2})
    lora_model = apply_lora(new_model(config), settings)
    randomise(lora_model)
    save_adapter(lora_model, folder, {"base": "vl2/nano", "base_fingerprint": "abc", "rehearsal": True})
    return folder


def test_adapter_round_trip(config, batch, saved):
    adapter = open_adapter(saved, new_model(config))
    lora_model = apply_lora(new_model(config), adapter.settings)
    randomise(lora_model)
    loaded = load_adapter(new_model(config), saved, base_fingerprint="abc")
    assert np.array_equal(logits(loaded, batch), logits(lora_model, batch))
    assert adapter.metadata == {"base": "vl2/nano", "base_fingerprint": "abc", "rehearsal": True}
    assert adapter.settings.rank_of("experts") == 2


def test_paddlenlp_reads_the_adapters_configuration(saved):
    from paddlenlp.peft import LoRAConfig

    config = LoRAConfig.from_pretrained(str(saved))
    assert (config.r, config.lora_alpha, config.scaling) == (4, 12.0, 3.0)
    assert config.target_modules == [GROUPS["attention"], GROUPS["experts"]]


def test_another_base_is_refused(config, saved):
    with pytest.raises(ValueError, match=r"trained on another base model \(vl2/nano"):
        load_adapter(new_model(config), saved, base_fingerprint="def")


def test_a_damaged_adapter_is_refused_and_nothing_is_set(config, saved, tmp_path):
    """PaddleNLP's loader accepts a renamed, wrongly shaped, half-missing adapter without a word."""
    shutil.copytree(saved, tmp_path / "a")
    tensors = {name: tensor.read() for name, tensor in read_header(saved / OWN_FILE)[0].items()}
    renamed, reshaped = (
        "language.model.layers.0.self_attn.q_proj.lora_A",
        "language.model.layers.1.mlp.experts.lora.up_B",
    )
    tensors["q_proj.lora_A"] = tensors.pop(renamed)
    tensors[reshaped] = tensors[reshaped][:, :1]
    write_safetensors(tmp_path / "a" / OWN_FILE, tensors, dict.fromkeys(tensors, "float32"))
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load_adapter(new_model(config), tmp_path / "a")
    text = str(error.value)
    assert f"missing (1): {renamed}" in text
    assert "unknown (1): q_proj.lora_A" in text
    assert f"wrong shape (1): {reshaped} is [8, 1, 40], expected [8, 2, 40]" in text


def test_no_adapter_there(config, tmp_path):
    with pytest.raises(ValueError, match=r"no lora_config\.json or adapter_config\.json there; expected the folder of"):
        load_adapter(new_model(config), tmp_path)


def test_a_configuration_that_was_not_written_here(config, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a")
    path = tmp_path / "a" / "lora_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "vl2": {"metadata": {}, "settings": {"groups": ["vision"], "size": 3}}}))
    with pytest.raises(ValueError, match=r"lora_config\.json: not the configuration of an adapter made here"):
        load_adapter(new_model(config), tmp_path / "a")
    path.write_text(json.dumps({**document, "vl2": 3}))
    with pytest.raises(ValueError, match=r"lora_config\.json: its entry 'vl2' was not written here"):
        load_adapter(new_model(config), tmp_path / "a")
