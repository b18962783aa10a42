"""A frozen weight is stored in 16 bits, and at no time more than one of them exists in float32 as well.

Bytes are those of Paddle's own statistics, which count what its allocator hands out, and of numpy's arrays.
"""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from paddle.base import core

from tests.bench.launches import IMAGE_ID, narrow
from vl2.checkpoint.load import load_model
from vl2.checkpoint.quantised import QuantisedReader
from vl2.checkpoint.stored_model import hold_model
from vl2.config import VL2Config
from vl2.lora import apply_lora
from vl2.lora_settings import LoRASettings
from vl2.moe import Experts
from vl2.parameters import init_model


def peak_bytes(work: Callable[[], object]) -> int:
    """Bytes that lie in Paddle's memory at once during `work`, beyond those before."""
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    work()
    return core.host_memory_stat_peak_value("Allocated", 0) - before


def build(dtype: str):
    """64 experts a layer, of which a stack takes as much as all else, and small adapters; frozen weights in `dtype`."""
    model = init_model(narrow(3, 64, 1), IMAGE_ID, seed=0, dtype=dtype)
    lora = apply_lora(model, LoRASettings(groups=("attention",), rank=1))
    lora.train()
    return lora


def largest_matrix(model) -> int:
    """Numbers in the largest frozen matrix that is multiplied; of stacked experts, in the largest expert's."""
    sizes = [
        int(np.prod(parameter.shape[1:] if parameter.ndim == 3 else parameter.shape))
        for name, parameter in model.named_parameters()
        if name.startswith("language.") and parameter.stop_gradient and "embed_tokens" not in name
    ]
    return max(sizes)


def step_peak(dtype: str, recompute: int) -> int:
    """Bytes of a forward and backward pass over a few tokens beyond the weights."""
    lora = build(dtype)
    lora.model.set_recompute(recompute)
    ids = np.arange(20, 60)
    batch = {"input_ids": ids, "labels": ids + 1, "position_ids": np.arange(40), "seq_lens": np.array([40])}

    def step() -> None:
        lora.model.loss(batch)[0].backward()

    step()
    return peak_bytes(step)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [0, 1])
def test_a_step(recompute):
    """What frozen weights in bfloat16 take beyond the same step with float32 ones, which it copies none of."""
    lora = build("bfloat16")
    one = 4 * largest_matrix(lora.model)
    experts = lora.model.language.model.layers[1].mlp.experts
    assert 4 * int(experts.gate_up.size) > 3 * one
    more = step_peak("bfloat16", recompute) - step_peak("float32", recompute)
    assert more <= one


@pytest.mark.slow
def test_the_measure_sees_a_stack(monkeypatch):
    """All experts cast at once, as they once were nowhere but might come to be."""
    forward = Experts.forward

    def careless(self, x_TD, *rest):
        copy = self.gate_up.astype("float32")
        made = forward(self, x_TD, *rest)
        return made + copy[0, 0, 0] * 0

    monkeypatch.setattr(Experts, "forward", careless)
    one = 4 * largest_matrix(build("bfloat16").model)
    assert step_peak("bfloat16", 1) - step_peak("float32", 1) > one


@pytest.mark.parametrize("family", ["nano_tiny", "nano_small"])
def test_loading(golden_folder, family):
    """float32 weights loaded as bfloat16: a stack of experts was made in float32, twice, before it was rounded."""
    folder = golden_folder(family)
    weights = hold_model(folder, load_model(folder), "float32")
    stacks = [path for path, parts in weights.parts.items() if len(parts) > 1]
    assert len(stacks) > 3
    for path in weights.parts:
        numbers, kept = int(np.prod(weights.shapes[path])), []
        one = int(np.prod(weights.shapes[path][1:])) if path in stacks else numbers
        tracemalloc.start()
        made = peak_bytes(lambda path=path, kept=kept: kept.append(weights.parameter(path, "bfloat16")))
        made += tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # The whole in 16 bits as an array and as a tensor; of one matrix float32 twice (as read, and turned), and
        # 16 bits twice.
        assert made <= 2 * 2 * numbers + (2 * 4 + 2 * 2) * one + 20_000, path


def test_loading_in_few_bits(monkeypatch, tmp_path):
    """A stack of experts is never there in 16 bits: only the matrices that are being quantised, one a thread."""
    monkeypatch.setattr("vl2.checkpoint.quantised._MOST_THREADS", 2)
    document = narrow(2, 64, 1).to_dict()
    document["language_config"] |= {"hidden_size": 320, "moe_intermediate_size": 64}
    document["projector_config"] |= {"n_embed": 320}
    model = init_model(VL2Config.from_dict(document), IMAGE_ID, seed=0, dtype="bfloat16")
    weights = hold_model(tmp_path, model, "bfloat16")
    reader = QuantisedReader(weights, "nf4", "bfloat16")
    for path in (path for path, parts in weights.parts.items() if len(parts) > 1):
        reader.read(path)  # kernels are compiled
        numbers, kept = int(np.prod(weights.shapes[path])), []
        tracemalloc.start()
        made = peak_bytes(lambda path=path, kept=kept: kept.append(reader.read(path)))
        made += tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # As an array and as a tensor; of two matrices 16 bits, float32 (also filled up) and codes.
        assert made <= 2 * kept[0].num_bytes + 2 * (2 + 2 * 4 + 1) * numbers // 64 + 20_000 < 2 * numbers, path
