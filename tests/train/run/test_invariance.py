"""What must not change the numbers: how samples are packed, how a batch is cut into micro-batches, recomputation.

Tolerances: 1e-5 for losses and 1e-4 (2-norm, relative) for gradients. Float32 sums in another order differ by 1e-6 and
1e-5 here; a sample that saw its neighbour, or a mean of means, is off by 1e-2.
"""

import json
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from data.packs import PackDataset
from data.plan import PackSpec, Plan
from train.config.load import load_config
from train.run.build import build_base, make_trainable, open_base
from train.run.build_data import build_data
from train.run.optim import lr_factor
from vl2.checkpoint.tensor_files import read_header

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parts(arguments, tmp_path_factory):
    """Data, and a model with adapters everywhere that are no longer zero."""
    groups = "[attention,experts,shared_experts,dense_mlp,vision,projector]"
    run_dir = tmp_path_factory.mktemp("run")
    config = load_config(arguments(run_dir, "lora.dropout=0", f"lora.groups={groups}", "data.max_tokens=8192"))
    folder = open_base(config)
    data, base = build_data(config, folder), build_base(config, folder)
    model, _ = make_trainable(base, config, candidates=data.candidates, base_fingerprint="")
    draw = np.random.default_rng(3)
    for parameter in model.factors().values():
        parameter.set_value(draw.normal(0, 0.05, parameter.shape).astype("float32"))
    return data, model


def packs_of(data, groups: list[list[int]]) -> PackDataset:
    """The given samples packed as given."""
    sizes = data.dataset.sizes
    specs = [
        PackSpec(
            samples=tuple(group),
            tokens=sum(sizes[i].tokens for i in group),
            tiles=sum(sizes[i].tiles for i in group),
            supervised=sum(sizes[i].supervised for i in group),
        )
        for group in groups
    ]
    settings = {"data.max_tokens": 8192}
    plan = Plan(
        packs=tuple(specs), packs_per_step=len(specs), steps_per_epoch=(1,), whole_epochs=(1,), settings=settings
    )
    return PackDataset(data.dataset.records, plan, sizes, data.tokenizer, data.candidates)


def loss_and_gradients(model, batch) -> tuple[float, dict[str, np.ndarray]]:
    model.train()
    loss, _ = model.loss(batch)
    loss.backward()
    grads = {name: 0.0 if p.grad is None else p.grad.numpy() for name, p in model.factors().items()}
    for p in model.factors().values():
        p.clear_gradient(set_to_zero=False)
    return float(loss), grads


def losses_by_sample(model, batch) -> list[float]:
    """Sum of -log p of each sample of a pack."""
    model.eval()
    with paddle.no_grad():
        logits = model.language.logits(model(batch))
        each = F.cross_entropy(logits, paddle.to_tensor(batch["labels"]), reduction="none", ignore_index=-100)
    bounds = np.cumsum(batch["seq_lens"])[:-1]
    return [float(part.sum()) for part in np.split(each.numpy().ravel(), bounds)]


def test_packed_equals_separate(parts, expert_way):
    """Two samples with an image and four of text: loss of each, and the gradient of every factor."""
    data, model = parts
    pictured = [i for i, size in enumerate(data.dataset.sizes) if size.tiles][:2]
    text = [i for i, size in enumerate(data.dataset.sizes) if not size.tiles][:4]
    samples = [text[0], pictured[0], text[1], text[2], pictured[1], text[3]]
    together, separate = packs_of(data, [samples])[0], packs_of(data, [[i] for i in samples])

    assert losses_by_sample(model, together) == pytest.approx(
        [losses_by_sample(model, separate[i])[0] for i in range(len(samples))], rel=1e-5
    )
    total, packed = loss_and_gradients(model, together)
    alone = [loss_and_gradients(model, separate[i]) for i in range(len(samples))]
    assert total == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)
    for name, grad in packed.items():
        expected = sum(grads[name] for _, grads in alone)
        assert np.linalg.norm(expected) > 0, name
        assert np.linalg.norm(grad - expected) < 1e-4 * np.linalg.norm(expected), name


