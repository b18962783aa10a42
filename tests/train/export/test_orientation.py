"""Whether pictures are turned as their EXIF data says: from the run's setting to whoever shows it a picture later."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from data.images.reader import DEFAULT_READER
from tests.train.provenance import provenance
from train.ask.infer import infer
from train.ask.load import load
from train.ask.processor import exif_in_force
from train.ask.source import find_source
from train.config.schema import ExportConfig, InferConfig, TrainConfig
from train.export.merged import export
from train.run.identity import identity
from vl2.adapter.folder import save_adapter
from vl2.checkpoint.load import load_model
from vl2.errors import UserError
from vl2.lora import apply_lora
from vl2.lora_settings import LoRASettings
from vl2.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def turned(golden_folder, tmp_path_factory) -> Path:
    """A finished run that turned its pictures."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "adapter").mkdir()
    base = golden_folder("nano_tiny")
    lora = apply_lora(
        load_model(base, dtype="bfloat16"), LoRASettings(groups=("attention",), rank=1, alpha=1.0), seed=3
    )
    save_adapter(lora, folder / "adapter", provenance(base, exif="rotate", max_tiles=9))
    return folder


@pytest.fixture
def portrait(tmp_path) -> str:
    """A photograph of 400 x 1200 pixels that lies on its side in the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((1200, 400), 50).save(tmp_path / "a.jpg", exif=exif)
    return str(tmp_path / "a.jpg")


def prompt_tokens(folder: Path, image: str) -> int:
    return infer(load(folder), InferConfig(prompt="What?", image=[image], max_new_tokens=1))["prompt_tokens"]


@pytest.mark.slow  # writes a model and two adapters
def test_orientation_goes_into_every_export_and_comes_back(turned, portrait, tmp_path):
    """Trained upright and asked lying on its side, a picture is another one, of other tokens."""
    base = find_source(turned).base
    tokens = prompt_tokens(turned, portrait)
    assert tokens != prompt_tokens(base, portrait)  # 1 x 3 tiles and 3 x 1 have other line breaks

    export(ExportConfig(run=str(turned), out=str(tmp_path / "merged"), dtype="fp32"))
    document = json.loads((tmp_path / "merged" / "processor_config.json").read_text())
    assert (document["exif_orientation"], document["processor_class"]) == ("rotate", "DeepseekVLV2Processor")
    assert "EXIF orientation" in (tmp_path / "merged" / "README.md").read_text()
    assert prompt_tokens(tmp_path / "merged", portrait) == tokens

    for kind in ("peft", "paddle"):
        export(ExportConfig(run=str(turned), out=str(tmp_path / kind), adapter=kind))
        assert json.loads((tmp_path / kind / "processor_config.json").read_text())["exif_orientation"] == "rotate"
        assert "EXIF orientation" in (tmp_path / kind / "README.md").read_text()
    # A copy with nothing of ours but that file, as somebody downloads it.
    shutil.copytree(tmp_path / "peft", tmp_path / "copy", ignore=shutil.ignore_patterns("export.json", "manifest.json"))
    assert exif_in_force(find_source(tmp_path / "copy")) == "rotate"

    # Trained again on the export with data.exif=ignore, a run counts more than its base.
    (tmp_path / "again").mkdir()
    lora = apply_lora(
        load_model(base, dtype="bfloat16"), LoRASettings(groups=("attention",), rank=1, alpha=1.0), seed=3
    )
    (tmp_path / "again" / "adapter").mkdir()
    save_adapter(lora, tmp_path / "again" / "adapter", provenance(tmp_path / "merged", base_fingerprint=""))
    assert exif_in_force(find_source(tmp_path / "again")) == "ignore"


def test_orientation_in_force(turned, tmp_path):
    source = find_source(turned)
    assert (exif_in_force(source), load(turned).images.exif) == ("rotate", "rotate")
    nothing = dataclasses.replace(source, kind="base", trained=None, provenance=None)
    assert (exif_in_force(nothing), DEFAULT_READER.exif) == ("ignore", "ignore")
    for found, expected in ((None, "ignore"), ("ignore", "ignore"), ("rotate", "rotate")):
        (tmp_path / "processor_config.json").write_text(json.dumps({"exif_orientation": found}))
        assert exif_in_force(dataclasses.replace(nothing, base=tmp_path)) == expected
    for wrong in ("turn", 6, True, ["rotate"]):
        (tmp_path / "processor_config.json").write_text(json.dumps({"exif_orientation": wrong}))
        with pytest.raises(UserError, match=r"_config\.json: exif_orientation: expected ignore or rotate, found"):
            exif_in_force(dataclasses.replace(nothing, base=tmp_path))


def test_a_run_that_goes_on_keeps_its_orientation(golden_folder):
    tokenizer = Tokenizer.from_folder(golden_folder("nano_tiny"))

    def settings(exif: str) -> dict:
        config = TrainConfig()
        config.data.exif = exif
        return identity(config, fingerprint="", tokenizer=tokenizer, plan=SimpleNamespace(settings={})).settings

    assert settings("rotate") == {**settings("ignore"), "data.exif": "rotate"}


@pytest.mark.slow  # a run of one step
def test_a_run_says_how_it_opened_its_pictures(run, portrait, tmp_path):
    """From data.exif to the tokens of its packs, its adapter, its checkpoint, and what a resumed run may not change."""
    said = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "A portrait."}]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": said, "images": [portrait]}) + "\n")
    tokens = {}
    for way in ("ignore", "rotate"):
        settings = [f"data.path={data}", "max_steps=1", "data.max_tokens=1024", "data.max_tiles=2", f"data.exif={way}"]
        run_dir = tmp_path / way
        assert run(run_dir, *settings) == 0
        tokens[way] = json.loads((run_dir / "report.json").read_text())["plan"]["tokens"]
        (checkpoint,) = (run_dir / "checkpoints").iterdir()
        assert exif_in_force(find_source(run_dir)) == exif_in_force(find_source(checkpoint)) == way
    assert tokens["ignore"] != tokens["rotate"]
    with pytest.raises(UserError, match=r"data\.exif: it was rotate, now it is None"):
        run(tmp_path / "rotate", *settings[:-1], "data.exif=ignore", "resume=auto")
