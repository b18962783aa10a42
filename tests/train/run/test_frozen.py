"""Runs on a base in few bits: resumed, validated, asked and exported; how near they are to whole weights."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.train.run.test_invariance import packs_of
from train.ask.load import load
from train.config.load import load_config
from train.config.schema import NANO, ExportConfig
from train.config.serve_schema import ServeConfig
from train.export.merged import export
from train.export.verify import logits_of, make_probe
from train.run.build import open_base
from train.run.build_data import build_data
from train.run.training import train
from train.serve.models import load_models
from train.store.facts import read_fact
from train.store.provenance import ExportReport
from vl2.checkpoint.load import load_model
from vl2.lora import apply_lora
from vl2.lora_settings import LoRASettings
from vl2.parameter_groups import group_of
from vl2.quantised import Quantised, stored

KINDS = ("nf4", "int8")


def lines(run_dir: Path) -> list[dict]:
    return list(map(json.loads, (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()))


def losses(run_dir: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in lines(run_dir) if "loss" in line]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory, data_file) -> Path:
    path = data_file.with_name("held_out_frozen.jsonl")
    path.write_text("".join(data_file.read_text("utf-8").splitlines(keepends=True)[-6:]), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def run_dir(run, kind, held_out, tmp_path_factory) -> Path:
    """Six steps on a base in few bits, dropout on, a checkpoint every two."""
    folder = tmp_path_factory.mktemp("runs") / kind
    settings = (f"model.frozen={kind}", "save_steps=2", f"data.eval_path={held_out}", "eval.questions=2")
    assert run(folder, *settings, f"model.frozen_cache={folder.parent / 'cache'}") == 0
    return folder


@pytest.mark.slow
def test_losses_are_near_those_of_whole_weights(run_dir, kind, whole):
    """Each weight of nf4 is nine in a hundred off: another model, which learns alike. Seen: 2 %, of int8 0.4 %."""
    ours, theirs = (np.array(losses(folder))[:, 0] for folder in (run_dir, whole))
    near = {"nf4": 0.04, "int8": 0.01}[kind]
    assert ours == pytest.approx(theirs, rel=near) and (ours != theirs).all()


@pytest.mark.slow
def test_a_run_says_it(run_dir, kind):
    assert json.loads((run_dir / "report.json").read_text())["run"]["frozen"] == kind
    assert f"matrices in {kind}, 1 process" in (run_dir / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_resumed_bit_for_bit(run, run_dir, kind, tmp_path):
    """From step 4, the weights read from the kept files and quantised anew; whole weights are another run."""
    checkpoint = run_dir / "checkpoints" / "step-000004"
    for name, more in (("kept", [f"model.frozen_cache={run_dir.parent / 'cache'}"]), ("anew", [])):
        again = tmp_path / name
        assert run(again, f"resume={checkpoint}", f"model.frozen={kind}", *more) == 0
        assert losses(again) == losses(run_dir)[4:]
    with pytest.raises(ValueError, match=rf"model\.frozen: it was {kind}, now it is none"):
        run(tmp_path / "other", f"resume={checkpoint}")


@pytest.mark.slow
def test_eval_and_infer_compute_as_training_did(run_dir, kind, held_out, tmp_path, capsys):
    """Without being told: the loss of `eval` is that of the run's validation; whole weights have another."""
    import train.ask.evaluate as entry

    expected = json.loads((run_dir / "summary.json").read_text())["evaluation"]["after"]["loss"]
    arguments = [f"model={run_dir}", f"data.path={held_out}", f"out={tmp_path / 'out.jsonl'}", "device=cpu"]
    found = {}
    for frozen in ("auto", kind, "none"):
        more = [] if frozen == "auto" else [f"frozen={frozen}"]
        assert entry.main([*arguments, "max_new_tokens=1", *more]) == 0
        said = capsys.readouterr()
        found[frozen] = json.loads(said.out)["loss"]
        assert (f"trained on a base in {kind}, and answers on one in full; see frozen=" in said.err) is (
            frozen == "none"
        )
    assert found["auto"] == found[kind] == pytest.approx(expected, abs=1e-6)
    assert found["none"] != pytest.approx(expected, abs=1e-6)
    model = load(run_dir).model
    assert all(isinstance(stored(p), Quantised) for name, p in model.named_parameters() if name.endswith(".down"))


