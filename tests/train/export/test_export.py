"""Export and inference on nano_tiny with a random adapter: merged = adapter, verified, nothing overwritten."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.train.provenance import provenance
from train.ask.infer import infer
from train.ask.load import load
from train.ask.source import find_source
from train.config.schema import ExportConfig, InferConfig
from train.export.merge import open_merge
from train.export.merged import export
from train.export.verify import logits_of, make_probe
from vl2.adapter.folder import save_adapter
from vl2.checkpoint.fingerprint import model_fingerprint
from vl2.checkpoint.folder import read_checkpoint
from vl2.checkpoint.load import load_model
from vl2.checkpoint.tensor_files import read_header
from vl2.errors import UserError
from vl2.lora import apply_lora
from vl2.lora_settings import LoRASettings
from vl2.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def base(golden_folder) -> Path:
    folder = golden_folder("nano_tiny")
    (folder / "LICENSE").write_text("the base's licence\n")
    candidates = json.loads((folder / "config.json").read_text())["candidate_resolutions"]
    (folder / "processor_config.json").write_text(json.dumps({"candidate_resolutions": candidates, "patch_size": 14}))
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """A finished run's folder: an adapter on all language groups whose B is not zero."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "adapter").mkdir()
    settings = LoRASettings(groups=("attention", "experts", "shared_experts", "dense_mlp"), rank=4, alpha=8.0)
    lora = apply_lora(load_model(base, dtype="bfloat16"), settings, seed=3)
    rng = np.random.default_rng(0)
    for name, factor in lora.factors().items():
        if name.endswith("_B"):
            factor.set_value(rng.normal(0, 0.02, factor.shape).astype("float32"))
    save_adapter(lora, folder / "adapter", provenance(base))
    return folder


@pytest.fixture(scope="module")
def exported(run) -> Path:
    export(ExportConfig(run=str(run), out=str(run / "export"), dtype="fp32"))
    return run / "export"


@pytest.mark.slow
def test_export_in_float32_answers_as_the_adapter(run, exported):
    """The same greedy tokens, and logits within 1e-5 of the largest: only the order of two float32 sums differs."""
    adapter, merged = load(run), load(exported)
    probe = make_probe(adapter.tokenizer, adapter.candidates)
    ours, theirs = logits_of(adapter.model, probe), logits_of(merged.model, probe)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(ours).max()
    config = InferConfig(prompt="What is it?", max_new_tokens=12)
    assert infer(adapter, config)["ids"] == infer(merged, config)["ids"]


@pytest.mark.slow
def test_the_adapter_matters(base, run):
    loaded = load(base)
    probe = make_probe(loaded.tokenizer, loaded.candidates)
    assert np.abs(logits_of(loaded.model, probe) - logits_of(load(run).model, probe)).max() > 0.01


@pytest.mark.slow
def test_export_report_and_files(run, exported, base):
    report = json.loads((exported / "export.json").read_text())
    assert report["rehearsal"] is True and report["recipe"] == "sft_tiny"
    verified = report["verified"]
    assert verified["tensors"] == len(read_checkpoint(base).tensors)
    assert verified["merge_error"] < 1e-5
    assert verified["rounding_kl"] < 1e-6
    assert verified["trained_used"] == len(read_header(run / "adapter" / "peft_model.safetensors")[0])
    config = json.loads((exported / "config.json").read_text())
    assert max(w * h for w, h in config["candidate_resolutions"]) == 4 * 384 * 384
    processor = json.loads((exported / "processor_config.json").read_text())
    assert processor["candidate_resolutions"] == config["candidate_resolutions"] and processor["patch_size"] == 14
    assert (exported / "LICENSE").read_text() == "the base's licence\n"
    assert Tokenizer.from_folder(exported).fingerprint == Tokenizer.from_folder(base).fingerprint
    assert "rehearsal" in (exported / "README.md").read_text()
    assert find_source(exported).rehearsal


