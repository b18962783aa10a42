"""Which weights the first step must reach, zeros for those it may leave out, and clipping."""

import math

import numpy as np
import paddle
import pytest

from train.run import gradients
from train.run.gradients import (
    ReachCheck,
    any_rank,
    clip_gradients,
    fill_zeros,
    gather_rows,
    gradient_norm,
    has_overflow,
    reduction_slices,
    sum_over_ranks,
)

TEXT, IMAGE = "language.model.layers.0.self_attn.q_proj.lora_A", "projector.layers.0.lora_A"


def test_a_text_weight_must_be_reached_in_the_first_step():
    with pytest.raises(
        RuntimeError, match=r"no gradient reaches 1 trainable weights in the first step: language\.model"
    ):
        ReachCheck([TEXT, IMAGE]).update({IMAGE}, has_images=True)


def test_an_image_weight_must_be_reached_in_the_first_step_with_images():
    check = ReachCheck([TEXT, IMAGE])
    check.update({TEXT}, has_images=False)
    check.update({TEXT}, has_images=False)
    with pytest.raises(RuntimeError, match=r"projector\.layers\.0\.lora_A"):
        check.update({TEXT}, has_images=True)


def test_what_was_reached_once_may_rest():
    check = ReachCheck([TEXT, IMAGE])
    check.update({TEXT}, has_images=False)
    check.update({IMAGE}, has_images=True)
    check.update(set(), has_images=True)


def test_zeros_for_what_was_not_reached():
    reached, idle = (paddle.create_parameter([2], "float32") for _ in range(2))
    (reached * 3.0).sum().backward()
    fill_zeros({"reached": reached, "idle": idle})
    assert reached.grad.numpy().tolist() == [3.0, 3.0]
    assert idle.grad.numpy().tolist() == [0.0, 0.0]
    sum_over_ranks({"reached": reached, "idle": idle})  # one process: as it is
    assert reached.grad.numpy().tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("sizes", "slices"),
    [
        ({"a": 4, "b": 6, "c": 1}, ["ab", "c"]),
        ({"a": 25, "b": 3, "c": 8, "d": 1}, ["a", "b", "cd"]),  # one that is larger goes alone
        ({}, []),
    ],
)
def test_slices_hold_a_bounded_number_of_bytes(sizes, slices, monkeypatch):
    monkeypatch.setattr(gradients, "SLICE_BYTES", 10)
    assert ["".join(names) for names in reduction_slices(sizes)] == slices


def test_gradients_are_sent_in_slices(monkeypatch):
    """Paddle copies all buckets into one row before the first is sent: 13.4 GB for all weights of Tiny."""
    monkeypatch.setattr(gradients, "SLICE_BYTES", 40)
    monkeypatch.setattr("paddle.distributed.get_world_size", lambda group=None: 2)
    monkeypatch.setattr(gradients, "barrier", lambda: None)
    parameters = {name: paddle.create_parameter([size], "float32") for name, size in zip("abc", (6, 4, 3), strict=True)}
    for value, parameter in enumerate(parameters.values(), start=1):
        (parameter * float(value)).sum().backward()
    sent = []

    def all_reduce(tensor, group=None):
        sent.append(tensor.shape[0])
        tensor.scale_(2.0)  # the other rank has the same

    monkeypatch.setattr("paddle.distributed.all_reduce", all_reduce)
    sum_over_ranks(parameters)
    assert sent == [10, 3]  # numbers of 4 bytes
    assert [set(p.grad.numpy().tolist()) for p in parameters.values()] == [{2.0}, {4.0}, {6.0}]


def test_gathering_in_one_process():
    rows = np.arange(6.0).reshape(2, 3)
    assert gather_rows(rows) is rows


def test_a_flag_of_one_process():
    assert any_rank(True, False) == [True, False]


@pytest.fixture
def linear():
    """Parameters of a layer with gradients: sums of x = (4, 6, 8, 10) in each of 3 columns, bias 2."""
    layer = paddle.nn.Linear(4, 3)
    layer(paddle.arange(8, dtype="float32").reshape([2, 4])).sum().backward()
    return dict(layer.named_parameters())


NORM = math.sqrt(3 * (16 + 36 + 64 + 100) + 3 * 4)


def own_norm(parameters) -> float:
    return math.sqrt(sum((p.grad.numpy().astype("float64") ** 2).sum() for p in parameters.values()))


def test_clipping_scales_to_the_norm(linear):
    norm = gradient_norm(linear)[0]
    assert norm == pytest.approx(NORM, rel=1e-6) == own_norm(linear)
    clip_gradients(linear, norm, 0.5)
    assert own_norm(linear) == pytest.approx(0.5, rel=1e-6)
    assert linear["bias"].grad.numpy() == pytest.approx(2 * 0.5 / NORM, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, 30.0])
def test_no_clipping_below_the_greatest_norm_or_with_zero(linear, max_norm):
    clip_gradients(linear, gradient_norm(linear)[0], max_norm)
    assert own_norm(linear) == pytest.approx(NORM, rel=1e-6)


def test_a_gradient_that_is_not_finite_shows_in_the_norm(linear):
    assert not has_overflow(linear)
    linear["bias"].grad = paddle.to_tensor([2.0, math.nan, 2.0])
    assert has_overflow(linear)
    assert math.isnan(gradient_norm(linear)[0])


def test_a_norm_that_overflows_by_itself_is_no_overflow_of_a_gradient(linear):
    """1e20 is finite in float32, its square is not: fp16's scaler would not leave such a step out."""
    linear["bias"].grad = paddle.to_tensor([2.0, 1e20, 2.0])
    assert math.isinf(gradient_norm(linear)[0])
    assert not has_overflow(linear)
