"""Learning rate by step, weight decay, and the optimizer's state by structured name."""

import math

import numpy as np
import paddle
import pytest

from train.run.optim import build_optimizer, decays, lr_factor, optimizer_state, set_optimizer_state


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
    parameters = dict(layer.named_parameters())
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
    assert np.allclose(layer.weight.numpy(), before["weight"] * (1 - 0.1 * 0.5), rtol=1e-6)
    assert np.array_equal(layer.bias.numpy(), before["bias"])


def test_vision_tower_learns_at_its_own_rate():
    """Adam's first step is lr times the gradient's sign; decay is lr times weight_decay times the weight."""
    paddle.seed(0)
    model = paddle.nn.LayerDict({"vision": paddle.nn.Linear(4, 3), "projector": paddle.nn.Linear(4, 3)})
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(parameters, 0.05, weight_decay=0.2, eps=1e-12, vision_lr_scale=0.25)
    before = {name: p.numpy() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = paddle.full_like(parameter, -3.0)
    optimizer.step()
    for name, scale in (("vision", 0.25), ("projector", 1.0)):
        lr = 0.05 * scale
        weight, bias = f"{name}.weight", f"{name}.bias"
        expected = before[weight] * (1 - lr * 0.2) + lr
        assert np.allclose(parameters[weight].numpy(), expected, rtol=0, atol=1e-6), name
        assert np.allclose(parameters[bias].numpy(), before[bias] + lr, rtol=0, atol=1e-6), name


def test_state_goes_on_in_a_second_model_of_the_process():
    """Paddle's own state dict goes by automatic names, which the second model's differ from."""
    layer, parameters, optimizer = layer_and_optimizer()
    step(layer, optimizer)
    weights, state = {n: p.numpy() for n, p in parameters.items()}, optimizer_state(optimizer, parameters)
    assert sorted(state)[:2] == ["bias:beta1_pow_acc", "bias:beta2_pow_acc"]
    step(layer, optimizer)

    second, others, resumed = layer_and_optimizer(seed=5)
    for name, parameter in others.items():
        parameter.set_value(weights[name])
    set_optimizer_state(resumed, others, state)
    step(second, resumed)
    assert all(np.array_equal(parameters[name].numpy(), others[name].numpy()) for name in parameters)


def test_state_of_other_weights_is_refused():
    _, parameters, optimizer = layer_and_optimizer()
    state = optimizer_state(optimizer, parameters)
    state["weight:moment1"] = state["weight:moment1"][:2]
    del state["bias:moment2"]
    with pytest.raises(ValueError, match=r"does not fit the trainable weights: bias:moment2; weight:moment1"):
        set_optimizer_state(optimizer, parameters, state)
