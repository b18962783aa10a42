"""The recipes: published settings, memory as their comments say, rehearsals, and a run that trains every part."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.places import ROOT
from train.config import conf_files
from train.config.load import load_config
from train.config.schema import NANO, GroupConfig, ShardingConfig
from train.machine.devices import Machine
from train.run.memory import CARD_BYTES, cards_needed, training_memory
from train.run.training import train
from vl2.checkpoint.folder import read_checkpoint
from vl2.checkpoint.published import published
from vl2.checkpoint.tensor_files import read_header
from vl2.config import VL2Config

GPU = Machine(gpus=1, driver="CUDA Version: 12.6", gpu_paddle=True)
RECIPES = [name for name in conf_files.recipes() if name.startswith("sft_")]
# Cards of 80 GB that these take, with sharding.stage=3.
CARDS = {"sft_small_full": 8, "sft_base_full": 16}
MODELS = {"tiny": "deepseek-vl2-tiny", "small": "deepseek-vl2-small", "base": "deepseek-vl2"}


def test_three_models_in_two_ways_and_the_large_ones_in_4_bits():
    ways = {f"sft_{model}{way}" for model in MODELS for way in ("", "_full", "_4bit")}
    assert ways - {"sft_tiny_4bit"} == set(RECIPES)


@pytest.mark.parametrize("recipe", ["sft_small_4bit", "sft_base_4bit"])
def test_large_models_in_4_bits_fit_a_card_of_24_gb(recipe):
    config = load_config([f"conf={recipe}"], GPU)
    entry = published(config.model.path)
    assert entry and config.model.frozen == "nf4" and config.lora.alpha / config.lora.rank == 2
    need = training_memory(VL2Config.from_folder(entry.config.parent), config, on_gpu=True)
    assert need.process_bytes(first=True) < 22e9


@pytest.mark.parametrize(("name", "lr"), [("tiny", 3.0e-5), ("small", 1.4e-5), ("base", 2.0e-5)])
def test_published_settings(name, lr):
    """arXiv 2412.10302: supervised fine-tuning."""
    config = load_config([f"conf=sft_{name}_full"], GPU)
    optim = config.optim
    assert (optim.lr, optim.schedule, optim.warmup_ratio) == (lr, "constant", 0.0)
    assert optim.groups == {"vision": GroupConfig(lr_scale=0.1)}
    assert (optim.weight_decay, optim.beta1, optim.beta2, optim.max_grad_norm) == (0.1, 0.9, 0.95, 1.0)
    assert (config.data.max_tokens, config.packs_per_step, config.lora.rank) == (4096, 64, 0)
    assert config.trainable == ["vision", "projector", "language"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_comment_says_what_a_process_holds(recipe):
    """Weights, gradients and Adam from the model's shapes; the same figure stands in the README."""
    config = load_config([f"conf={recipe}"], GPU)
    entry = published(config.model.path)
    assert entry and entry.name == MODELS[recipe.split("_")[1]]
    model = VL2Config.from_folder(entry.config.parent)
    figure = training_memory(model, config).certain / 1e9
    comment = conf_files.recipes()[recipe]
    said = re.search(r"holds ([\d.]+) GB before activations; estimated: ", comment)
    assert said and float(said[1]) == pytest.approx(figure, abs=0.05)
    (row,) = re.findall(rf"^\| `conf={recipe}` .*", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"{math.floor(float(said[1]) + 0.5)} GB" in row
    if recipe in CARDS:
        assert cards_needed(model, config, CARD_BYTES) == (CARDS[recipe], 3)
        alone, many = (
            training_memory(model, replace(config, nproc=cards, sharding=ShardingConfig(stage=stage)), on_gpu=True)
            for cards, stage in ((1, 0), (CARDS[recipe], 3))
        )
        figures = [round(need.process_bytes(first=True) / 1e9) for need in (alone, many)]
        assert f"{figures[0]} GB on one device, {figures[1]} GB on each of {CARDS[recipe]} cards of 80 GB" in comment
        assert f"{CARDS[recipe]} GPUs of 80 GB with `sharding.stage=3 eval.questions=0`, {figures[1]} GB on each" in row


@pytest.mark.parametrize("recipe", RECIPES)
def test_rehearsal(recipe):
    config = load_config([f"conf={recipe}"], Machine(gpus=0))
    assert config.rehearsal and Path(config.model.path) == NANO
    assert config.lora.rank == {"sft_base_4bit": 4}.get(recipe, 0 if recipe.endswith("_full") else 8)


@pytest.mark.slow
def test_full_recipe_trains_everything_but_what_never_trains(tmp_path, data_file, golden_folder):
    """The full model's kind: sigmoid routing, whose correction bias leaves as it came."""
    model = golden_folder("nano_base")
    arguments = [f"model.path={model}", f"data.path={data_file}", f"run_dir={tmp_path / 'run'}"]
    arguments += ["device=cpu", "max_steps=2", "packs_per_step=4", "data.max_tokens=640", "data.workers=0"]
    assert train(load_config(["conf=sft_base_full", *arguments, "log=[]"])) == 0
    trained = read_header(tmp_path / "run" / "weights" / "trained.safetensors")[0]
    base = read_checkpoint(model).tensors
    frozen = [name for name in base if "experts." not in name and name not in trained]
    assert frozen and all("vision.attn_pool." in name or "e_score_correction_bias" in name for name in frozen)
    moved = {}
    for name in ("vision.blocks.0.norm1.bias", "projector.layers.0.bias"):
        before = (base[name].read().astype(np.uint32) << 16).view(np.float32)
        moved[name] = np.abs(trained[name].read() - before).max()
    # Two steps of Adam: about twice the learning rate, a tenth of it in the tower.
    assert moved["projector.layers.0.bias"] == pytest.approx(4e-5, rel=0.3)
    assert moved["vision.blocks.0.norm1.bias"] == pytest.approx(4e-6, rel=0.3)
