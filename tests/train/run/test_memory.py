"""Memory a model takes, said before it is loaded: equal to what a run really holds, and refused with the figures."""

import re

import pytest

from train.ask.load import load
from train.ask.model_memory import check_inference, inference_memory
from train.config.load import load_config
from train.machine import memory
from train.run.build import build_base, count_parts, make_trainable
from train.run.memory import cards_needed, check_published, plan_parts, plan_weights, training_memory
from train.run.shard.partition import numbers_of_layers
from vl2.checkpoint.model_folder import open_folder
from vl2.checkpoint.published import PUBLISHED
from vl2.config import VL2Config

TINY = VL2Config.from_folder(PUBLISHED["deepseek-vl2-tiny"].config.parent)
SETTINGS = {
    "lora": ["lora.groups=[attention,experts,shared_experts,dense_mlp,vision,projector]", "lora.ranks.experts=4"],
    "nf4": ["model.frozen=nf4", "lora.groups=[attention,experts]", "lora.also_train=[projector,norms]"],
    "int8": ["model.frozen=int8"],
    "PiSSA": ["lora.pissa=true", "lora.dropout=0", "lora.groups=[attention,experts]", "lora.also_train=[vision,norms]"],
    "all weights": ["lora.rank=0", "trainable=[vision,projector,language]"],
    "some weights": ["lora.rank=0", "trainable=[projector,language]"],
}


def free(num_bytes: int) -> memory.FreeMemory:
    return memory.FreeMemory(num_bytes=num_bytes, where="RAM, MemAvailable")


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["nano_tiny", "nano_base"])
def test_need_is_what_a_run_holds(kind, precision, settings, tmp_path, arguments, golden_folder):
    folder = golden_folder(kind)
    path = f"model.path={folder}"
    config = load_config(arguments(tmp_path / "run", path, f"precision={precision}", *SETTINGS[settings]))
    base = build_base(config, open_folder(folder))
    candidates = base.config.candidate_resolutions
    model, groups = make_trainable(base, config, candidates=candidates, base_fingerprint="")
    parts = count_parts(model)
    assert plan_parts(VL2Config.from_folder(folder), config) == (parts, groups)
    learned = sum(part.trainable for part in parts)
    found = training_memory(VL2Config.from_folder(folder), config)
    # Gradients and two moments come to what is stored.
    assert found.certain == sum(part.stored_bytes for part in parts) + 12 * learned
    assert (found.trained, found.gradients, found.moments, found.copied) == tuple(n * learned for n in (4, 4, 8, 12))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "figure"), [("tiny", "6.74"), ("small", "32.30"), ("base", "54.96")])
def test_published_model_that_has_no_room_is_not_even_fetched(name, figure, monkeypatch, tmp_path):
    for user in ("train.ask.load", "train.run.training"):
        monkeypatch.setattr(f"{user}.resolve_model", lambda path: pytest.fail("it was fetched"))
    monkeypatch.setattr(
        memory, "find_free_memory", lambda: memory.FreeMemory(num_bytes=5 * 10**9, where="RAM, MemAvailable")
    )
    path = f"deepseek-ai/deepseek-vl2{'' if name == 'base' else '-' + name}"
    config = load_config(["conf=sft_tiny", f"model={name}", "device=cpu", f"run_dir={tmp_path}"])
    with pytest.raises(ValueError, match=rf"training {path} takes frozen weights {figure} GB, .*5\.00 GB are av"):
        check_published(config, 1)
    with pytest.raises(ValueError, match=rf"{path} in bfloat16 takes {figure} GB .*5\.00 GB are available"):
        load(path)


def test_advice_fits_the_settings(monkeypatch):
    monkeypatch.setattr(
        memory, "find_free_memory", lambda: memory.FreeMemory(num_bytes=10**10, where="RAM, MemAvailable")
    )
    config = load_config(["conf=sft_tiny", "device=cpu", "lora.rank=0", "precision=fp32"])
    with pytest.raises(
        ValueError, match=r"in each of 2 processes, .*; one GPU of .*\(lora\.rank=8\), .* or precision=bf16$"
    ):
        check_published(config, 2)
    with pytest.raises(ValueError, match=r"float32 takes 13\.48 GB .*, or precision=bf16, or frozen=nf4$"):
        check_inference("tiny", VL2Config.from_folder(PUBLISHED["deepseek-vl2-tiny"].config.parent), "float32")


