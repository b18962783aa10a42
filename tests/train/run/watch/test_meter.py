"""What is measured of a step: the load of the experts, time spent waiting, rates, groups."""

import dataclasses
import re

import numpy as np
import paddle
import pytest

from tests.places import GOLDENS, ROOT
from tests.train.run.test_run import metrics
from tests.vl2.random_models import new_model
from train.run.gradients import gradient_norm
from train.run.watch.meter import StepMeter, expert_layers, expert_load
from train.run.watch.step_metrics import StepMetrics
from vl2.config import VL2Config


def test_load_of_experts():
    busiest, entropy = expert_load(np.array([[3, 1, 0, 0], [2, 2, 2, 2], [0, 0, 0, 9]]))
    assert busiest == [0.75, 0.25, 1.0]
    assert entropy == pytest.approx([0.405639, 1.0, 0.0])
    assert str(entropy[2]) == "0.0"


@pytest.mark.parametrize("recompute", [0, 1])
def test_choices_are_counted_in_training_and_once(recompute):
    """A layer computed again in backward chose nothing new, and answers are no training."""
    config = VL2Config.from_folder(GOLDENS / "nano_tiny")
    model = new_model(config)
    model.set_recompute(recompute)
    ids = np.arange(5, 45)
    batch = {"input_ids": ids, "labels": ids, "position_ids": np.arange(40), "seq_lens": np.array([40])}
    meter = StepMeter(model, None, lr_scales={})
    model.train()
    for _ in range(2):
        model.loss(batch)[0].backward()
    language = config.language
    layers = expert_layers(model)
    assert list(layers) == [str(i) for i in range(language.num_hidden_layers) if language.is_moe(i)]
    _, *counts = meter.of_rank()
    by_layer = np.array(counts).reshape(len(layers), -1)
    assert by_layer.shape[1] == language.n_routed_experts
    assert by_layer.sum(axis=1).tolist() == [2 * 40 * language.num_experts_per_tok] * len(layers)
    model.eval()
    with paddle.no_grad():
        model.loss(batch)
    assert not any(meter.of_rank())


def test_time_spent_waiting_is_that_of_the_packs(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr("train.run.watch.meter.time.perf_counter", lambda: next(clock))
    meter = StepMeter(paddle.nn.Linear(2, 2), None, lr_scales={})
    meter.begin()
    packs = iter("ab")
    assert (meter.fetch(packs), meter.fetch(packs), meter.of_rank()) == ("a", "b", [2.5])


def test_squares_of_the_groups_norms_add_up():
    parameters = {name: paddle.create_parameter([3], "float32") for name in ("a", "b", "c")}
    for value, parameter in enumerate(parameters.values(), 1):
        parameter.grad = paddle.full([3], float(value))
    norm, norms = gradient_norm(parameters, {"one": ["a", "c"], "two": ["b"]})
    assert norms == {"one": pytest.approx(30**0.5), "two": pytest.approx(12**0.5)}
    assert norm == pytest.approx(42**0.5)


@pytest.mark.slow
def test_every_number_of_a_step(whole):
    """Of LoRA on four groups of a model with experts, one source."""
    lines = metrics(whole)
    for line in lines:
        assert not {"loss_of", "supervised_of"} & line.keys()
        assert list(line["lr_of"].values()) == [line["lr"]] * 4
        assert (
            line["grad_norm_of"].keys()
            == line["lr_of"].keys()
            == {"attention", "experts", "shared_experts", "dense_mlp"}
        )
        assert sum(norm**2 for norm in line["grad_norm_of"].values()) == pytest.approx(line["grad_norm"] ** 2)
        assert 0 <= line["data_wait"] < 1
        recent = [one["seconds"] for one in lines[: line["step"]]]
        assert line["seconds_left"] == pytest.approx((len(lines) - line["step"]) * sum(recent) / len(recent))
        for what in ("tokens", "supervised", "tiles", "samples"):
            assert line[f"{what}_per_second"] == pytest.approx(line[what] / line["seconds"])
        assert line["expert_busiest_of"].keys() == line["expert_entropy_of"].keys() != set()
        assert all(0 < share <= 1 for table in ("busiest", "entropy") for share in line[f"expert_{table}_of"].values())
    assert sum(line["samples"] for line in lines) > 20


def test_readme_explains_every_number():
    table = (ROOT / "README.md").read_text("utf-8").partition("| in `metrics.jsonl` |")[2].partition("\n\n")[0]
    said = set(re.findall(r"`(\w+)`", table))
    rates = {f"{name}_per_second" for name in ("tokens", "supervised", "tiles", "samples")}
    assert said | rates == {field.name for field in dataclasses.fields(StepMetrics)}
