"""LoRA layers and the float32 merge on a tiny random model, float32, CPU."""

import json

import numpy as np
import paddle
import pytest
from paddlenlp.peft import LoRAModel
from paddlenlp.peft.lora.lora_layers import LoRALinear as PaddleNLPLoRALinear

from tests.vl2.random_models import IMAGE_ID, logits, new_model, randomise
from vl2.checkpoint.layouts import official_parts
from vl2.config import VL2Config
from vl2.lora import VL2LoRAModel, apply_lora, deltas
from vl2.lora_layers import LoRALinear
from vl2.lora_settings import GROUPS, LoRASettings
from vl2.parameters import init_model, train_parameters

ALL = LoRASettings(groups=tuple(GROUPS), rank=4, alpha=12.0)


def merged_model(lora_model):
    """The plain model that holds the unrounded float32 sums, and the paths of the parameters that were tuned."""
    found, base = deltas(lora_model), dict(lora_model.model.named_parameters())
    model = new_model(lora_model.model.config)
    parameters, tuned = dict(model.named_parameters()), set()
    for path, parts in official_parts(model):
        value = base[path].astype("float32").numpy()
        for part in parts:
            if part.name in found:
                value[part.at] = found[part.name].add_to(value[part.at])
                tuned.add(path)
        parameters[path].set_value(value)
    return model, tuned


def test_at_initialisation_it_is_the_base(config, batch):
    model = new_model(config)
    expected = logits(model, batch)
    lora_model = apply_lora(model, ALL, seed=3)
    lora_model.eval()
    assert np.array_equal(logits(lora_model, batch), expected)  # B is zero: x + 0 is x, bit for bit


def test_report_counts_modules_and_parameters(config):
    """1 dense layer, 3 with experts, 2 vision blocks; D 64, dense 176, 8 experts of 40, shared 80."""
    reports = {report.group: report for report in apply_lora(new_model(config), ALL).reports}
    assert {name: report.modules for name, report in reports.items()} == {
        "attention": 4 * 4,
        "experts": 3,
        "shared_experts": 3 * 3,
        "dense_mlp": 3,
        "vision": 2 * 4,
        "projector": 2,
    }
    assert reports["attention"].parameters == 16 * 4 * (64 + 64)
    assert reports["experts"].parameters == 3 * 8 * 3 * 4 * (64 + 40)
    assert reports["shared_experts"].parameters == 9 * 4 * (64 + 80)
    assert reports["dense_mlp"].parameters == 3 * 4 * (64 + 176)


def test_only_the_factors_are_trainable(config):
    lora_model = apply_lora(new_model(config), ALL)
    trainable = {name for name, p in lora_model.model.named_parameters() if not p.stop_gradient}
    assert trainable == set(lora_model.factors())
    assert sum(p.size for p in lora_model.factors().values()) == sum(r.parameters for r in lora_model.reports)


def test_each_group_has_its_rank(config):
    settings = LoRASettings(
        groups=("attention", "experts"), rank=4, alpha=8.0, ranks={"experts": 2}, alphas={"experts": 6.0}
    )
    lora_model = apply_lora(new_model(config), settings)
    layer = lora_model.model.language.model.layers[1]
    assert layer.self_attn.q_proj.lora_A.shape == [64, 4]
    assert layer.self_attn.q_proj.scaling == 2.0
    assert layer.mlp.experts.lora.gate_A.shape == [8, 64, 2]
    assert layer.mlp.experts.lora.scaling == 3.0
    assert [report.rank for report in lora_model.reports] == [4, 2]