@pytest.mark.slow
def test_export_merges_into_the_original_weights(run_dir, kind, model_folder, tmp_path, capsys):
    """And says what that costs: how far the export is from the model that was trained."""
    out = tmp_path / "export"
    report = export(ExportConfig(run=str(run_dir), out=str(out), dtype="fp32", device="cpu"))
    trained, whole, exported = load(run_dir), load(run_dir, frozen="none"), load(out)
    probe = make_probe(trained.tokenizer, trained.candidates)
    logits = {name: logits_of(each.model, probe) for name, each in (("t", trained), ("w", whole), ("e", exported))}
    assert np.abs(logits["w"] - logits["e"]).max() <= 1e-4 * np.abs(logits["e"]).max()
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (logits["t"], logits["e"]))
    kl = float((np.exp(p) * (p - q)).sum(-1).mean())
    assert report.verified["quantised_kl"] == pytest.approx(kl, rel=1e-3) and kl > 1e-7
    assert report.verified["quantised_mean_logit_change"] == pytest.approx(
        np.abs(logits["t"] - logits["e"]).mean(), rel=1e-3
    )
    assert report.frozen == read_fact(ExportReport, out / "export.json").frozen == kind
    card = (out / "README.md").read_text("utf-8")
    assert f"| frozen matrices of the base | {kind} |" in card and "quantised_kl" in card


def test_whole_weights_say_nothing_of_it(whole, tmp_path):
    report = export(ExportConfig(run=str(whole), out=str(tmp_path / "export"), device="cpu"))
    assert report.frozen == "none" and not [name for name in report.verified if name.startswith("quantised")]
    assert "frozen matrices" not in (tmp_path / "export" / "README.md").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "trains", ["trainable=[projector]", "trainable=[vision,projector]", "lora.also_train=[vision]"]
)
def test_what_trains_itself_is_not_in_few_bits(trains, run, held_out, tmp_path, capsys):
    """It learns through what is, with adapters beside it and without; `eval` and `export` know it too."""
    import train.ask.evaluate as entry

    folder = tmp_path / "run"
    settings = ("lora.dropout=0", trains, "model.frozen=nf4", "max_steps=2")
    settings += ("lora.rank=0",) if "lora" not in trains else ()
    assert run(folder, *settings, f"data.eval_path={held_out}", "eval.questions=1", "recompute=1") == 0
    assert all(norm > 0 for _, norm in losses(folder))
    if "vision" in trains:
        groups = [line["grad_norm_of"]["vision"] for line in lines(folder) if "loss" in line]
        assert len(groups) == 2 and max(groups) > 0
    capsys.readouterr()
    arguments = [f"model={folder}", f"data.path={held_out}", f"out={tmp_path / 'out.jsonl'}", "device=cpu"]
    # What trained is float32, which precision=auto rounds to the base's type.
    assert entry.main([*arguments, "max_new_tokens=1", "precision=fp32"]) == 0
    expected = json.loads((folder / "summary.json").read_text())["evaluation"]["after"]["loss"]
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(expected, abs=1e-6)
    report = export(ExportConfig(run=str(folder), out=str(tmp_path / "export"), device="cpu"))
    assert report.frozen == "nf4" and report.verified["quantised_kl"] > 1e-7


@pytest.mark.slow
def test_a_service_keeps_the_base_as_the_adapter_was_trained(run_dir, kind, model_folder):
    """Its base beside it as well; an adapter beside a whole base is said to have been trained otherwise."""
    for served, expected in (
        (load_models(ServeConfig(model=str(run_dir), device="cpu")), kind),
        (load_models(ServeConfig(model=str(model_folder), device="cpu", adapters={"cats": str(run_dir)})), "none"),
    ):
        assert len(served) == 2 and {each.loaded.frozen for each in served.values()} == {expected}


