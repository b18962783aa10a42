"""A step waits for a GPU once an expert layer and five times more; a generated token, once an expert layer and once."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle.optimizer.lr import LambdaDecay

from tests.bench.launches import narrow, prepare, update
from tests.precision.waits import waits
from train.run.gradients import any_rank
from train.run.micro_batch import gather_losses, train_pack
from train.run.optim import build_optimizer
from vl2.generate import generate
from vl2.parameters import set_quantised
from vl2.quantised import kept_in, quantise, quantised_of

LAYERS, DENSE = 4, 1  # of narrow(), which is Tiny with other numbers


@pytest.fixture(scope="module")
def step():
    """LoRA on a narrow Tiny, recomputed, with an image; experts in batches, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vl2.ways.takes_batches", lambda place: True)
        yield prepare(narrow(LAYERS, 8, 2))


def test_a_step(step):
    """It was once an expert layer and 13 times more; before that three for an expert layer and one for an attention."""
    scheduler = LambdaDecay(1e-4, lambda number: 1 / (1 + number))
    step = step._replace(optimizer=build_optimizer(step.parameters, scheduler, weight_decay=0.1))
    batch = {**step.batch, "pack": np.array(0), "supervised_in_step": np.array(70)}
    plan = SimpleNamespace(samples=lambda number: 1)

    def whole() -> None:
        done = [train_pack(step.model, batch, plan=plan, step=0, seed=0, aux_weight=0.001)]
        gather_losses(done)
        update(step)
        scheduler.step()
        any_rank(False, False)

    whole()
    with waits() as found:
        whole()
    layers = {where: times for where, times in found.items() if "expert_rows.py" in where}
    assert list(layers.values()) == [LAYERS - DENSE], found  # the second time, in backward, it is known
    others = {where.partition(":")[0]: times for where, times in (found - type(found)(layers)).items()}
    assert others == {
        "to_tensor vl2/constant_tensors.py": 2,  # numbers of the pack, and of its load balance
        "to_tensor vl2/model.py": 1,  # tiles
        "tolist train/run/micro_batch.py": 1,  # losses of the step's packs
        "numpy train/run/gradients.py": 1,  # their norm
    }


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_in_few_bits_wait_for_nothing(kind, monkeypatch):
    """Forward and backward on them, some experts at a time, wait where those on whole weights do."""
    monkeypatch.setattr("vl2.ways.takes_batches", lambda place: True)
    monkeypatch.setattr("vl2.quantised.SLICE", 3 * 40 * 32)
    found = []
    for few in (False, True):
        step = prepare(narrow(2, 8, 1))
        for path, parameter in step.model.model.named_parameters() if few else ():
            if "lora" not in path and (kept := kept_in(path, kind)) != "none":
                values = parameter.numpy().reshape(-1, *parameter.shape[-2:])
                arrays = [quantise(kept, np.ascontiguousarray(matrix)) for matrix in values]
                stacked = {name: np.stack([each[name] for each in arrays]) for name in arrays[0]}
                set_quantised(step.model.model, path, quantised_of(kept, parameter.shape, stacked))

        def whole(step=step) -> None:
            loss, count = step.model.model.loss(step.batch)
            (loss / count).backward()

        whole()
        with waits() as seen:
            whole()
        found.append(seen)
    assert found[0] == found[1] and sum(found[0].values()) > 2


def test_a_generated_token(step):
    """All that goes to the host are the tokens' ids and the counts of the experts; nothing goes back."""
    prompts = [{"input_ids": np.arange(20, 20 + n)} for n in (12, 7)]
    of_tokens = {}
    for tokens in (2, 6):
        with waits() as found:
            generate(step.model.model, prompts, eos_id=-1, max_new_tokens=tokens)
        of_tokens[tokens] = sum(found.values())
    assert of_tokens[6] - of_tokens[2] == 4 * (LAYERS - DENSE + 1), found


@pytest.mark.parametrize(
    ("wait", "where"),
    [
        (lambda x: x.numpy(), "numpy"),
        (lambda x: bool((x > 0).all()), "bool"),
        (lambda x: float(x.sum()), "float"),
        (lambda x: x[[0, 2]], "getitem"),
        (lambda x: x.set_value(np.zeros(4, "float32")), "set_value"),
        (lambda x: paddle.nonzero(x), "nonzero"),
        (lambda x: paddle.bincount(x.astype("int64")), "bincount"),
        (lambda x: paddle.masked_select(x, x > 0), "masked_select"),
        (lambda x: paddle.unique(x), "unique"),
        (lambda x: paddle.repeat_interleave(x, x.astype("int64")), "repeat_interleave_with_tensor_index"),
        (lambda x: paddle.to_tensor([1, 2]), "to_tensor"),
    ],
)
def test_what_waits_is_seen(wait, where):
    x = paddle.to_tensor([1.0, 0.0, 2.0, 1.0])
    with waits() as found:
        wait(x)
    assert [name.split()[0] for name in found] == [where]


def test_what_does_not_wait_is_not_counted():
    x = paddle.ones([4, 4])
    with waits() as found:
        y = paddle.matmul(x, x)[1:, 0] * 2.0 + paddle.full([3], 1.0)
        y[0] = 5.0
        paddle.to_tensor(y)
        paddle.arange(4)
        x.set_value(x + 1)
    assert not found
