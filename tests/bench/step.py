"""Seconds and peak memory of a LoRA step, by hand: `bash launch.sh bench step [mha|mla]`.

A mid-size model (hidden 512, 6 layers, 32 + 2 experts of 352, SigLIP 4 x 384) on 1024 tokens with one image of three
tiles, LoRA of rank 8 on attention, routed and shared experts, labels on the last 343 tokens. Ratios are against a
forward pass of the same run: the machine's own speed cancels out. `gemm_share` is what the step's products would take
at the rate of a large product (2048^3, timed between the steps) over what the step took. The last line is JSON.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable

import numpy as np
import paddle

from vl2.config import VL2Config
from vl2.generate import generate
from vl2.lora import VL2LoRAModel, apply_lora
from vl2.lora_settings import LoRASettings
from vl2.parameters import init_model

LATENT = {"use_mla": True, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
IMAGE_ID = 5
_NOT_MULTIPLIED = ("embed_tokens.weight", "pos_embed", "mlp.gate.weight")  # looked up, added, or a router's
# hidden, layers, experts, expert width, dense width, heads; width and layers of the vision tower
SIZES = {"mid": (512, 6, 32, 352, 2736, 8, 384, 4), "toy": (64, 2, 4, 16, 64, 2, 48, 1)}


def model_config(attention: str, size: str) -> dict:
    """config.json of the model; attention is mha or mla, size one of SIZES."""
    hidden, layers, experts, expert_width, dense_width, heads, vision_width, vision_layers = SIZES[size]
    language = {
        "vocab_size": 8192,
        "hidden_size": hidden,
        "intermediate_size": dense_width,
        "moe_intermediate_size": expert_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_routed_experts": experts,
        "n_shared_experts": 2,
        "num_experts_per_tok": min(6, experts),
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "use_mla": False,
        **(LATENT if attention == "mla" else {}),
    }
    return {
        "language_config": language,
        "vision_config": {"width": vision_width, "layers": vision_layers, "heads": 6},
        "projector_config": {"input_dim": vision_width, "n_embed": hidden},
        "candidate_resolutions": [[384, 384], [768, 384]],
    }


def build(attention: str, size: str) -> VL2LoRAModel:
    """The model with its adapters, see `model_config`."""
    model = init_model(VL2Config.from_dict(model_config(attention, size)), IMAGE_ID, seed=0)
    return apply_lora(model, LoRASettings(groups=("attention", "experts", "shared_experts"), rank=8))


def batch(tokens: int = 1024, supervised: int = 343) -> dict[str, np.ndarray]:
    """One pack of one conversation with one image."""
    rng = np.random.default_rng(0)
    ids = rng.integers(10, 8000, tokens)
    ids[8 : 8 + 617] = IMAGE_ID
    labels = np.full(tokens, -100)
    labels[-supervised - 1 : -1] = ids[-supervised:]
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": np.arange(tokens),
        "seq_lens": np.array([tokens]),
        "tiles": rng.integers(0, 256, [3, 3, 384, 384], np.uint8),
        "grids": np.array([[2, 1]]),
    }


def products(lora: VL2LoRAModel, data: dict[str, np.ndarray]) -> float:
    """Floating point operations of the matrix products of a step; those of routers and of element-wise work aside.

    A frozen weight is multiplied in forward and for the gradient of its input, a factor once more for its own. The
    tower and the projector are frozen and get no gradient. Attention multiplies whole squares: two products in forward,
    four in backward.
    """
    config, tokens = lora.model.config, len(data["input_ids"])
    language, supervised = config.language, int((data["labels"] >= 0).sum())
    tiles, patches = len(data["tiles"]), config.vision.grid**2
    total = 0.0
    for name, parameter in lora.model.named_parameters():
        size, times, rows = parameter.size, 2, tokens
        if parameter.ndim < 2 or name.endswith(_NOT_MULTIPLIED) or "attn_pool" in name:
            continue
        if "lora" in name:
            times = 3
        if ".experts." in name:
            rows = tokens * language.num_experts_per_tok / language.n_routed_experts
        elif name.startswith("vision."):
            times, rows = 1, tiles * patches
        elif name.startswith("projector."):
            times, rows = 1, tiles * (config.vision.grid + 1) ** 2 / 4
        elif name.startswith("language.lm_head"):
            rows = supervised
        total += 2.0 * size * times * rows
    v_size = language.v_head_dim if language.use_mla else language.head_dim
    k_size = language.qk_nope_head_dim + language.qk_rope_head_dim if language.use_mla else language.head_dim
    heads = language.num_hidden_layers * language.num_attention_heads
    total += 3 * 2.0 * heads * tokens**2 * (k_size + v_size)
    return total + 2 * 2.0 * config.vision.layers * tiles * patches**2 * config.vision.width


def large_product() -> Callable[[], float]:
    """Makes what multiplies two matrices of 2048 x 2048 and gives the floating point operations a second."""
    a = paddle.randn([2048, 2048])

    def rate() -> float:
        start = time.perf_counter()
        paddle.matmul(a, a)
        return 2 * 2048.0**3 / (time.perf_counter() - start)

    return rate


def median(work: Callable[[], object], repeats: int) -> float:
    """Seconds of `work`, the median of so many runs after a first one."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))  # the first one warms up


def main(arguments: list[str]) -> None:
    """Entry script."""
    parser = argparse.ArgumentParser(prog="bash launch.sh bench step", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("attention", nargs="?", default="mha", choices=("mha", "mla"))
    parser.add_argument("--size", default="mid", choices=SIZES, help="of the model (default mid)")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs; the best counts (default 9)")
    asked = parser.parse_args(arguments)
    attention, repeats = asked.attention, asked.repeats
    lora, data = build(attention, asked.size), batch()
    factors = [p for p in lora.factors().values() if not p.stop_gradient]
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=factors)
    lora.train()
    forward = median(lambda: lora.model.loss(data), repeats)

    def step() -> None:
        loss_sum, count = lora.model.loss(data)
        (loss_sum / count).backward()
        optimizer.step()
        optimizer.clear_grad()

    rate, rates, seconds = large_product(), [], []
    step()  # warms up
    for _ in range(repeats):
        rates.append(rate())
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    whole, peak = float(np.median(seconds)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    flops = products(lora, data)
    share = flops / min(seconds) / max(rates)
    lora.eval()
    with paddle.no_grad():
        vision = median(lambda: lora.model.vision(paddle.to_tensor(data["tiles"]), "float32"), repeats)
    short = {key: value for key, value in data.items() if key in ("input_ids", "tiles", "grids")}
    one = median(lambda: generate(lora.model, [short], eos_id=-1, max_new_tokens=1), repeats)
    many = median(lambda: generate(lora.model, [short], eos_id=-1, max_new_tokens=17), repeats)
    print(f"{attention}: step {whole:.2f} s (forward {forward:.2f}, step/forward {whole / forward:.2f})")
    print(f"  {1024 / whole:.0f} tokens/s, peak {peak:.0f} MB")
    print(f"  {flops / 1e9:.0f} GFLOP of products, best {min(seconds):.2f} s; 2048^3 at {max(rates) / 1e9:.0f} GFLOP/s")
    print(
        f"  inference: vision {vision:.2f} s, vision + prefill {one:.2f} s, {1000 * (many - one) / 16:.0f} ms a token"
    )
    print(json.dumps({"seconds": min(seconds), "gemm_share": share, "peak_mb": peak}))
