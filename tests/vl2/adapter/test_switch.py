"""Adapters that share a base in memory: each computes as it does alone, in whatever order they are used."""

import numpy as np
import pytest

from tests.vl2.random_models import logits, new_model, randomise
from vl2.adapter.folder import load_adapter, save_adapter
from vl2.adapter.switch import Switch
from vl2.lora import apply_lora
from vl2.lora_settings import LoRASettings
from vl2.parameter_groups import whole_parameters
from vl2.parameters import set_parameter
from vl2.principal import start_from_principal

KINDS = {
    "plain": {"groups": ("attention", "experts"), "rank": 4},
    "rslora": {"groups": ("dense_mlp", "vision"), "rank": 4, "rslora": True},
    "pissa": {"groups": ("attention", "shared_experts"), "rank": 2, "pissa": True},
    "whole": {"groups": ("attention",), "rank": 2, "also_train": ("norms", "projector", "head", "routers")},
}


@pytest.fixture(scope="module")
def folders(config, tmp_path_factory):
    found = {}
    for name, settings in KINDS.items():
        lora = apply_lora(new_model(config), LoRASettings(alpha=8.0, **settings))
        if lora.settings.pissa:
            start_from_principal(lora, seed=0)
        randomise(lora)
        parameters = dict(lora.model.named_parameters())
        for path in whole_parameters(parameters, lora.settings.also_train):
            set_parameter(lora.model, path, parameters[path] * 1.5, trainable=True)
        found[name] = tmp_path_factory.mktemp(name)
        save_adapter(lora, found[name], {"base": "vl2/nano"})
    return found


@pytest.mark.slow
def test_each_computes_as_alone_and_the_base_as_before(config, batch, folders):
    model = new_model(config)
    expected = {None: logits(model, batch)}
    for name, folder in folders.items():
        expected[name] = logits(load_adapter(new_model(config), folder), batch)
    switch = Switch(model)
    for name, folder in folders.items():
        with switch.adding(name):
            load_adapter(model, folder)
    for name in (None, *folders, "plain", "whole", "pissa", None, "rslora", "whole", None):
        switch.use(name)
        assert np.array_equal(logits(model, batch), expected[name]), name
    different = {value.tobytes() for value in expected.values()}
    assert len(different) == len(expected)
