"""Learning rate by step, weight decay, and the optimizer's state by structured name."""

import math
import re

import numpy as np
import paddle
import pytest

from tests.places import GOLDENS
from train.config.schema import PARAMETER_GROUPS as SCHEMA_GROUPS
from train.config.schema import GroupConfig
from train.run.optim import build_optimizer, by_group, decays, lr_factor, optimizer_state, set_optimizer_state
from vl2.checkpoint.tensor_files import MemoryTensor
from vl2.config import VL2Config
from vl2.lora import plan_factors
from vl2.lora_settings import GROUPS, LoRASettings, is_factor
from vl2.parameter_groups import PARAMETER_GROUPS
from vl2.parameters import build_model


def factors(num_steps: int, **options) -> list[float]:
    settings = {"schedule": "cosine", "warmup_ratio": 0.2, "min_lr_ratio": 0.0, **options}
    return [lr_factor(step, num_steps, **settings) for step in range(num_steps)]


def test_cosine_with_warmup():
    expected = [0.5, 1.0, *((1 + math.cos(math.pi * k / 8)) / 2 for k in range(8))]
    assert factors(10) == pytest.approx(expected, abs=1e-12)


def test_cosine_ends_at_its_floor():
    values = factors(1000, min_lr_ratio=0.1)
    assert values[-1] == pytest.approx(0.1, abs=1e-4)
    assert min(values[200:]) == values[-1] > 0.1


def test_constant():
    assert factors(5, schedule="constant") == [1.0] * 5
    assert factors(10, schedule="constant")[:3] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
def test_every_step_learns(warmup):
    for num_steps in (1, 2, 3, 7):
        assert all(0 < value <= 1 for value in factors(num_steps, warmup_ratio=warmup))


def layer_and_optimizer(seed: int = 0, **options):
    paddle.seed(seed)
    layer = paddle.nn.Linear(4, 3)
    parameters = {f"projector.{name}": parameter for name, parameter in layer.named_parameters()}
    return layer, parameters, build_optimizer(parameters, 0.1, **options)


def step(layer, optimizer) -> None:
    x = paddle.arange(8, dtype="float32").reshape([2, 4])
    layer(x).sum().backward()
    optimizer.step()
    optimizer.clear_grad(set_to_zero=False)


def test_only_matrices_decay():
    layer, parameters, optimizer = layer_and_optimizer(weight_decay=0.5)
    assert decays(layer.weight) and not decays(layer.bias)
    layer.bias.set_value(np.ones(3, "float32"))
    before = {name: p.numpy() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = paddle.zeros_like(parameter)
    optimizer.step()
    assert np.allclose(layer.weight.numpy(), before["projector.weight"] * (1 - 0.1 * 0.5), rtol=1e-6)
    assert np.array_equal(layer.bias.numpy(), before["projector.bias"])


def test_groups_and_b_learn_at_their_own_rates():
    """Adam's first step is lr times the gradient's sign; decay is lr times the coefficient times the weight."""
    q_proj = "language.model.layers.0.self_attn.q_proj"
    expected = {  # (lr scale, weight decay)
        "vision.norm.weight": (0.25, 0.2),
        "projector.layers.0.weight": (1.0, 0.0),
        "language.lm_head.weight": (0.5, 3.0),
        f"{q_proj}.lora_A": (2.0, 0.2),
        f"{q_proj}.lora_B": (32.0, 0.2),
        "language.model.layers.1.mlp.experts.lora.up_A": (1.0, 0.2),
        "language.model.layers.1.mlp.experts.lora.up_B": (16.0, 0.2),
        "image_newline": (1.0, 0.0),  # a vector
    }
    groups = {
        "vision": GroupConfig(lr_scale=0.25),
        "projector": GroupConfig(weight_decay=0.0),
        "head": GroupConfig(lr_scale=0.5, weight_decay=3.0),
        "attention": GroupConfig(lr_scale=2.0),
    }
    paddle.seed(0)
    parameters = {name: paddle.create_parameter([4, 3][name == "image_newline" :], "float32") for name in expected}
    optimizer = build_optimizer(parameters, 0.005, weight_decay=0.2, eps=1e-12, groups=groups, plus_scale=16.0)
    before = {name: p.numpy() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = paddle.full_like(parameter, -3.0)
    optimizer.step()
    for name, (scale, decay) in expected.items():
        lr = 0.005 * scale
        assert np.allclose(parameters[name].numpy(), before[name] * (1 - lr * decay) + lr, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("family", ["nano_tiny", "nano_small", "nano_base"])
def test_every_parameter_has_one_group(family):
    model = build_model(VL2Config.from_folder(GOLDENS / family), 0)
    plan_factors(model, LoRASettings(groups=tuple(GROUPS)))
    names = [name for name, _ in model.named_parameters()]
    groups = by_group(names)
    assert sorted(name for found in groups.values() for name in found) == sorted(names)
    assert tuple(groups) == PARAMETER_GROUPS == SCHEMA_GROUPS
    for group, pattern in GROUPS.items():
        tuned = [name for name in groups[group] if is_factor(name)]
        assert all(re.match(pattern, name) for name in tuned)
        assert len(tuned) == sum(is_factor(name) and bool(re.match(rf"{pattern}\b", name)) for name in names)


def in_memory(state: dict[str, np.ndarray]) -> dict[str, MemoryTensor]:
    return {name: MemoryTensor("float32", array) for name, array in state.items()}


def test_state_goes_on_in_a_second_model_of_the_process():
    """Paddle's own state dict goes by automatic names, which the second model's differ from."""
    layer, parameters, optimizer = layer_and_optimizer()
    step(layer, optimizer)
    weights, state = {n: p.numpy() for n, p in parameters.items()}, optimizer_state(optimizer, parameters)
    assert sorted(state)[:2] == ["projector.bias:beta1_pow_acc", "projector.bias:beta2_pow_acc"]
    step(layer, optimizer)

    second, others, resumed = layer_and_optimizer(seed=5)
    for name, parameter in others.items():
        parameter.set_value(weights[name])
    set_optimizer_state(resumed, others, in_memory(state))
    step(second, resumed)
    assert all(np.array_equal(parameters[name].numpy(), others[name].numpy()) for name in parameters)


def test_state_of_other_weights_is_refused():
    _, parameters, optimizer = layer_and_optimizer()
    state = optimizer_state(optimizer, parameters)
    state["projector.weight:moment1"] = state["projector.weight:moment1"][:2]
    del state["projector.bias:moment2"]
    wrong = r"does not fit the trainable weights: projector.bias:moment2; projector.weight:moment1"
    with pytest.raises(ValueError, match=wrong):
        set_optimizer_state(optimizer, parameters, in_memory(state))
