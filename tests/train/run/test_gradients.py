"""Which weights the first step must reach, and zeros for those it may leave out."""

import numpy as np
import paddle
import pytest

from train.run.gradients import ReachCheck, fill_zeros, gather_rows, sum_over_ranks

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


def test_gathering_in_one_process():
    rows = np.arange(6.0).reshape(2, 3)
    assert gather_rows(rows) is rows