def test_processes_that_share_memory_add_up(monkeypatch):
    """Two LoRA runs of Tiny in 12 GB: 7.4 GB each before a step on a full pack, whose logits alone are 2.6 GB."""
    monkeypatch.setattr(
        memory, "find_free_memory", lambda: memory.FreeMemory(num_bytes=12 * 10**9, where="RAM, MemAvailable")
    )
    config = load_config(["conf=sft_tiny", "device=cpu"])
    check_published(config, 1)
    need = training_memory(TINY, config)
    assert need.step.logits == 1024 * 129280 * 20
    total = f"{(2 * need.num_bytes + need.copied) / 1e9:.2f} GB in all, and 12.00 GB"
    with pytest.raises(ValueError, match=total):
        check_published(config, 2)


def test_gradients_on_their_way_to_other_processes_count():
    """Left out, full fine-tuning of Tiny on eight cards was promised room that it did not have."""
    alone, shared = (
        training_memory(TINY, load_config(["conf=sft_tiny_full", "device=cpu", f"nproc={nproc}"])) for nproc in (1, 2)
    )
    assert (alone.exchanged, shared.num_bytes - alone.num_bytes) == (0, shared.exchanged)
    assert 0.6e9 < shared.exchanged <= 1e9  # the embedding alone has 0.66 GB
    assert "gradients on their way 0." in str(shared) or "gradients on their way 1." in str(shared)


def test_moments_are_shared_out():
    """By whole parameters: the heaviest process has little more than its part, and copies no more of it."""
    whole, shared = (
        training_memory(TINY, load_config(["conf=sft_tiny_full", "device=cpu", "nproc=4", f"sharding.stage={stage}"]))
        for stage in (0, 1)
    )
    assert whole.moments / 4 <= shared.moments < 1.01 * whole.moments / 4
    assert whole.num_bytes - shared.num_bytes == whole.copied - shared.copied == whole.moments - shared.moments
    # What they save together is the same; each copies its part.
    assert whole.copied_by(4) == whole.copied <= shared.copied_by(4) < 1.01 * whole.copied
    others = shared.process_bytes(first=False) - whole.process_bytes(first=False)
    assert others == shared.moments - (whole.moments - shared.moments)


def test_cards_that_a_run_takes():
    config = load_config(["conf=sft_tiny_full", "device=cpu"])
    assert cards_needed(TINY, config, 80 * 10**9) == (1, 0)
    assert cards_needed(TINY, config, 40 * 10**9) == (2, 3)
    assert cards_needed(TINY, config, 30 * 10**9) == (4, 3)
    assert cards_needed(TINY, config, 10**10) is None  # tower, embedding and head are whole on each
    adapters = load_config(["conf=sft_tiny", "device=cpu", "packs_per_step=4"])
    assert cards_needed(TINY, adapters, 8 * 10**9) is None  # the frozen weights are not divided


def test_layers_are_divided():
    """At stage 2 the gradients of the decoder layers, at stage 3 their weights: a share, and the largest layer."""
    one, two, three = (
        training_memory(TINY, load_config(["conf=sft_tiny_full", "device=cpu", "nproc=8", *more]))
        for more in (
            ("sharding.stage=1",),
            ("sharding.stage=2",),
            ("sharding.stage=3", "eval.questions=0"),
        )
    )
    assert one.trained == two.trained == one.gradients and two.gradients == three.gradients == three.trained
    assert one.moments == two.moments == three.moments and one.copied == three.copied
    sizes = plan_weights(TINY, load_config(["conf=sft_tiny_full", "device=cpu"])).sizes
    layers = numbers_of_layers(sizes)
    assert len(layers) == TINY.language.num_hidden_layers
    whole = sum(sizes.values()) - sum(layers.values())
    even = whole + sum(layers.values()) / 8 + max(layers.values())
    assert even <= two.gradients / 4 < 1.1 * even


def test_run_that_has_no_room_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        memory, "find_free_memory", lambda: memory.FreeMemory(num_bytes=10**6, where="RAM, MemAvailable")
    )
    monkeypatch.setattr("train.ask.load.load_model", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"no room in memory: training .*1\.0 MB are available"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_model_that_has_no_room_is_not_loaded_to_answer(model_folder, monkeypatch):
    monkeypatch.setattr(
        memory, "find_free_memory", lambda: memory.FreeMemory(num_bytes=10**6, where="RAM, MemAvailable")
    )
    monkeypatch.setattr("train.ask.load.load_model", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"no room in memory: .* in bfloat16 takes 1\.\d MB of weights"):
        load(model_folder)


def test_need_in_words():
    need = training_memory(TINY, load_config(["conf=sft_tiny", "device=cpu"]))
    assert re.match(
        r"frozen weights 6\.7\d GB, trained weights 0\.\d\d GB, gradients .* a step on a full pack", str(need)
    )
    assert inference_memory(TINY, "bfloat16") == 6_741_002_880
