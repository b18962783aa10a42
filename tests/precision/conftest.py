"""Nano models of the goldens in any precision, one pack of two conversations, and a place to report figures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.places import GOLDENS
from vl2.checkpoint.load import load_model
from vl2.lora import apply_lora
from vl2.lora_settings import GROUPS, LoRASettings
from vl2.model import DeepseekVL2
from vl2.parameters import train_parameters

FIGURES: list[str] = []


@pytest.fixture(scope="session")
def nano(golden_folder) -> Callable[..., DeepseekVL2]:
    """nano("nano_small", "bfloat16"): stored and computed in that type as on a GPU, adapters in every LoRA group.

    With full=True all that may train is float32 and trains, without adapters. `frozen`: its matrices in few bits.
    """
    folders: dict[str, Path] = {}

    def build(family: str, dtype: str, *, full: bool = False, frozen: str = "none") -> DeepseekVL2:
        if family not in folders:
            folders[family] = golden_folder(family)
        model = load_model(folders[family], dtype=dtype, frozen=frozen)
        if full:
            skipped = ("attn_pool", "e_score_correction_bias")
            names = [name for name, _ in model.named_parameters() if not any(word in name for word in skipped)]
            train_parameters(model, names)
        else:
            lora = apply_lora(model, LoRASettings(groups=tuple(GROUPS), rank=4, alpha=8.0))
            draw = np.random.default_rng(0)
            for name, factor in lora.factors().items():
                if name.endswith("_B"):  # zeros would keep every gradient from A
                    factor.set_value(draw.normal(0, 0.02, factor.shape).astype("float32"))
        model.compute_dtype = dtype
        model.train()
        return model

    return build


@pytest.fixture(scope="session")
def pack() -> dict[str, np.ndarray]:
    """A conversation with an image of three tiles, 662 tokens, and one of text, 64 tokens, in one stream."""
    with np.load(GOLDENS / "nano_tiny" / "crop2x1.npz") as image, np.load(GOLDENS / "nano_tiny" / "text.npz") as text:
        parts = [{name: part[name] for name in ("input_ids", "labels")} for part in (image, text)]
        grids = image["images_spatial_crop"]
    lens = [len(part["input_ids"]) for part in parts]
    return {
        "input_ids": np.concatenate([part["input_ids"] for part in parts]),
        "labels": np.concatenate([np.append(part["labels"][1:], -100) for part in parts]),
        "position_ids": np.concatenate([np.arange(n) for n in lens]),
        "seq_lens": np.array(lens),
        "tiles": np.load(GOLDENS / "images" / "crop2x1.npz")["images_u8"],
        "grids": grids,
    }


@pytest.fixture(autouse=True)
def experts_in_batches(monkeypatch) -> None:
    """As on a GPU; the loop is for CPUs, which compute in float32."""
    monkeypatch.setattr("vl2.ways.takes_batches", lambda place: True)


@pytest.fixture
def report() -> Callable[[str], None]:
    """Prints a line after the tests."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("16-bit against float32")
        for line in FIGURES:
            terminalreporter.write_line(line)
