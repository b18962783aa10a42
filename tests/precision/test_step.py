"""A whole training step in emulated bfloat16 and float16 against the same step in float32.

Tolerances: loss 5e-3, logits 0.02 in the mean, cosine of each group's gradient 0.99. The official code in bfloat16 is
off by 2e-3 and 0.014 on one of these conversations (nano_base). Routing is pinned to float32's choices, because a token
that changes its expert changes its logits by far more than rounding; what happens without is reported. What these runs
take is looked up among Paddle's kernels for GPUs, see gpu_kernels.py.
"""

import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from tests.precision.emulation import MixedOperands, half_precision_on_cpu
from tests.precision.gpu_kernels import missing
from tests.precision.taken import taken
from train.run.gradients import clip_gradients, gradient_norm, has_overflow
from train.run.optim import build_optimizer, loss_scale
from vl2.generate import generate
from vl2.linear import linear
from vl2.lora_layers import LoRALinear
from vl2.lora_settings import GROUPS
from vl2.moe import Router

pytestmark = pytest.mark.slow

PARTS = {"vision": r"vision\.", "projector": r"projector\.|image_newline|view_sep", "language": r"language\."}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one optimizer step gave."""

    loss: float
    logits: np.ndarray  # [T, V], before the step
    choices: list[paddle.Tensor]  # of each router [T, C]
    grads: dict[str, np.ndarray]  # unscaled
    moved: dict[str, float]  # largest change of each weight


def routers(model) -> list[Router]:
    return [layer for layer in model.sublayers() if isinstance(layer, Router)]


def pin_choices(model, choices) -> None:
    for router, chosen in zip(routers(model), choices, strict=True):
        router.choose = lambda scores_TE, chosen=chosen: chosen


def step(model, pack, scaler=None) -> Step:
    """Forward, backward, clipping and AdamW, as the trainer does them."""
    parameters = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    optimizer = build_optimizer(parameters, 1e-3, weight_decay=0.1)
    choices = []
    hooks = [
        router.register_forward_post_hook(lambda _, x, routing: choices.append(routing.experts_TC))
        for router in routers(model)
    ]
    with paddle.no_grad():
        logits = model.language.logits(model(pack)).numpy()
    for hook in hooks:
        hook.remove()
    before = {name: p.numpy() for name, p in parameters.items()}
    loss_sum, count = model.loss(pack)
    loss = loss_sum / count
    (loss * loss_scale(scaler)).backward()
    assert all(p.grad.dtype == p.dtype == paddle.float32 for p in parameters.values())
    if scaler:
        scaler.unscale_(optimizer)
    grads = {name: p.grad.numpy() for name, p in parameters.items()}
    if not has_overflow(parameters):
        clip_gradients(parameters, gradient_norm(parameters)[0], max_norm=1.0)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    moved = {name: float(np.abs(p.numpy() - before[name]).max()) for name, p in parameters.items()}
    return Step(loss=float(loss), logits=logits, choices=choices, grads=grads, moved=moved)


def cosines(ours: Step, theirs: Step, groups: dict[str, str]) -> dict[str, float]:
    found = {}
    for group, pattern in groups.items():
        names = [name for name in theirs.grads if re.match(pattern, name)]
        a, b = (np.concatenate([step.grads[name].ravel() for name in names]) for step in (ours, theirs))
        found[group] = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return found


def compare(name: str, ours: Step, theirs: Step, groups: dict[str, str]) -> tuple[float, float, float, str]:
    """(difference of the loss, mean difference of the logits, least cosine of a group's gradient, all in a line)."""
    loss, logits = ours.loss - theirs.loss, float(np.abs(ours.logits - theirs.logits).mean())
    found = cosines(ours, theirs, groups)
    group = min(found, key=found.__getitem__)
    sorted_ = [[np.sort(choice.numpy()) for choice in step.choices] for step in (ours, theirs)]
    other = np.mean([(a != b).any(axis=1).mean() for a, b in zip(*sorted_, strict=True)])
    line = f"{name:<40} loss {loss:+.1e}, logits {logits:.4f}, least cosine {found[group]:.5f} ({group})"
    return loss, logits, found[group], f"{line}, tokens with another expert {other:.1%}"


@pytest.fixture(scope="module")
def exact(nano, pack):
    """exact(family, full): the step in float32, made once."""
    made: dict[tuple[str, bool], Step] = {}

    def get(family: str, full: bool = False) -> Step:
        if (family, full) not in made:
            made[family, full] = step(nano(family, "float32", full=full), pack)
        return made[family, full]

    return get


@pytest.fixture
def scaler_on_cpu(monkeypatch):
    """Paddle turns its loss scaler off where there is no GPU; its kernels are there."""
    gpu = SimpleNamespace(_expected_place=SimpleNamespace(is_gpu_place=lambda: True))
    monkeypatch.setattr("paddle.amp.grad_scaler._dygraph_tracer", lambda: gpu)


@pytest.mark.parametrize(
    ("family", "dtype", "flash"),
    [
        ("nano_tiny", "bfloat16", True),
        ("nano_small", "bfloat16", True),
        ("nano_base", "bfloat16", True),
        ("nano_small", "bfloat16", False),
        ("nano_tiny", "float16", False),
        ("nano_base", "float16", True),
    ],
)
def test_lora_step(nano, pack, exact, report, scaler_on_cpu, family, dtype, flash):
    """Recompute on, as on a GPU; attention as on cards with and without the flash kernel; float16 with its scaler."""
    expected = exact(family)
    scaler = paddle.amp.GradScaler(init_loss_scaling=2.0**15) if dtype == "float16" else None
    model = nano(family, dtype)
    frozen = {p.dtype for p in model.parameters() if p.stop_gradient}
    assert frozen == {getattr(paddle, dtype)}
    model.set_recompute(1)
    pin_choices(model, expected.choices)
    with half_precision_on_cpu(flash) as ran, taken() as calls:
        found = step(model, pack, scaler)
    assert len(calls) > 90 and not missing(calls)
    loss, logits, cosine, line = compare(f"{family} {dtype} {'flash' if flash else 'plain'}", found, expected, GROUPS)
    report(line)
    assert ran["matmul"] > 200 and bool(ran.get("flash_attn_unpadded")) is flash
    assert abs(loss) <= 5e-3 and logits <= 0.02 and cosine >= 0.99
    assert loss != 0  # it did run in another precision
    # AdamW's first step moves every weight that has a gradient by about the learning rate.
    assert all(0 < moved < 3e-3 for moved in found.moved.values())
    assert scaler is None or loss_scale(scaler) == 2.0**15


@pytest.mark.parametrize("family", ["nano_base"])
def test_full_step(nano, pack, exact, report, family):
    """Float32 weights that train, computed in bfloat16."""
    expected = exact(family, True)
    model = nano(family, "bfloat16", full=True)
    pin_choices(model, expected.choices)
    with half_precision_on_cpu(), taken() as calls:
        found = step(model, pack)
    assert len(calls) > 90 and not missing(calls)
    loss, logits, cosine, line = compare(f"{family} bfloat16 full", found, expected, PARTS)
    report(line)
    assert 0 < abs(loss) <= 5e-3 and logits <= 0.02 and cosine >= 0.99


@pytest.mark.parametrize(
    ("family", "dtype", "frozen"),
    [("nano_tiny", "bfloat16", "nf4"), ("nano_small", "bfloat16", "int8"), ("nano_base", "float16", "nf4")],
)
def test_step_on_weights_in_few_bits(nano, pack, report, scaler_on_cpu, monkeypatch, family, dtype, frozen):
    """Against float32 with the same few bits: made whole by operations that a GPU has, some experts at a time."""
    monkeypatch.setattr("vl2.quantised.SLICE", 3 * 32 * 64)
    expected = step(nano(family, "float32", frozen=frozen), pack)
    scaler = paddle.amp.GradScaler(init_loss_scaling=2.0**15) if dtype == "float16" else None
    model = nano(family, dtype, frozen=frozen)
    model.set_recompute(1)
    pin_choices(model, expected.choices)
    with half_precision_on_cpu(), taken() as calls:
        found = step(model, pack, scaler)
    assert len(calls) > 90 and not missing(calls)
    loss, logits, cosine, line = compare(f"{family} {dtype} {frozen}", found, expected, GROUPS)
    report(line)
    assert 0 < abs(loss) <= 5e-3 and logits <= 0.02 and cosine >= 0.99
    assert all(0 < moved < 3e-3 for moved in found.moved.values())


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("nano_tiny", "bfloat16"), ("nano_small", "bfloat16"), ("nano_base", "bfloat16"), ("nano_small", "float16")],
)
def test_free_routing_is_reported(nano, pack, exact, report, scaler_on_cpu, family, dtype):
    scaler = paddle.amp.GradScaler(init_loss_scaling=2.0**15) if dtype == "float16" else None
    with half_precision_on_cpu():
        found = step(nano(family, dtype), pack, scaler)
    *_, line = compare(f"{family} {dtype} free routing", found, exact(family), GROUPS)
    report(line)
    assert np.isfinite(found.logits).all() and all(0 < moved < 3e-3 for moved in found.moved.values())


