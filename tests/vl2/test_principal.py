"""PiSSA: adapters that start at the principal singular values of the weights, and add how they move."""

import numpy as np
import paddle
import pytest

from tests.vl2.random_models import logits, new_model
from vl2.adapter.folder import load_adapter, load_factors, open_adapter, save_adapter
from vl2.adapter.plain import as_plain, plain_settings
from vl2.adapter.slots import slots
from vl2.errors import UserError
from vl2.linear import Linear
from vl2.lora import apply_lora, deltas, plan_factors
from vl2.lora_layers import LoRALinear
from vl2.lora_settings import LoRASettings
from vl2.parameters import build_model
from vl2.principal import principal_factors, start_from_principal

PISSA = LoRASettings(groups=("attention", "experts"), rank=4, alpha=12.0, ranks={"experts": 2}, pissa=True)


@pytest.fixture(scope="module")
def moved(config):
    """A model with PiSSA adapters, some steps away from their start."""
    lora_model = apply_lora(new_model(config), PISSA, seed=3)
    start_from_principal(lora_model, seed=3)
    rng = np.random.default_rng(0)
    for factor in lora_model.factors().values():
        factor.set_value(factor + paddle.to_tensor(rng.normal(0, 0.02, factor.shape).astype("float32")))
    lora_model.eval()
    return lora_model


