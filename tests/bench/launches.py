"""Kernel launches of a training step on a GPU, counted without one: `bash launch.sh bench launches`.

The experts are computed in batches, as on a GPU, and Paddle's profiler sees every operation that starts a kernel (and
views, which cost the host as much and the device nothing). Shapes are real, widths tiny: they change no number. LoRA on
attention, routed and shared experts, every layer recomputed, one image, clipping and AdamW included. Attention takes
its plain path; the flash kernel would take fewer.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import paddle
from paddle import profiler

from tests.vl2.expert_loads import NANO_LOADS, zipf
from train.run.gradients import clip_gradients, fill_zeros, gradient_norm
from train.run.optim import build_optimizer
from vl2.checkpoint.published import PUBLISHED
from vl2.config import VL2Config
from vl2.expert_rows import Blocks, choose_blocks, dispatch
from vl2.json_object import read_json_object
from vl2.lora import VL2LoRAModel, apply_lora
from vl2.lora_settings import LoRASettings
from vl2.moe import MoE
from vl2.parameters import init_model
from vl2.recompute import recomputed

IMAGE_ID = 5
TOKENS = 512
# Layouts with all launches that there can be: one block, and a block with further parts.
ONE, BOTH = "one block", "further parts too"


class Step(NamedTuple):
    """A model and what it trains on."""

    model: VL2LoRAModel
    batch: dict[str, np.ndarray]
    parameters: dict[str, paddle.Tensor]
    optimizer: paddle.optimizer.AdamW


def narrow(layers: int, experts: int, vision_layers: int) -> VL2Config:
    """VL2-Tiny's structure with other numbers of layers and experts, in tiny widths."""
    raw = read_json_object(PUBLISHED["deepseek-vl2-tiny"].config)
    raw["language_config"] |= {
        "hidden_size": 40,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "vocab_size": 512,
        "num_hidden_layers": layers,
        "n_routed_experts": experts,
    }
    raw["vision_config"] |= {"width": 32, "heads": 2, "layers": vision_layers, "mlp_ratio": 2.0}
    raw["projector_config"] |= {"input_dim": 32, "n_embed": 40}
    return VL2Config.from_dict(raw)


def prepare(config: VL2Config) -> Step:
    """A model with adapters and its optimizer, and a pack of one conversation with one image of one tile."""
    model = apply_lora(
        init_model(config, IMAGE_ID, seed=0), LoRASettings(groups=("attention", "experts", "shared_experts"), rank=8)
    )
    model.set_recompute(1)
    model.train()
    parameters = {name: p for name, p in model.factors().items() if not p.stop_gradient}
    rng = np.random.default_rng(0)
    ids = rng.integers(10, 500, TOKENS)
    ids[8 : 8 + 421] = IMAGE_ID
    tile = rng.integers(0, 256, [1, 3, 384, 384], np.uint8)
    batch = {
        "input_ids": ids,
        "labels": np.where(np.arange(TOKENS) > 440, np.roll(ids, -1), -100),
        "position_ids": np.arange(TOKENS),
        "seq_lens": np.array([TOKENS]),
        "tiles": np.concatenate([tile, tile]),
        "grids": np.array([[1, 1]]),
    }
    return Step(model, batch, parameters, build_optimizer(parameters, 1e-4, weight_decay=0.1))


def update(step: Step) -> None:
    """What follows the backward pass: norm, clipping and AdamW."""
    fill_zeros(step.parameters)
    norm, _ = gradient_norm(step.parameters)
    clip_gradients(step.parameters, norm, norm / 2)
    step.optimizer.step()
    step.optimizer.clear_grad(set_to_zero=False)


def whole(step: Step) -> None:
    """An optimizer step of one pack, as the trainer makes it."""
    loss_sum, count = step.model.loss(step.batch)
    (loss_sum / count).backward()
    update(step)


def count(work: Callable[[], Any]) -> Counter[str]:
    """Kernels that `work` launches, by their names; it runs once before, to make what is kept."""
    work()
    watch = profiler.Profiler(targets=[profiler.ProfilerTarget.CPU], on_trace_ready=lambda _: None)
    watch.start()
    work()
    watch.stop()
    launched: Counter[str] = Counter()
    waiting = list(watch.profiler_result.get_data().values())
    while waiting:
        event = waiting.pop()
        waiting += event.children_node
        if event.type == profiler.TracerEventType.DygraphKernelLaunch:
            launched[event.name.removesuffix(" kernel launch")] += 1
    return launched