def test_overflow_leaves_the_step_out(nano, pack, scaler_on_cpu):
    """float16 ends at 65,504: with the loss scaled by 2^30 gradients overflow, nothing moves, the scale is halved."""
    scaler = paddle.amp.GradScaler(init_loss_scaling=2.0**30)
    with half_precision_on_cpu():
        found = step(nano("nano_tiny", "float16"), pack, scaler)
    assert set(found.moved.values()) == {0.0}
    assert loss_scale(scaler) == 2.0**29


@pytest.mark.parametrize(
    ("family", "dtype"), [("nano_tiny", "bfloat16"), ("nano_base", "bfloat16"), ("nano_base", "float16")]
)
def test_generation(nano, pack, family, dtype):
    """Chunked prefill and decoding with the cache, MLA's folded form included: 16-bit all the way, likely tokens."""
    prompts = [{"input_ids": pack["input_ids"][-n:]} for n in (64, 40)]
    exact, model = nano(family, "float32"), nano(family, dtype)
    expected = generate(exact, prompts, eos_id=-1, max_new_tokens=6)
    with half_precision_on_cpu() as ran, taken() as calls:
        answers = generate(model, prompts, eos_id=-1, max_new_tokens=6, chunk=48)
    assert ran["matmul"] > 300 and len(calls) > 40 and not missing(calls)
    assert [answer[0] for answer in answers] == [answer[0] for answer in expected]


def test_mixed_operands_are_found(nano, pack, monkeypatch):
    """As PaddleNLP's own LoRALinear has them: a 16-bit input times a float32 factor; in forward, and in a backward."""

    def forward(self, x):
        return linear(x, self.weight, self.bias) + paddle.matmul(paddle.matmul(x, self.lora_A), self.lora_B)

    monkeypatch.setattr(LoRALinear, "forward", forward)
    with half_precision_on_cpu(), pytest.raises(MixedOperands, match=r"^matmul of bfloat16 and float32$"):
        nano("nano_tiny", "bfloat16").loss(pack)
    monkeypatch.undo()

    class Careless(paddle.autograd.PyLayer):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.astype("float32"))
            return x * 2.0

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensor()[0]

    x = paddle.ones([2, 2], "bfloat16")
    x.stop_gradient = False
    # Paddle's backward engine turns exceptions into its own.
    with half_precision_on_cpu(), pytest.raises(OSError, match="MixedOperands: mul of bfloat16 and float32"):
        Careless.apply(x).sum().backward()