def test_nearest_matrix_of_a_rank():
    """Singular values of a trained weight fall slowly; those of a random one hardly at all."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (96, 64))
    weight = (left[:, :64] * 0.97 ** np.arange(64) @ right).astype("float32")
    a, b = principal_factors(weight, 5, 3.0, np.random.default_rng(1))
    nearest = left[:, :5] * 0.97 ** np.arange(5) @ right[:5]
    assert (a.shape, b.shape) == ((96, 5), (5, 64))
    assert np.abs(3.0 * a @ b - nearest).max() < 1e-3
    assert np.allclose((a * a).sum(0), (b * b).sum(1), rtol=1e-4)  # each has the root of a singular value
    a, b = principal_factors(weight, 64, 3.0, np.random.default_rng(1))
    assert np.abs(3.0 * a @ b - weight).max() < 1e-5


def test_at_the_start_it_is_the_base(config, batch):
    """Bit for bit, and its factors are those of every weight by itself, experts one by one."""
    model = new_model(config)
    expected = logits(model, batch)
    lora_model = apply_lora(model, PISSA, seed=3)
    seen = []
    start_from_principal(lora_model, seed=3, done=seen.append)
    lora_model.eval()
    assert np.array_equal(logits(lora_model, batch), expected)
    assert sum(seen) == len(deltas(lora_model)) == 16 + 3 * 8 * 3
    experts = model.language.model.layers[1].mlp.experts
    up, whole = experts.gate_up.numpy()[5][:, 40:], experts.lora
    product = whole.scaling * whole.up_A.numpy()[5] @ whole.up_B.numpy()[5]
    u, s, v = np.linalg.svd(up, full_matrices=False)
    assert np.abs(product - (u[:, :2] * s[:2]) @ v[:2]).max() < 0.1 * s[2]
    again = apply_lora(new_model(config), PISSA, seed=3)
    start_from_principal(again, seed=3)
    assert all(np.array_equal(p.numpy(), again.factors()[n].numpy()) for n, p in lora_model.factors().items())


def test_it_is_the_residual_and_the_product():
    """The same function and gradients as W - s A0 B0 in the place of W, which PEFT and PaddleNLP compute."""
    paddle.seed(0)
    layer = LoRALinear(Linear(12, 7), rank=3, scaling=2.0, dropout=0.0, pissa=True)
    weight, x = layer.weight.numpy(), paddle.randn([5, 12])
    a0, b0 = principal_factors(weight, 3, 2.0, np.random.default_rng(0))
    for letter, value in (("A", a0), ("B", b0)):
        getattr(layer, f"lora_{letter}_start").set_value(value)
        getattr(layer, f"lora_{letter}").set_value(value + np.float32(0.1))
    residual = paddle.to_tensor(weight - 2.0 * a0 @ b0)
    a, b = (paddle.to_tensor(value + np.float32(0.1), stop_gradient=False) for value in (a0, b0))
    expected = paddle.matmul(x, residual) + 2.0 * paddle.matmul(paddle.matmul(x, a), b) + layer.bias
    found = layer(x)
    assert np.abs(found.numpy() - expected.numpy()).max() < 1e-5
    (expected**2).sum().backward()
    (found**2).sum().backward()
    for ours, theirs in ((layer.lora_A, a), (layer.lora_B, b)):
        assert np.abs(ours.grad.numpy() - theirs.grad.numpy()).max() < 1e-4 * np.abs(theirs.grad.numpy()).max()
    assert layer.lora_A_start.grad is None and layer.lora_A_start.stop_gradient
    assert np.abs(layer.effective_weight("float32").numpy() - (residual + 2.0 * a @ b).numpy()).max() < 1e-6


def test_a_small_move_survives_a_short_type():
    """In bfloat16 A itself would not change at all: 1 + 0.001 is 1."""
    layer = LoRALinear(Linear(4, 4, bias_attr=False), rank=4, scaling=1.0, dropout=0.0, pissa=True)
    for letter in "AB":
        for name in (f"lora_{letter}", f"lora_{letter}_start"):
            getattr(layer, name).set_value(np.eye(4, dtype="float32"))
    layer.lora_A.set_value(np.eye(4, dtype="float32") * np.float32(1.001))
    assert (layer.lora_A.astype("bfloat16") == layer.lora_A_start.astype("bfloat16")).all()
    a, b = (factor.astype("bfloat16").astype("float32") for factor in layer.product())
    assert np.abs(paddle.matmul(a, b).numpy() - 0.001 * np.eye(4)).max() < 1e-5


def test_its_files_hold_where_it_started(config, batch, moved, tmp_path):
    (tmp_path / "a").mkdir()
    save_adapter(moved, tmp_path / "a", {})
    expected, base = logits(moved, batch), new_model(config)
    assert np.abs(expected - logits(base, batch)).max() > 1e-3
    loaded = load_adapter(base, tmp_path / "a")
    assert loaded.settings == PISSA
    assert np.array_equal(logits(loaded, batch), expected)


def test_as_plain_lora_of_twice_the_rank(config, batch, moved, tmp_path):
    """Which any reader of adapters knows; the same additions bit for bit."""
    (tmp_path / "a").mkdir()
    save_adapter(moved, tmp_path / "a", {})
    skeleton = build_model(config, 1)
    plain = as_plain(open_adapter(tmp_path / "a", skeleton), slots(skeleton))
    assert plain.settings == plain_settings(PISSA)
    assert (plain.settings.rank_of("attention"), plain.settings.rank_of("experts")) == (8, 4)
    lora_model = apply_lora(new_model(config), plain.settings)
    load_factors(lora_model, plain)
    lora_model.eval()
    assert np.array_equal(logits(lora_model, batch), logits(moved, batch))
    ours, theirs = deltas(moved), deltas(lora_model)
    for name, delta in ours.items():
        zero = np.zeros((delta.a.shape[-2], delta.b.shape[-1]), "float32")
        assert np.array_equal(delta.add_to(zero), theirs[name].add_to(zero)), name


def test_what_has_no_meaning_is_refused(config):
    with pytest.raises(UserError, match=r"lora\.pissa=true with lora\.dropout=0\.05: it would drop"):
        LoRASettings(groups=("attention",), dropout=0.05, pissa=True)
    settings = LoRASettings(groups=("attention", "experts"), ranks={"experts": 41}, pissa=True)
    with pytest.raises(
        UserError, match=r"rank 41 of experts is more than the 40 singular values of its smallest weight"
    ):
        plan_factors(build_model(config, 1), settings)
