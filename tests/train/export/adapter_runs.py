"""Finished runs with an adapter, made without training; what of them is compared."""

import re
from pathlib import Path

import numpy as np
import paddle

from tests.train.provenance import provenance
from train.ask.load import Loaded, load
from train.export.verify import logits_of, make_probe
from vl2.adapter.folder import save_adapter
from vl2.checkpoint.load import load_model
from vl2.checkpoint.tensor_files import read_header
from vl2.lora import apply_lora
from vl2.lora_settings import GROUPS, LoRASettings

MIXED = LoRASettings(
    groups=tuple(GROUPS),
    rank=4,
    alpha=8.0,
    ranks={"experts": 2, "vision": 3},
    alphas={"experts": 7.0, "projector": 3.0},
)
SAME = LoRASettings(groups=tuple(GROUPS), rank=4, alpha=12.0)


def make_run(folder: Path, base: Path, settings: LoRASettings, **about) -> Path:
    """A finished run: factors that matter in every module, no B zero."""
    model = load_model(base)
    lora = apply_lora(model, settings, seed=3)
    rng = np.random.default_rng(0)
    for name, factor in lora.factors().items():
        if name.endswith("_B"):
            factor.set_value(rng.normal(0, 0.02, factor.shape).astype("float32"))
    (folder / "adapter").mkdir(parents=True)
    save_adapter(lora, folder / "adapter", provenance(base, **about))
    return folder


def factors_of(loaded: Loaded) -> dict[str, paddle.Tensor]:
    return {name: p for name, p in loaded.model.named_parameters() if re.search(r"\.lora(_|\.\w+_)[AB]$", name)}


def logits(folder: Path) -> np.ndarray:
    loaded = load(folder)
    return logits_of(loaded.model, make_probe(loaded.tokenizer, loaded.candidates))


def linears(base: Path) -> dict[str, tuple[int, int]]:
    """(out, in) of every Linear of the official model, by the checkpoint's names: no table and no router."""
    stored = read_header(base / "model.safetensors")[0]
    return {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in stored.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and not re.search(r"embed_tokens|\.gate\.", name)
    }
