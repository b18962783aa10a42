"""Memory a model takes, said before it is loaded: equal to what a run really holds, and refused with the figures."""

import pytest

from train.ask.load import load
from train.ask.model_memory import MemoryNeed, check_inference, inference_memory
from train.config.load import load_config
from train.machine import memory
from train.run.build import build_base, count_parts, make_trainable
from train.run.memory import check_published, plan_parts, training_memory
from vl2.checkpoint.model_folder import open_folder
from vl2.checkpoint.published import PUBLISHED
from vl2.config import VL2Config

SETTINGS = {
    "lora": ["lora.groups=[attention,experts,shared_experts,dense_mlp,vision,projector]", "lora.ranks.experts=4"],
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
    assert found.num_bytes == sum(part.stored_bytes for part in parts) + 12 * learned
    assert found.trained == 16 * learned


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
    with pytest.raises(ValueError, match=rf"training {path} takes {figure} GB of frozen weights and .*5\.00 GB are av"):
        check_published(config, 1)
    with pytest.raises(ValueError, match=rf"{path} in bfloat16 takes {figure} GB .*5\.00 GB are available"):
        load(path)


def test_advice_fits_the_settings(monkeypatch):
    monkeypatch.setattr(
        memory, "find_free_memory", lambda: memory.FreeMemory(num_bytes=10**10, where="RAM, MemAvailable")
    )
    config = load_config(["conf=sft_tiny", "device=cpu", "lora.rank=0", "precision=fp32"])
    with pytest.raises(ValueError, match=r"in each of 2 processes, .*\(lora\.rank=8\), or precision=bf16$"):
        check_published(config, 2)
    with pytest.raises(ValueError, match=r"float32 takes 13\.48 GB .*, or precision=bf16$"):
        check_inference("tiny", VL2Config.from_folder(PUBLISHED["deepseek-vl2-tiny"].config.parent), "float32")


def test_processes_that_share_memory_add_up(monkeypatch):
    """Two LoRA runs of Tiny, 7.4 GB each and 0.5 GB of a checkpoint, do not fit into 10 GB; one does."""
    monkeypatch.setattr(
        memory, "find_free_memory", lambda: memory.FreeMemory(num_bytes=10**10, where="RAM, MemAvailable")
    )
    config = load_config(["conf=sft_tiny", "device=cpu"])
    check_published(config, 1)
    with pytest.raises(ValueError, match=r"15\.19 GB at the least, and 10\.00 GB"):
        check_published(config, 2)


def test_gradients_on_their_way_to_other_processes_count():
    """Left out, full fine-tuning of Tiny on eight cards was promised room that it did not have."""
    tiny = VL2Config.from_folder(PUBLISHED["deepseek-vl2-tiny"].config.parent)
    alone, shared = (
        training_memory(tiny, load_config(["conf=sft_tiny_full", "device=cpu", f"nproc={nproc}"])) for nproc in (1, 2)
    )
    assert (alone.exchanged, shared.num_bytes - alone.num_bytes) == (0, shared.exchanged)
    assert 0.6e9 < shared.exchanged <= 1e9  # the embedding alone has 0.66 GB
    assert "GB of gradients on their way to the other processes" in str(shared)


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
    with pytest.raises(ValueError, match=r"no room in memory: .* in bfloat16 takes 1\.\d MB of frozen weights"):
        load(model_folder)


def test_need_in_words():
    assert (
        str(MemoryNeed(frozen=0, trained=10**9)) == "1.00 GB of trained weights with their gradients and Adam's moments"
    )
    tiny = VL2Config.from_folder(PUBLISHED["deepseek-vl2-tiny"].config.parent)
    assert inference_memory(tiny, "bfloat16").num_bytes == 6_741_002_880