@pytest.mark.slow
def test_export_in_the_base_dtype_leaves_untouched_tensors_bit_for_bit(run, base, tmp_path):
    report = export(ExportConfig(run=str(run), out=str(tmp_path / "out")))
    assert report.dtype == "bfloat16"
    before, after = read_checkpoint(base).tensors, read_checkpoint(tmp_path / "out").tensors
    same = {name for name in before if np.array_equal(before[name].read(), after[name].read())}
    changed = before.keys() - same
    assert changed and all(any(part in name for part in ("self_attn", "mlp")) for name in changed)
    assert not any(name.startswith(("vision", "projector")) or "gate.weight" in name for name in changed)
    assert 0 < report.verified["rounding_mean_logit_change"] < 0.05


def test_export_is_refused_and_leaves_nothing_when_a_tensor_reads_back_wrong(run, tmp_path, monkeypatch):
    """A disk or writer that changes one tensor must not leave a folder under the final name, nor a half one beside."""
    import train.export.merged as module

    written = module.write_weights

    def damage(folder, *more):
        written(folder, *more)
        tensor = read_checkpoint(folder).tensors["language.model.norm.weight"]
        with tensor.path.open("r+b") as file:
            file.seek(tensor.offset + 7)
            file.write(b"\x11")

    monkeypatch.setattr(module, "write_weights", damage)
    with pytest.raises(ValueError, match=r"refused: 1 tensors read back otherwise than written .*model\.norm\.weight"):
        export(ExportConfig(run=str(run), out=str(tmp_path / "out"), dtype="fp32"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_broken_processor_config_of_the_base_is_said_before_anything_is_written(
    run, base, tmp_path, monkeypatch, content
):
    """It ended in a traceback, after the weights."""
    whole = (base / "processor_config.json").read_bytes()
    monkeypatch.setattr("train.export.merged.write_weights", lambda *_: pytest.fail("weights were written"))
    try:
        (base / "processor_config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"processor_config\.json: (not JSON|expected a JSON object, found a list)"):
            export(ExportConfig(run=str(run), out=str(tmp_path / "out")))
    finally:
        (base / "processor_config.json").write_bytes(whole)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_export_is_refused_when_rounding_costs_too_much(run, tmp_path, monkeypatch):
    monkeypatch.setattr("train.export.verify.MAX_KL", 0.0)
    with pytest.raises(ValueError, match="rounding costs a KL of"):
        export(ExportConfig(run=str(run), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(run, exported, tmp_path):
    config = ExportConfig(run=str(run), out=str(exported), dtype="fp32")
    with pytest.raises(ValueError, match="overwrite=true"):
        export(config)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="no export wrote"):
        export(ExportConfig(run=str(run), out=str(tmp_path), overwrite=True))
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_sources_that_cannot_be_used_are_named(base, run, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        find_source(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"neither a model \(config\.json\)"):
        find_source(tmp_path)
    with pytest.raises(ValueError, match="nothing was trained there"):
        export(ExportConfig(run=str(base), out=str(tmp_path / "out")))
    moved = tmp_path / "run"
    shutil.copytree(run / "adapter", moved / "adapter")
    path = moved / "adapter" / "lora_config.json"
    path.write_text(path.read_text().replace(str(base), "/nowhere/base"))
    with pytest.raises(ValueError, match="/nowhere/base, which is not there now"):
        load(moved)


def test_adapter_of_another_base_is_refused(run, base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    path = other / "adapter" / "lora_config.json"
    document = json.loads(path.read_text())
    document["vl2"]["metadata"]["base_fingerprint"] = "0" * 64
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="another base model"):
        load(other)


@pytest.mark.slow
def test_adapter_knows_its_base_in_the_precision_of_its_training(run, base, tmp_path):
    """A base of bfloat16, trained on as float16: it is the same base when it is loaded or exported in another type."""
    other = tmp_path / "other"
    shutil.copytree(run / "adapter", other / "adapter")
    path = other / "adapter" / "lora_config.json"
    document = json.loads(path.read_text())
    fingerprint = model_fingerprint(load_model(base, dtype="float16"))
    document["vl2"]["metadata"].update(base_fingerprint=fingerprint, precision="fp16")
    path.write_text(json.dumps(document))
    assert load(other).source.trained == other / "adapter"
    assert open_merge(find_source(other), None).deltas
    document["vl2"]["metadata"]["precision"] = "bf16"
    path.write_text(json.dumps(document))
    for use in (load, lambda folder: open_merge(find_source(folder), None)):
        with pytest.raises(ValueError, match="another base model"):
            use(other)
