"""Adapters made by hand from the checkpoint's names, as PEFT and PaddleNLP would write them, and what they mean.

nano_small has both of the hard cases: kv_b_proj of the latent attention, and experts that we store stacked.
"""

import json
import re
from pathlib import Path

import numpy as np

from tests.places import GOLDENS
from vl2.adapter.folder import load_adapter
from vl2.adapter.formats import OWN_FILE, PADDLE_CONFIG, PEFT_CONFIG, PEFT_FILE
from vl2.adapter.slots import slots
from vl2.checkpoint.tensor_files import read_header, write_safetensors
from vl2.config import VL2Config
from vl2.model import DeepseekVL2
from vl2.parameters import build_model, init_model

GOLDEN = GOLDENS / "nano_small"
CONFIG = VL2Config.from_folder(GOLDEN)


def new_model() -> DeepseekVL2:
    return init_model(CONFIG, 1000, seed=1)


def skeleton() -> DeepseekVL2:
    return build_model(CONFIG, 1000)


def linears() -> dict[str, tuple[int, int]]:
    """(out, in) of every Linear, by the names of the official checkpoint: two-dimensional, no table and no router."""
    stored = read_header(GOLDEN / "model.safetensors")[0]
    return {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in stored.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and not re.search(r"embed_tokens|\.gate\.", name)
    }


def make(folder: Path, modules, *, rank=4, tensors=None, **config) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A PEFT adapter as PEFT would write it.

    Args:
        modules: pattern of the Linears that have factors.
        rank: of all, or of each by a function.
        tensors: changes the tensors before they are written.
        config: keys of adapter_config.json instead of the usual ones.

    Returns:
        (A [r, in], B [out, r]) of each module.
    """
    rng, factors = np.random.default_rng(7), {}
    for module, (out, size) in linears().items():
        if re.fullmatch(modules, module):
            r = rank(module) if callable(rank) else rank
            factors[module] = tuple(rng.normal(0, 0.1, shape).astype("float32") for shape in ((r, size), (out, r)))
    stored = {
        f"base_model.model.{module}.lora_{letter}.weight": array
        for module, pair in factors.items()
        for letter, array in zip("AB", pair, strict=True)
    }
    stored = tensors(stored) if tensors else stored
    kinds = {name: "bfloat16" if array.dtype == np.uint16 else "float32" for name, array in stored.items()}
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / PEFT_FILE, stored, kinds)
    document = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": modules, "bias": "none", **config}
    (folder / PEFT_CONFIG).write_text(json.dumps(document))
    return factors


def deltas(folder: Path, model: DeepseekVL2) -> dict[str, np.ndarray]:
    """scaling * A B of every Linear that a group holds, [out, in], in float64; of our model with the adapter on it."""
    lora_model = load_adapter(model, folder)
    factors, settings = lora_model.factors(), lora_model.settings
    found = {}
    for module, slot in slots(lora_model.model).items():
        if slot.group in settings.groups:
            a, b = (factors[f"{slot.factor}_{letter}"].numpy().astype("float64") for letter in "AB")
            a, b = (a, b) if slot.expert is None else (a[slot.expert], b[slot.expert])
            found[module] = settings.scaling_of(slot.group) * (a @ b).T
    return found


def check(folder: Path, factors, scaling) -> None:
    """Every module's delta is the adapter's, that of all others zero, to a float32 rounding of B."""
    found = deltas(folder, new_model())
    assert factors.keys() <= found.keys()
    for module, delta in found.items():
        expected = np.zeros_like(delta)
        if module in factors:
            a, b = (x.astype("float64") for x in factors[module])
            expected = (scaling(module) if callable(scaling) else scaling) * b @ a
        assert np.abs(delta - expected).max() <= 1e-7 * np.abs(expected).max(), module


def make_paddle(folder: Path, **config) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What PaddleNLP writes for PaddleMIX's recipe (patterns as there), in safetensors; A [in, r], B [r, out]."""
    factors = make(folder, r"language\.model\.layers\.\d+\.(self_attn\.(q_proj|kv_b_proj)|mlp\.experts\.\d+\.up_proj)")
    (folder / PEFT_CONFIG).unlink()
    (folder / PEFT_FILE).unlink()
    stored = {
        f"{module}.lora_{letter}": np.ascontiguousarray(array.T)
        for module, pair in factors.items()
        for letter, array in zip("AB", pair, strict=True)
    }
    write_safetensors(folder / OWN_FILE, stored, dict.fromkeys(stored, "float32"), {"format": "np"})
    targets = [
        "language.model.layers.*.self_attn.q_proj.*",
        "language.model.layers.*.self_attn.kv_b_proj.*",
        "language.model.layers.*.mlp.experts.*.up_proj.*",
    ]
    document = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": targets, "rslora": False, **config}
    (folder / PADDLE_CONFIG).write_text(json.dumps({**document, "scaling": 8.0, "tensor_parallel_degree": -1}))
    return factors
