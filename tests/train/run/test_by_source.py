"""The loss of each source of a mixture, beside the loss that is trained on and without touching it."""

import numpy as np
import paddle
import pytest

from data.plan import PackSpec
from tests.places import GOLDENS
from train.run.by_source import Sources, sums_by_source
from vl2.config import VL2Config
from vl2.language import HEAD_CHUNK, LanguageModel


@pytest.fixture(scope="module")
def language():
    return LanguageModel(VL2Config.from_folder(GOLDENS / "nano_tiny").language)


SOURCES = Sources(
    names=("photos", "text"), of_sample=np.array([1, 0, 0, 1]), supervised=np.array([2, 5, 1, 3], dtype=np.int32)
)


def pack(*samples: int) -> PackSpec:
    return PackSpec(samples=samples, tokens=0, tiles=0, supervised=0)


def test_tokens_know_their_source():
    """The example of the docstring: a sample of source 1, then one of source 0."""
    labels = np.array([-100, -100, 7, 8, -100, 9])
    assert SOURCES.of_tokens(pack(0, 2), labels, np.array([4, 2])).tolist() == [1, 1, 0]


def test_tokens_of_a_step_are_counted_by_source():
    assert SOURCES.tokens([pack(0, 1), pack(3), pack()]).tolist() == [5, 5]
    assert SOURCES.tokens([pack(1, 1, 2)]).tolist() == [11, 0]  # a row that an epoch takes twice


def test_sums_by_source():
    pieces = [paddle.to_tensor([[1.0], [2.0]]), paddle.to_tensor([[4.0]])]
    assert sums_by_source(pieces, np.array([1, 0, 1]), 3).tolist() == [2.0, 5.0, 0.0]
    assert sums_by_source([], np.zeros(0, dtype=np.int32), 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("count", [5, HEAD_CHUNK + 3])
def test_total_and_gradient_are_the_same_bits(count, language):
    """Losses of single tokens are kept beside the sum, in one chunk or more; the sum and its gradient do not move."""
    random = np.random.default_rng(0)
    hidden = random.normal(size=(count, language.model.config.hidden_size)).astype("float32")
    labels = paddle.to_tensor(random.integers(0, language.model.config.vocab_size, count))

    def summed(of_tokens):
        x = paddle.to_tensor(hidden, stop_gradient=False)
        total = language.loss_sum(x, labels, of_tokens)
        (total / 7).backward()
        return float(total), x.grad.numpy()

    kept: list[paddle.Tensor] = []
    plain, split = summed(None), summed(kept)
    assert plain[0] == split[0]
    assert np.array_equal(plain[1], split[1])
    assert all(piece.stop_gradient for piece in kept)
    losses = np.concatenate([piece.numpy().ravel() for piece in kept])
    assert losses.shape == (count,)
    assert losses.sum() == pytest.approx(plain[0], rel=1e-5)
    expected = paddle.nn.functional.cross_entropy(
        language.logits(paddle.to_tensor(hidden)), labels, reduction="sum"
    )  # as it was before losses of tokens were kept
    if count <= HEAD_CHUNK:
        assert float(expected) == plain[0]
