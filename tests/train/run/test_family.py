"""A run of each kind: MHA and softmax routing (Tiny), latent attention (Small), sigmoid routing with a bias (full)."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

ATTENTION = {
    "nano_tiny": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "nano_small": {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
    "nano_base": {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
}


@pytest.fixture(scope="module", params=sorted(ATTENTION))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind, golden_folder) -> Path:
    return golden_folder(kind)


def test_every_adapter_moves(run, kind, model, tmp_path):
    """lora_B starts at zero; lora_A moves only once lora_B has, which after the second step it has done."""
    run_dir = tmp_path / "run"
    assert run(run_dir, f"model.path={model}", "max_steps=2", "recompute=1") == 0
    moved: dict[str, list[float]] = defaultdict(list)
    for name, weight in load_file(run_dir / "adapter" / "peft_model.safetensors").items():
        if "lora_B" in name:
            moved[name.split(".lora_B")[0].rsplit(".", 1)[-1]].append(float(np.abs(weight).max()))
    assert ATTENTION[kind] <= moved.keys()
    assert {"gate_proj", "up_proj", "down_proj"} <= moved.keys()
    assert [name for name, sizes in moved.items() if min(sizes) == 0] == []


def test_the_gate_trains_and_its_bias_stays(run, kind, model, tmp_path):
    """The bias only picks: no gradient, no weight decay, and it leaves a full fine-tune as it came."""
    run_dir = tmp_path / "run"
    options = ("lora.rank=0", "trainable=[language]", "max_steps=2", "optim.lr=1e-3", "optim.weight_decay=0.1")
    assert run(run_dir, f"model.path={model}", *options) == 0
    before = load_file(model / "model.safetensors")
    after = load_file(run_dir / "weights" / "trained.safetensors")
    gates = [name for name in after if name.endswith("mlp.gate.weight")]
    assert gates and all(np.abs(after[name] - before[name].astype("float32")).max() > 1e-4 for name in gates)
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert bool(biases) == (kind == "nano_base")
    assert [name for name in biases if name in after] == []
