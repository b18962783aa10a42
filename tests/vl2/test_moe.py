"""Routing of a layer that is computed again in backward."""

import numpy as np
import paddle
import pytest

from tests.vl2.random_models import new_model, randomise
from vl2.expert_rows import read_counts
from vl2.lora import apply_lora
from vl2.lora_settings import LoRASettings
from vl2.moe import MoE, Router


@pytest.mark.parametrize("recompute", [0, 1])
def test_choices_are_made_and_read_once_a_layer(config, monkeypatch, recompute):
    """The layer computed again chose, sorted and read a second time: another wait for the device in every layer."""
    reads, choices, choose = [], [], Router.choose
    monkeypatch.setattr("vl2.expert_rows.read_counts", lambda bounds: reads.append(bounds) or read_counts(bounds))
    monkeypatch.setattr(Router, "choose", lambda self, scores: choices.append(scores) or choose(self, scores))
    lora_model = apply_lora(new_model(config), LoRASettings(groups=("attention", "experts"), rank=4))
    randomise(lora_model)
    lora_model.set_recompute(recompute)
    lora_model.train()
    ids = np.random.default_rng(0).integers(5, 900, 40)
    batch = {"input_ids": ids, "labels": ids, "position_ids": np.arange(40), "seq_lens": np.array([40])}
    for packs in (1, 2):
        lora_model.loss(batch)[0].backward()
        layers = sum(isinstance(layer, MoE) for layer in lora_model.sublayers())
        assert len(reads) == len(choices) == layers * packs > 0


def test_a_close_choice_is_not_made_again(config):
    """Scores that move by rounding when a layer is computed again change no token's experts, so gradients are right."""
    moe = next(layer for layer in new_model(config).sublayers() if isinstance(layer, MoE))
    x_TD = paddle.randn([30, config.language.hidden_size])
    kept = []
    first = moe(x_TD, kept=kept)
    moe.gate.choose = lambda scores_TE: pytest.fail("chosen again")
    assert np.array_equal(moe(x_TD, kept=kept).numpy(), first.numpy())
    assert len(kept) == 1
