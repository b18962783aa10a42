"""Adapters of every kind through a whole run: gradients, resume bit for bit, merged and alone through `infer`."""

import shutil

import numpy as np
import pytest

from tests.train.export.adapter_runs import logits
from train.config.schema import ExportConfig
from train.export.merged import export
from vl2.checkpoint.tensor_files import read_header

KINDS = {  # settings of a run, and the formats in which its adapter goes out alone
    "PiSSA": (["lora.pissa=true", "lora.dropout=0", "lora.groups=[attention,experts,projector]"], ("peft",)),
    "rsLoRA and LoRA+ beside trained groups": (
        [
            "lora.rslora=true",
            "lora.plus_scale=4",
            "lora.ranks.experts=2",
            "lora.also_train=[projector,embeddings,head,norms,routers]",
            "optim.groups.projector.lr_scale=0.5",
            "optim.groups.projector.weight_decay=0.1",
        ],
        ("paddle",),
    ),
}


def tensors(folder):
    return {name: tensor.read() for name, tensor in read_header(folder / "adapter/peft_model.safetensors")[0].items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_from_its_start_to_an_answer(kind, run, model_folder, tmp_path):
    """The trainer itself proves that gradients reach all that trains; here all of it has moved, too."""
    settings, formats = KINDS[kind]
    options = (*settings, "lora.rank=4", "optim.lr=1e-3", "max_steps=2", "packs_per_step=4", "eval.questions=0")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(whole, *options, "save_steps=1") == 0
    first, last = (tensors(whole / place) for place in ("checkpoints/step-000001", "."))
    still = {name for name in last if np.array_equal(first[name], last[name])}
    assert still == {name for name in last if name.endswith("_start")}
    assert bool(still) == (kind == "PiSSA")

    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step-000002")
    assert run(part, *options, "resume=auto") == 0
    resumed = tensors(part)
    assert resumed.keys() == last.keys()
    assert all(np.array_equal(resumed[name], last[name]) for name in last)

    expected = logits(whole)
    merged = export(ExportConfig(run=str(whole), out=str(tmp_path / "merged"), dtype="fp32"))
    assert merged.verified["merge_error"] < 1e-5
    assert np.abs(logits(tmp_path / "merged") - expected).max() < 1e-5 * np.abs(expected).max()
    for form in formats:
        export(ExportConfig(run=str(whole), out=str(tmp_path / form), adapter=form))
        found = logits(tmp_path / form)
        if form == "paddle":  # the experts' factors are filled up to the one rank of all: sums over more columns
            assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
        else:
            assert np.array_equal(found, expected)
    if kind != "PiSSA":
        with pytest.raises(ValueError, match="it has trained image_newline and view_seperator too, which PEFT's files"):
            export(ExportConfig(run=str(whole), out=str(tmp_path / "peft"), adapter="peft"))
