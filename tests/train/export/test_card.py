"""The model card of an export: facts of files, none invented, no path of the machine; one that was edited is kept."""

import json
from pathlib import Path

import pytest
import yaml

from tests.train.provenance import provenance
from train.ask.source import Source
from train.export.card import card, write_card
from train.store.facts import from_document
from train.store.provenance import ExportReport, Provenance

VERIFIED = {"tensors": 162, "merge_error": 6.8e-07}


def source_of(base: Path, trained: Path, name: str = "") -> Source:
    document = provenance(base, base_path="" if name else str(base), base_fingerprint="")
    about = from_document(Provenance, {**document, "base": name or str(base)}, "it")
    return Source(kind="adapter", base=base, trained=trained, base_name=about.base, provenance=about)


def report(tmp_path: Path, **changes) -> ExportReport:
    values = {
        "run": str(tmp_path / "run"),
        "base": str(tmp_path / "deepseek-vl2-tiny"),
        "kind": "adapter",
        "adapter": None,
        "layout": "hf",
        "dtype": "bfloat16",
        "rehearsal": False,
        "recipe": str(tmp_path / "mine.yaml"),
        "versions": {"paddlepaddle": "3.3.1"},
        "verified": VERIFIED,
        "cost": None,
    }
    return ExportReport(**{**values, **changes})


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "deepseek-vl2-tiny"
    folder.mkdir()
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: deepseek\nlicense_link: https://example.org/L\ntags: [x]\n---\n# VL2\n"
    )
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """The files of a finished run with a checkpoint, as far as a card reads them."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-000002"
    for folder in (run / "adapter", checkpoint / "adapter"):
        folder.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    plan = {"samples": 12345, "packs": 40, "steps": 4, "packs_per_step": 10, "epochs": 1, "fingerprint": "f00d"}
    plan |= {"tokens": 98765, "supervised": 4321}
    groups = [{"group": "attention", "rank": 8, "modules": 12, "parameters": 32768}]
    (run / "report.json").write_text(json.dumps({"plan": plan, "lora": groups, "parts": []}))
    settings = "optim: {lr: 2.0e-4, schedule: cosine, warmup_ratio: 0.03}\nprecision: bf16\nseed: 42\n"
    for folder in (run, checkpoint):
        (folder / "config.yaml").write_text(settings)
    held_out = {"before": {"exact_match": 0.25}, "after": {"exact_match": 0.875, "eval_loss": 0.5}}
    (run / "summary.json").write_text(json.dumps({"steps": 4, "losses": [3.5, 2, 0.25, None], "evaluation": held_out}))
    rows = [
        {"step": 0, "eval_loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval_loss": 1.5},
        {"step": 4, "eval_loss": 9},
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": ')
    (checkpoint / "state.json").write_text(json.dumps({"step": 2, "history": {"losses": [3.5, 2.0]}}))
    return run


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_says_what_the_files_say(base, run, tmp_path):
    text = card(report(tmp_path), source_of(base, run / "adapter"))
    assert header(text) == {
        "base_model": "deepseek-vl2-tiny",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "other",
        "license_name": "deepseek",
        "license_link": "https://example.org/L",
        "pipeline_tag": "image-text-to-text",
        "tags": ["deepseek_vl_v2", "lora"],
    }
    for line in (
        "| recipe | mine.yaml |",
        "| trained | LoRA on attention (rank 8, 32,768 numbers) |",
        "| data | 12,345 conversations; in all 98,765 tokens, 4,321 of them learned |",
        "| fingerprint of data and plan | f00d |",
        "| learning rate | 0.0002, cosine, warm-up 0.03 |",
        "| steps made | 4 |",
        "| training loss (first and last step) | 3.5 | 0.25 |",
        "| held-out exact_match | 0.25 | 0.875 |",
        "| held-out eval_loss |  | 0.5 |",
        "| merge_error | 6.8e-07 |",
    ):
        assert line in text.splitlines()
    assert "DeepseekVLV2ForCausalLM" in text and "not run where this card was written" in text
    assert str(tmp_path) not in text and str(Path.home()) not in text
    assert "None" not in text and "rehearsal" not in text


def test_a_checkpoints_card_has_its_own_losses(base, run, tmp_path):
    text = card(report(tmp_path), source_of(base, run / "checkpoints" / "step-000002" / "adapter"))
    assert "| training loss (first and last step) | 3.5 | 2 |" in text
    assert "| steps made | 2 |" in text
    # What was asked at the end is no fact of the checkpoint; what was validated at its step is.
    assert [line for line in text.splitlines() if "held-out" in line] == ["| held-out loss | 3 | 1.5 |"]
    assert "| data | 12,345 conversations" in text


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"plan": 3, "lora": [1], "parts": null}'])
def test_what_no_file_says_is_left_out(base, run, tmp_path, damage):
    for file in ("report.json", "summary.json", "config.yaml"):
        (run / file).write_text(damage)
    (base / "README.md").write_text("---\nlicense: [\n")
    (base / "LICENSE-MODEL").write_text("Terms.")
    text = card(report(tmp_path, recipe="", versions={}), source_of(base, run / "adapter"))
    assert "## Training" not in text and "## Results" not in text and "recipe" not in text
    assert header(text)["license_link"] == "LICENSE-MODEL"
    elsewhere = card(report(tmp_path), source_of(base, tmp_path / "downloaded"))
    assert "## Training" not in elsewhere and "## Verified when it was written" in elsewhere


def test_an_adapters_card(base, run, tmp_path):
    source = source_of(base, run / "adapter", name="deepseek-ai/deepseek-vl2-tiny")
    text = card(report(tmp_path, adapter="peft", layout=None, dtype="float32"), source, "call it")
    assert (header(text)["base_model"], header(text)["library_name"]) == ("deepseek-ai/deepseek-vl2-tiny", "peft")
    assert header(text)["base_model_relation"] == "adapter"
    assert "**Before anything else, call it.**" in text and "from peft import PeftModel" in text
    text = card(report(tmp_path, adapter="paddle", layout=None), source)
    assert "from paddlenlp.peft import LoRAModel" in text and "Before anything else" not in text
    text = card(report(tmp_path, layout="paddle"), source)
    assert "from paddlemix.models.deepseek_vl2 import" in text and "vllm" not in text


def test_a_card_that_somebody_edited_is_kept(tmp_path, capsys):
    """And is kept again: the second time its checksum stands in the manifest as any other file's."""
    out, new = tmp_path / "out", tmp_path / "new"
    for folder in (out, new):
        folder.mkdir()
    write_card(out, out, "# First\n")
    write_card(new, out, "# Second\n")
    assert (new / "README.md").read_text().startswith("# Second\n")
    with (out / "README.md").open("a") as file:
        file.write("Mine.\n")
    for text in ("# Third\n", "# Fourth\n"):
        write_card(new, out, text)
        assert (new / "README.md").read_bytes() == (out / "README.md").read_bytes()
        assert "is not as an export wrote it, so it is kept" in capsys.readouterr().err