def read(run_dir: Path):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    header = read_header(run_dir / "adapter" / "peft_model.safetensors")[0]
    return lines, {name: stored.read() for name, stored in header.items()}


def test_micro_batches_equal_one_batch(run, tmp_path):
    """The data as one pack a step, or as five: with sums divided once, the same losses, gradients and weights.

    The load-balance loss, a hundred times heavier than usual, is a mean over the step's conversations likewise.

    Warm-up and a small rate keep AdamW from blowing rounding up: it divides a gradient by its own size.
    """
    common = ("lora.dropout=0", "optim.aux_loss=0.1", "max_steps=3", "optim.lr=1e-3", "optim.eps=1e-4")
    assert run(tmp_path / "one", *common, "data.max_tokens=8192", "packs_per_step=1") == 0
    assert run(tmp_path / "five", *common, "data.max_tokens=640", "packs_per_step=5") == 0
    (ours, weights), (theirs, others) = read(tmp_path / "one"), read(tmp_path / "five")
    assert ours[0]["tokens"] == theirs[0]["tokens"] and ours[0]["supervised"] == theirs[0]["supervised"]
    for key in ("loss", "aux_loss", "grad_norm"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-5), key
    for name, weight in weights.items():
        assert np.abs(weight - others[name]).max() < 1e-4 * np.abs(weight).max(), name


def test_recompute_and_storage_change_nothing(run, tmp_path, monkeypatch):
    """Dropout on. The goldens' weights are exact in bfloat16, and CPU computes in float32 whatever is stored.

    One that multiplies bfloat16 adds up the same products in another order. eps is large: AdamW moves a weight whose
    gradient is mere rounding by a whole lr otherwise.
    """
    assert run(tmp_path / "as here", "max_steps=2", "optim.aux_loss=0.1", "optim.eps=1e-3", "precision=bf16") == 0
    monkeypatch.setattr("vl2.stored_products.takes_bfloat16", lambda: False)
    for name, more in {
        "plain": ("recompute=0",),
        "every": ("recompute=1", "precision=bf16"),
        "second": ("recompute=2", "precision=bf16"),
        "half": ("recompute=0", "precision=fp16"),
    }.items():
        assert run(tmp_path / name, "max_steps=2", "optim.aux_loss=0.1", "optim.eps=1e-3", *more) == 0
    expected, weights = read(tmp_path / "plain")
    for name in ("every", "second"):
        lines, others = read(tmp_path / name)
        for key in ("loss", "aux_loss"):
            assert [line[key] for line in lines] == [line[key] for line in expected]
        assert all(np.array_equal(weights[key], others[key]) for key in weights)
    # Weights below 6e-5 are not exact in float16. A regression: it was taken for bfloat16, whose name ends in it.
    half, whole = (
        [(line["loss"], line["grad_norm"]) for line in lines] for lines in (read(tmp_path / "half")[0], expected)
    )
    assert half != whole
    here = [(line["loss"], line["grad_norm"]) for line in read(tmp_path / "as here")[0]]
    for found, known in zip([*half, *here], [*whole, *whole], strict=True):
        assert found == pytest.approx(known, rel=1e-6)


def test_rate_in_the_log_is_the_schedules(run, tmp_path):
    assert (
        run(tmp_path / "run", "max_steps=4", "optim.warmup_ratio=0.5", "optim.min_lr_ratio=0.2", "optim.lr=1e-3") == 0
    )
    expected = [1e-3 * lr_factor(step, 4, schedule="cosine", warmup_ratio=0.5, min_lr_ratio=0.2) for step in range(4)]
    assert [line["lr"] for line in read(tmp_path / "run")[0]] == pytest.approx(expected, rel=1e-12)
