"""`bench launches`: a GPU's step does not launch more for more experts."""

from types import SimpleNamespace

import paddle
import pytest

from tests.bench import launches
from tests.bench.launches import BOTH, ONE, blocks_of, count, experts_alone, narrow, prepare, whole
from train.run.optim import build_optimizer


@pytest.fixture(autouse=True)
def batches(monkeypatch):
    monkeypatch.setattr("vl2.ways.takes_batches", lambda place: True)


@pytest.fixture(params=[(ONE, 150), (BOTH, 300)], ids=["one block", "further parts"])
def most(request, monkeypatch) -> int:
    """Launches that a layer's experts may take: forward, recomputed and backward, with LoRA."""
    kind, number = request.param
    monkeypatch.setattr("vl2.expert_rows.choose_blocks", blocks_of(kind))
    return number


def last_experts(step) -> int:
    return count(experts_alone(step.model.model.language.model.layers[-1].mlp)).total()


def test_experts_of_a_layer(most):
    """The loop launched some 36 for each expert: 570 here, 2,300 with 64."""
    found = [last_experts(prepare(narrow(2, experts, 1))) for experts in (8, 16, 64)]
    assert len(set(found)) == 1
    assert 50 < found[0] <= most


def test_a_loop_is_what_is_counted_against(monkeypatch):
    """The same count of Paddle's products, one expert after the other, grows with the experts: it sees what it should.

    A CPU's own loop launches nothing of Paddle's.
    """

    def one_by_one(x, weight, lora_x, a, b, counts):
        rows = zip(paddle.split(x, counts), weight, a, b, strict=True)
        return paddle.concat([part @ w + part @ low @ high for part, w, low, high in rows])

    monkeypatch.setattr("vl2.ways.takes_batches", lambda place: False)
    monkeypatch.setattr("vl2.ways.takes_float32_kernels", lambda x: False)
    monkeypatch.setattr("vl2.grouped_linear.ExpertLoop", SimpleNamespace(apply=one_by_one))
    few, many = (last_experts(prepare(narrow(2, experts, 1))) for experts in (8, 16))
    assert few > 200 and many > 1.7 * few


@pytest.mark.slow
def test_a_step_of_two_layers(monkeypatch):
    """Whole steps with 8 and with 64 experts."""
    monkeypatch.setattr("vl2.expert_rows.choose_blocks", blocks_of(ONE))
    steps = [prepare(narrow(2, experts, 1)) for experts in (8, 64)]
    few, many = (count(lambda step=step: whole(step)).total() for step in steps)
    assert few == many


def test_after_the_backward_pass_two_launches_a_tensor():
    """A norm and AdamW's for each trainable tensor; the rest is for all of them together."""
    names = [f"language.model.layers.{i}.self_attn.q_proj.weight" for i in range(20)]
    weights = {name: paddle.create_parameter([4, 3], "float32") for name in names}
    step = launches.Step(None, {}, weights, build_optimizer(weights, 1e-3, weight_decay=0.1))

    def work() -> None:
        for weight in weights.values():
            weight.grad = paddle.full_like(weight, 9.0)
        launches.update(step)

    launched = count(work)
    made = launched.pop("full_like")
    assert (made, launched["squared_l2_norm"], launched["adamw"]) == (20, 20, 20)
    assert launched["check_finite_and_unscale"] == 1  # clipping
    assert launched.total() <= 2 * 20 + 6