def test_trained_weights_cannot_be_read_in_few_bits(tmp_path, run):
    settings = ("lora.rank=0", "lora.dropout=0", "trainable=[projector]", "max_steps=1")
    assert run(tmp_path / "run", *settings) == 0
    with pytest.raises(ValueError, match=r"frozen=nf4: only a base model's files .* trained weights of .*run"):
        load(tmp_path / "run", frozen="nf4")


def test_a_base_is_read_in_few_bits_on_wish(model_folder):
    whole, few = load(model_folder, frozen="none"), load(model_folder, frozen="int8")
    probe = make_probe(whole.tokenizer, whole.candidates)
    ours, theirs = logits_of(few.model, probe), logits_of(whole.model, probe)
    assert 0 < np.sqrt(np.square(ours - theirs).mean()) < 0.1 * theirs.std()
    assert few.frozen == "int8" and whole.frozen == "none"
    assert all(not isinstance(stored(p), Quantised) for p in load_model(model_folder).parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_is_kept_in_eight_bits(kind, model_folder):
    """Its matrices in either case, and neither what it adds, nor its norms, nor the pixels' projection."""
    tower = load_model(model_folder, frozen=kind).vision
    kinds = {name: kept.kind for name, p in tower.named_parameters() if isinstance(kept := stored(p), Quantised)}
    matrices = [name for name, p in tower.named_parameters() if p.ndim == 2]
    assert sorted(kinds) == sorted(matrices) and set(kinds.values()) == {"int8"}
    trained = load_model(model_folder, frozen=kind, trains=lambda path: path.startswith("vision.")).vision
    assert all(not isinstance(stored(p), Quantised) for p in trained.parameters())


def test_nothing_begins_where_a_weight_is_not_finite(arguments, tmp_path, golden_folder):
    from vl2.checkpoint.folder import read_checkpoint
    from vl2.checkpoint.tensor_files import write_safetensors

    folder = golden_folder("nano_tiny")
    tensors = {name: tensor.read() for name, tensor in read_checkpoint(folder).tensors.items()}
    tensors["language.model.layers.0.self_attn.q_proj.weight"][0, 0] = 0x7F80
    write_safetensors(folder / "model.safetensors", tensors, dict.fromkeys(tensors, "bfloat16"))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight cannot be quantised: .* not finite"):
        train(load_config(arguments(tmp_path / "run", f"model.path={folder}", "model.frozen=nf4")))
    assert not list((tmp_path / "run").glob("*.json"))


@pytest.mark.slow
def test_gradients_on_nano_point_where_those_of_whole_weights_do(arguments, tmp_path):
    """Of a model that has learned, on what it is asked: the cosine of each group's gradient. Measured: 0.981 to 0.987
    of nf4, 0.9999 of int8 (and of nf4 0.978 in the dense layer before the first step, where B is zero).
    """
    chosen = (
        "model.path=vl2/nano",
        "data.path=[]",
        "data.shapes.train=12",
        "data.shapes.test=1",
        "data.max_tokens=8192",
    )
    config = load_config(arguments(tmp_path / "run", *chosen))
    data = build_data(config, open_base(config))
    batch, found = packs_of(data, [list(range(12))])[0], {}
    for kind in ("none", *KINDS):
        model = load_model(NANO, frozen=kind)
        groups = ("attention", "experts", "shared_experts", "dense_mlp")
        lora = apply_lora(model, LoRASettings(groups=groups, rank=8, alpha=16.0), seed=1)
        draw = np.random.default_rng(0)
        for name, factor in lora.factors().items():
            if name.endswith("_B"):
                factor.set_value(draw.normal(0, 0.02, factor.shape).astype(np.float32))
        loss, count = model.loss(batch)
        (loss / count).backward()
        parts: dict[str, list[np.ndarray]] = {}
        for name, factor in lora.factors().items():
            parts.setdefault(group_of(name), []).append(factor.grad.numpy().ravel())
        found[kind] = {group: np.concatenate(each) for group, each in parts.items()}
    for kind, least in (("nf4", 0.98), ("int8", 0.999)):
        for group, exact in found["none"].items():
            ours = found[kind][group]
            assert least <= ours @ exact / np.linalg.norm(ours) / np.linalg.norm(exact) < 1 - 1e-6, (kind, group)