def blocks_of(kind: str) -> Callable[[list[int]], Blocks]:
    """In place of `choose_blocks`, which goes by what rows and launches cost: a layout with the launches of `kind`."""

    def choose(counts: list[int]) -> Blocks:
        if kind == ONE:
            return Blocks(max(counts), 0, 0)
        first, part = sorted(counts)[len(counts) // 2], 32
        return Blocks(max(first, 1), part, sum(-(-max(n - max(first, 1), 0) // part) for n in counts))

    return choose


def with_gradient(shape: list[int]) -> paddle.Tensor:
    """Random numbers that a gradient is asked for."""
    x = paddle.randn(shape)
    x.stop_gradient = False
    return x


def again(run: Callable[..., paddle.Tensor], *inputs: paddle.Tensor) -> Callable[[], None]:
    """Forward, recomputation and backward of a part of the model."""

    def work() -> None:
        out = recomputed(run, *inputs)
        out.backward(paddle.ones_like(out))

    return work


def experts_alone(moe: MoE) -> Callable[[], None]:
    """Dispatch, products with LoRA and combination of a layer's experts; what the router says is given."""
    x_TD = with_gradient([TOKENS, moe.gate.weight.shape[1]])
    routing = moe.gate(x_TD)
    weights_TC = routing.weights_TC.detach()
    weights_TC.stop_gradient = False
    kept: list = []

    def run(x_TD: paddle.Tensor, weights_TC: paddle.Tensor) -> paddle.Tensor:
        if not kept:
            kept.append(dispatch(routing.experts_TC, moe.gate.num_experts))
        return moe.experts(x_TD, weights_TC, kept[0])

    def work() -> None:
        kept.clear()
        again(run, x_TD, weights_TC)()

    return work


def table(step: Step) -> dict[str, tuple[int, int]]:
    """Launches of each kind of part by itself, and how many a step has of it."""
    model, config = step.model.model, step.model.model.config.language
    dense, layer = model.language.model.layers[0], model.language.model.layers[-1]
    x_TD = with_gradient([TOKENS, config.hidden_size])
    positions = paddle.arange(TOKENS)
    rope = layer.self_attn.rope(positions, config)
    hidden = with_gradient([70, config.hidden_size])
    labels = paddle.arange(70)
    layers, moe_layers = config.num_hidden_layers, sum(isinstance(one.mlp, MoE) for one in model.language.model.layers)

    def route(x_TD: paddle.Tensor) -> paddle.Tensor:
        return layer.mlp.gate(x_TD, chosen).weights_TC

    def tower() -> None:
        with paddle.no_grad():
            plan = model.plan_images(step.batch)
            model.image_rows(step.batch, plan, paddle.to_tensor(plan.rows.order_R))

    def loss() -> None:
        model.language.loss_sum(hidden, labels).backward()

    def optimizer() -> None:
        for parameter in step.parameters.values():
            parameter.grad = zeros[parameter.name]
        update(step)

    chosen = layer.mlp.gate(x_TD).experts_TC
    zeros = {p.name: paddle.ones_like(p) for p in step.parameters.values()}
    parts = {
        "vision tower, projector, arrangement": (tower, 1),
        "rotary tables": (lambda: layer.self_attn.rope(positions, config), 1),
        "norm": (again(layer.input_layernorm, x_TD), 2 * layers),
        "attention": (again(lambda x_TD: layer.self_attn(x_TD, rope, [TOKENS]), x_TD), layers),
        "dense MLP": (again(dense.mlp, x_TD), layers - moe_layers),
        "router, its choice kept": (again(route, x_TD), moe_layers),
        "experts": (experts_alone(layer.mlp), moe_layers),
        "shared experts": (again(layer.mlp.shared_experts, x_TD), moe_layers),
        "head and loss": (loss, 1),
        "norm of gradients, clipping, AdamW": (optimizer, 1),
    }
    return {name: (count(work).total(), times) for name, (work, times) in parts.items()}


def main(arguments: list[str]) -> None:
    """Entry script."""
    argparse.ArgumentParser(
        prog="bash launch.sh bench launches", description=(__doc__ or "").partition("\n")[0]
    ).parse_args(arguments)
    found: dict[str, int] = {}
    with mock.patch("vl2.ways.takes_batches", lambda place: True):
        print("a step of 6 layers, one block for the experts of each of five")
        alone: dict[str, int] = {}
        with mock.patch("vl2.expert_rows.choose_blocks", blocks_of(ONE)):
            for experts in (8, 64, 72):
                step = prepare(narrow(6, experts, 4))
                found[str(experts)] = count(lambda step=step: whole(step)).total()
                print(f"{experts:>4} experts  {found[str(experts)]:>6}")
            alone[ONE] = count(experts_alone(step.model.model.language.model.layers[-1].mlp)).total()
        with mock.patch("vl2.expert_rows.choose_blocks", blocks_of(BOTH)):
            alone[BOTH] = count(experts_alone(step.model.model.language.model.layers[-1].mlp)).total()
            tiny = prepare(narrow(12, 64, 27))
            found["tiny"] = count(lambda: whole(tiny)).total()
            parts = table(tiny)
    print("the experts of a layer, forward, recomputed and backward")
    for kind, launched in alone.items():
        print(f"{kind:>17}  {launched:>6}")
    print("a step of VL2-Tiny: 12 layers of which 11 with 64 experts, each with further parts")
    for name, (launched, times) in parts.items():
        print(f"{name:<38} {launched:>5} x {times:>2} = {launched * times:>5}")
    rest = found["tiny"] - sum(launched * times for launched, times in parts.values())
    print(f"{'sums, insertion, copies of gradients':<38} {rest:>18}\n{'all':<38} {found['tiny']:>18}")
    print("rows of the layout for each row of an expert: one block, chosen")
    loads = {f"nano, layer {i % 3 + 1} of pack {i // 3 + 1}": load for i, load in enumerate(NANO_LOADS)}
    for tokens in (4096, 1024):
        loads |= {f"Zipf {power}, {tokens} x 6": zipf(64, tokens * 6, power) for power in (0.3, 1.0)}
    for name, load in loads.items():
        blocks, rows = choose_blocks(load), sum(load)
        print(f"{name:<24} {len(load) * max(load) / rows:>6.2f} {blocks.num_rows(len(load)) / rows:>6.2f}  {blocks}")
    found["per_expert_layer"] = alone[ONE]
    print(json.dumps(found))