def test_initialisation_depends_on_seed_and_name_only(config):
    name = "language.model.layers.2.self_attn.k_proj.lora_A"
    alone = apply_lora(new_model(config), LoRASettings(groups=("attention",)), seed=3).factors()[name].numpy()
    paddle.seed(99)
    among = apply_lora(new_model(config), LoRASettings(groups=tuple(GROUPS)), seed=3).factors()[name].numpy()
    other = apply_lora(new_model(config), LoRASettings(groups=("attention",)), seed=4).factors()[name].numpy()
    assert np.array_equal(alone, among)
    assert not np.array_equal(alone, other)
    assert 0.9 / 8 < np.abs(alone).max() <= 1 / 8  # uniform in +-1/sqrt(64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": ("attn",)}, "lora.groups: 'attn' is not a group; the groups are attention"),
        ({"groups": ()}, "lora.groups is empty"),
        ({"groups": ("vision", "vision")}, "names vision twice"),
        ({"groups": ("vision",), "ranks": {"experts": 2}}, "lora.ranks sets experts, which lora.groups does not tune"),
        ({"groups": ("vision",), "alphas": {"experts": 2.0}}, "lora.alphas sets experts, which lora.groups does not"),
        ({"groups": ("vision",), "rank": 0}, "lora rank of vision is 0; expected a positive integer"),
        ({"groups": ("vision",), "dropout": 1.0}, r"lora.dropout is 1.0; expected a probability"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRASettings(**settings)


def test_a_group_that_matches_nothing_is_an_error(config):
    raw = json.loads(json.dumps(config.to_dict()))
    raw["language_config"]["first_k_dense_replace"] = 0
    model = init_model(VL2Config.from_dict(raw), IMAGE_ID, seed=1)
    with pytest.raises(ValueError, match=r"lora\.groups: 'dense_mlp' matches nothing in this model"):
        apply_lora(model, LoRASettings(groups=("attention", "dense_mlp")))


def test_unrounded_merge_gives_the_adapters_logits(config, batch):
    lora_model = apply_lora(new_model(config), ALL)
    randomise(lora_model)
    lora_model.eval()
    adapted = logits(lora_model, batch)
    lora_model.disable_lora()
    base = logits(lora_model, batch)
    lora_model.enable_lora()
    merged = logits(merged_model(lora_model)[0], batch)
    scale = np.abs(adapted).max()
    assert np.abs(adapted - base).max() > 0.5 * scale  # the adapter does something
    # x (W + s A B) against x W + s (x A) B: another order of float32 sums, some 1e-7 a product.
    assert np.abs(merged - adapted).max() < 1e-5 * scale


def test_merge_adds_in_float32_on_a_bfloat16_base(config):
    """PaddleNLP merges in the weight's dtype: with a small addition nearly nothing of it survives."""
    lora_model = apply_lora(new_model(config, "bfloat16"), ALL)
    randomise(lora_model, scale=0.01)
    name = "language.model.layers.0.self_attn.q_proj.weight"
    layer = lora_model.model.language.model.layers[0].self_attn.q_proj
    delta = 3.0 * layer.lora_A.numpy() @ layer.lora_B.numpy()
    base = layer.weight.astype("float32").numpy()
    merged = deltas(lora_model)[name].add_to(base)
    assert merged.dtype == np.float32
    assert np.abs(merged - base - delta).max() < 1e-6 * np.abs(base).max()


def public_methods(parent) -> set[str]:
    return {name for name in vars(parent) if not name.startswith("_") and callable(getattr(parent, name))}


def test_what_paddlenlp_would_do_wrong_is_refused(config):
    """Of its methods those that know only its own layers changed nothing, or the wrong thing, without a word.

    Every public one stands in one of two lists, so that a new one of a later version is looked at: it is ours, or it
    does right as inherited, which the next test shows.
    """
    as_inherited = {"get_trainable_state_dict", "print_trainable_parameters"}
    assert public_methods(LoRAModel) - vars(VL2LoRAModel).keys() == as_inherited
    assert public_methods(PaddleNLPLoRALinear) - vars(LoRALinear).keys() == {"extra_repr"}
    lora_model = apply_lora(new_model(config), LoRASettings(groups=("attention", "experts")))
    before = {name: p.numpy() for name, p in lora_model.model.named_parameters()}
    layer = lora_model.model.language.model.layers[0].self_attn.q_proj
    for method, instead in (
        (layer.merge, r"vl2\.lora\.deltas"),
        (layer.unmerge, r"vl2\.lora\.deltas"),
        (layer.pissa_init, r"use vl2\.principal\.start_from_principal"),
        (layer.rope_init, "MoRA is not trained here"),
        (lora_model.merge, r"vl2\.lora\.deltas"),
        (lora_model.unmerge, r"vl2\.lora\.deltas"),
        (lora_model.restore_original_model, r"disable_lora\(\) computes as the base does"),
        (lora_model.get_lora_model, r"use vl2\.lora\.apply_lora"),
        (VL2LoRAModel.from_pretrained, r"use vl2\.adapter\.folder\.load_adapter"),
        (lora_model.save_pretrained, r"use vl2\.adapter\.folder\.save_adapter"),
        (lora_model.save_to_aistudio, r"vl2\.adapter\.folder\.save_adapter"),
        (lora_model.add_lora_split_mapping, "no tensor of it is split"),
    ):
        with pytest.raises(NotImplementedError, match=f"^not for a DeepSeek-VL2: .*{instead}"):
            method("x", y=1)
    assert all(np.array_equal(p.numpy(), before[name]) for name, p in lora_model.model.named_parameters())


def test_what_is_inherited_does_right(config):
    """What state_dict gives, set_state_dict takes: PaddleNLP's looked for other names, set none and said nothing."""
    lora_model = apply_lora(new_model(config), LoRASettings(groups=("attention", "experts"), rank=2, alpha=6.0))
    randomise(lora_model)
    assert lora_model.get_trainable_state_dict().keys() == lora_model.factors().keys()
    other = apply_lora(new_model(config), LoRASettings(groups=("attention", "experts"), rank=2, alpha=6.0), seed=9)
    assert other.set_state_dict(lora_model.state_dict()) == ([], [])
    for name, p in lora_model.factors().items():
        assert np.array_equal(p.numpy(), other.factors()[name].numpy()), name
    layer = lora_model.model.language.model.layers[0].self_attn.q_proj
    delta = 3.0 * layer.lora_A.numpy() @ layer.lora_B.numpy()
    assert np.abs(layer.get_delta_weight().numpy() - delta).max() < 1e-6 * np.abs(delta).max()
    assert layer.extra_repr() == "in_features=64, out_features=64, rank=2"
    lora_model.print_trainable_parameters()


def test_bfloat16_base_computes_and_learns(config, batch):
    lora_model = apply_lora(new_model(config, "bfloat16"), ALL)
    randomise(lora_model)
    loss, _ = lora_model.loss(batch)
    loss.backward()
    assert np.isfinite(float(loss))
    for name, p in lora_model.factors().items():
        assert p.dtype == paddle.float32 and p.grad.dtype == paddle.float32, name
        assert float(p.grad.abs().max()) > 0, name


def test_deltas_name_every_tuned_tensor_once(config):
    """One for each official tensor, so an expert's gate, up and down each; together they take every factor."""
    lora_model = apply_lora(new_model(config), ALL)
    randomise(lora_model)
    found = deltas(lora_model)
    experts = sum(".mlp.experts." in name for name in found)
    assert len(found) - experts == 16 + 9 + 3 + 8 + 2
    assert experts == 3 * 3 * config.language.n_routed_experts
    assert {factor for delta in found.values() for factor in delta.factors} == lora_model.factors().keys()
    official = {part.name: part for _, parts in official_parts(new_model(config)) for part in parts}
    assert found.keys() <= official.keys()
    lora = lora_model.model.language.model.layers[1].mlp.experts.lora
    up = found["language.model.layers.1.mlp.experts.5.up_proj.weight"].add_to(np.ones([64, 40], np.float32))
    assert np.allclose(up, 1 + 3.0 * lora.up_A[5].numpy() @ lora.up_B[5].numpy(), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_factor_gradients_follow_from_the_full_gradient(config, batch):
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, with dL/dW of a model that holds the merged weights."""
    lora_model = apply_lora(new_model(config), ALL)
    randomise(lora_model)
    lora_model.loss(batch)[0].backward()
    factors = {name: (p.numpy(), p.grad.numpy()) for name, p in lora_model.factors().items()}
    model, names = merged_model(lora_model)
    train_parameters(model, names)
    model.loss(batch)[0].backward()
    full = {name: p.grad.numpy() for name, p in model.named_parameters() if name in names}

    def check(prefix: str, grad: np.ndarray) -> None:
        (a, grad_a), (b, grad_b) = factors[f"{prefix}_A"], factors[f"{prefix}_B"]
        for found, expected in (
            (grad_a, 3.0 * grad @ b.swapaxes(-1, -2)),
            (grad_b, 3.0 * a.swapaxes(-1, -2) @ grad),
        ):
            # Relative in the 2-norm: four layers of float32 in another order; a swapped half or scaling is off by 1.
            assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected), prefix

    for name, grad in full.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight":
            check(f"{path}.lora", grad)
        elif leaf == "down":
            check(f"{path}.lora.down", grad)
        else:
            check(f"{path}.lora.gate", grad[..., :40])
            check(f"{path}.lora.up", grad[..., 40:])


@pytest.mark.slow
def test_recompute_equals_none_with_dropout(config, batch, expert_way):
    """Bit for bit: the RNG state is restored, and the same kernels see the same numbers.

    A regression: PyLayers asked a saved tensor for its stop_gradient, which non-reentrant recompute does not give back;
    gradients inside were wrong or missing while the loss stayed right.
    """
    settings = LoRASettings(groups=tuple(GROUPS), rank=4, dropout=0.3)
    found = []
    for every in (0, 1, 2):
        lora_model = apply_lora(new_model(config), settings, seed=2)
        randomise(lora_model)
        lora_model.set_recompute(every)
        lora_model.train()
        paddle.seed(17)
        loss, _ = lora_model.loss(batch)
        loss.backward()
        found.append((float(loss), {name: p.grad.numpy() for name, p in lora_model.factors().items()}))
    for loss, grads in found[1:]:
        assert loss == found[0][0]
        assert all(np.array_equal(grads[name], found[0][1][name]) for name in grads)


def test_dropout_is_off_in_eval_mode(config, batch):
    lora_model = apply_lora(new_model(config), LoRASettings(groups=tuple(GROUPS), dropout=0.5))
    randomise(lora_model)
    lora_model.eval()
    first = logits(lora_model, batch)
    assert np.array_equal(logits(lora_model, batch), first)
    lora_model.train()
    assert not np.array_equal(logits(lora_model, batch), first)
