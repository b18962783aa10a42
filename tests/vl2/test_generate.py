"""Sampling on the device, against the same in numpy, and what comes to the host."""

import numpy as np
import paddle
import pytest

from vl2.generate import generate
from vl2.sampling import sample

PROMPTS = [{"input_ids": np.arange(3, 3 + n, dtype=np.int64) * 7 % 900} for n in (30, 9, 17)]


@pytest.fixture(scope="module")
def model(config):
    from tests.vl2.random_models import IMAGE_ID
    from vl2.parameters import init_model

    return init_model(config, IMAGE_ID, seed=0)


def drawn_on_the_host(logits_V: np.ndarray, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """As it was done before: numpy's own choice among the nucleus."""
    scaled = logits_V.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    nucleus = order[before < top_p]
    return int(rng.choice(nucleus, p=probabilities[nucleus] / probabilities[nucleus].sum()))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.3), (0.01, 1.0), (1.0, 1e-6)])
def test_a_seed_draws_what_it_drew(temperature, top_p):
    logits = np.random.default_rng(1).normal(0, 3, [200, 500]).astype("float32")
    rng, same = np.random.default_rng(2), np.random.default_rng(2)
    expected = [drawn_on_the_host(row, temperature, top_p, rng) for row in logits]
    found = sample(paddle.to_tensor(logits), temperature, top_p, paddle.to_tensor(same.random(200)))
    assert found.dtype == paddle.int64
    assert found.tolist() == expected


def test_the_nucleus_of_the_docstring():
    logits = paddle.to_tensor(np.log([[0.2, 0.5, 0.3]] * 4).astype("float32"))
    draws = paddle.to_tensor([0.0, 0.62, 0.63, 0.999999], dtype="float64")
    assert sample(logits, 1.0, 0.6, draws).tolist() == [1, 1, 2, 2]


def test_a_prompt_draws_the_same_in_company_and_alone(model):
    """Each prompt has its own stream, also where the others end before it."""
    together = generate(model, PROMPTS, eos_id=-1, max_new_tokens=[2, 9, 5], temperature=1.0, seed=3)
    assert [len(answer) for answer in together] == [2, 9, 5]
    again = generate(model, PROMPTS[:2], eos_id=-1, max_new_tokens=[6, 9], temperature=1.0, seed=3)
    assert again[1] == together[1] and again[0][:2] == together[0]
    assert generate(model, PROMPTS[:2], eos_id=-1, max_new_tokens=9, temperature=1.0, seed=4)[1] != together[1]
    start = generate(model, PROMPTS[:1], eos_id=-1, max_new_tokens=6, temperature=1.0, seed=3, use_cache=False)
    assert start[0] == again[0]


def test_an_answer_ends_where_its_end_is_said(model):
    whole = generate(model, PROMPTS, eos_id=-1, max_new_tokens=8)
    end = whole[1][3]
    cut = [answer[: answer.index(end)] if end in answer else answer for answer in whole]
    assert len(cut[1]) <= 3
    assert generate(model, PROMPTS, eos_id=end, max_new_tokens=8) == cut


def test_an_image_token_in_an_answer_is_a_token(model, monkeypatch):
    """A model that says <image> was refused its own answer: the batch holds no tiles."""
    from tests.vl2.random_models import IMAGE_ID

    choices = iter([[IMAGE_ID], [7], [8]])
    monkeypatch.setattr(paddle.Tensor, "argmax", lambda self, axis: paddle.to_tensor(next(choices)))
    assert generate(model, PROMPTS[:1], eos_id=-1, max_new_tokens=3) == [[IMAGE_ID, 7, 8]]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_only_ids_come_to_the_host(model, monkeypatch, temperature):
    """All logits were sent as float32, 0.5 MB a token and prompt."""
    read, numpy, tolist = [], paddle.Tensor.numpy, paddle.Tensor.tolist
    monkeypatch.setattr(paddle.Tensor, "numpy", lambda self, *args: read.append(self.shape) or numpy(self))
    monkeypatch.setattr(paddle.Tensor, "tolist", lambda self: read.append(self.shape) or tolist(self))
    generate(model, PROMPTS, eos_id=-1, max_new_tokens=4, temperature=temperature)
    ids = [shape for shape in read if shape == [len(PROMPTS)]]
    assert len(ids) >= 4
    experts = model.config.language.n_routed_experts
    assert max(np.prod(shape) for shape in read) <= experts + 1
