"""Latent attention beyond the goldens: adapters on kv_b_proj are alive in training and in the folded decode."""

import numpy as np
import paddle
import pytest

from vl2.cache import ROOM, SLOTS, KVCache
from vl2.checkpoint.load import load_model
from vl2.generate import generate
from vl2.lora import apply_lora
from vl2.lora_settings import LoRASettings


@pytest.fixture(scope="module", params=["nano_small", "nano_base"])
def lora(request, golden_folder):
    """A model with latent attention and an adapter on attention whose B is not zero."""
    model = apply_lora(load_model(golden_folder(request.param)), LoRASettings(groups=("attention",), rank=4, alpha=8.0))
    rng = np.random.default_rng(0)
    for name, factor in model.factors().items():
        if name.endswith("_B"):
            factor.set_value(rng.normal(0, 0.1, factor.shape).astype("float32"))
    model.eval()
    return model


PROMPTS = [{"input_ids": np.arange(3, 3 + n, dtype=np.int64) * 7 % 900} for n in (50, 9)]


@pytest.mark.slow
def test_folded_decode_with_an_adapter_equals_computing_from_the_start(lora):
    expected = generate(lora.model, PROMPTS, eos_id=-1, max_new_tokens=12, use_cache=False)
    assert generate(lora.model, PROMPTS, eos_id=-1, max_new_tokens=12) == expected
    assert generate(lora.model, PROMPTS, eos_id=-1, max_new_tokens=12, chunk=20) == expected
    lora.disable_lora()
    base = generate(lora.model, PROMPTS, eos_id=-1, max_new_tokens=12)
    lora.enable_lora()
    assert base != expected  # the adapter changes the answers at all


def test_cache_holds_the_compressed_rows_only(lora):
    language = lora.model.config.language
    cache = KVCache(language.num_hidden_layers)
    number = cache.add()
    with paddle.no_grad():
        x = lora.model.embed(PROMPTS[0])
        step = cache.step([(number, len(x))])
        lora.model.decode_stream(x, step.position_ids(x.place), step.q_lens, step)
    values = language.num_hidden_layers * (language.kv_lora_rank + language.qk_rope_head_dim)
    assert cache.num_bytes == 4 * len(x) * values
    cache.shelve(number)
    assert cache.num_bytes == 4 * SLOTS * ROOM * values


def test_every_adapter_weight_of_attention_gets_a_gradient(lora):
    ids = PROMPTS[0]["input_ids"]
    batch = {"input_ids": ids, "position_ids": np.arange(50), "seq_lens": np.array([50]), "labels": np.roll(ids, -1)}
    loss_sum, _ = lora.model.loss(batch)
    loss_sum.backward()
    factors = lora.factors()
    assert any("kv_b_proj" in name for name in factors)
    for name, factor in factors.items():
        assert factor.grad is not None and float(factor.grad.abs().max()) > 0, name
        factor.clear_gradient()
