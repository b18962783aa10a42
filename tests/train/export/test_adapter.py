"""An adapter written for PEFT and for PaddleNLP, and taken back by infer, export and lora.init; all three models."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.places import GOLDENS
from tests.train.export.adapter_runs import MIXED, SAME, factors_of, linears, logits, make_run
from tests.train.provenance import provenance
from train.ask.infer import infer
from train.ask.load import load
from train.ask.source import find_source
from train.config.load import load_config
from train.config.schema import ExportConfig, InferConfig
from train.export.merged import export, main
from train.run.build import make_trainable
from vl2.adapter.formats import PEFT_CONFIG, PEFT_FILE
from vl2.checkpoint.fingerprint import model_fingerprint
from vl2.checkpoint.folder import read_checkpoint
from vl2.checkpoint.load import load_model
from vl2.checkpoint.tensor_files import read_header, write_safetensors
from vl2.errors import UserError
from vl2.lora_settings import LoRASettings


@pytest.fixture(scope="module", params=["nano_tiny", "nano_small", "nano_base"])
def base(request, golden_folder) -> Path:
    return golden_folder(request.param)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), base, MIXED)


@pytest.fixture(scope="module")
def peft(run) -> Path:
    export(ExportConfig(run=str(run), out=str(run / "peft"), adapter="peft"))
    return run / "peft"


def rank(module: str) -> int:
    """MIXED, by words of the official name."""
    return 2 if ".experts." in module else 3 if module.startswith("vision") else 4


def alpha(module: str) -> float:
    return 7.0 if ".experts." in module else 3.0 if module.startswith("projector") else 8.0


def test_names_and_shapes_are_those_peft_gives_the_official_modules(base, peft):
    expected = {}
    for module, (out, size) in linears(base).items():
        if not re.search(r"lm_head|attn_pool", module):
            expected[f"base_model.model.{module}.lora_A.weight"] = (rank(module), size)
            expected[f"base_model.model.{module}.lora_B.weight"] = (out, rank(module))
    stored, metadata, _ = read_header(peft / PEFT_FILE)
    assert {name: tensor.shape for name, tensor in stored.items()} == expected
    assert any(".experts.3.gate_proj." in name for name in expected) and metadata["format"] == "pt"
    assert {tensor.dtype for tensor in stored.values()} == {"float32"}
    assert any(".kv_b_proj." in name for name in expected) == ("nano_tiny" not in str(base))


def test_every_peft_since_0_10_reads_the_configuration_alike(base, peft):
    """Modules, ranks and alphas by the two ways in which versions of PEFT look a module up.

    Up to 0.14 a key needs something and a dot before it, and 0.10 looks one key up for rank and alpha together.
    """
    config = json.loads((peft / PEFT_CONFIG).read_text())
    keys = [*config["rank_pattern"], *config["alpha_pattern"]]
    assert len(config["rank_pattern"]) == 2 and len(config["alpha_pattern"]) == 2
    for module in linears(base):
        is_target = re.fullmatch(config["target_modules"], module) is not None
        assert is_target == (not re.search(r"lm_head|attn_pool", module)), module
        if not is_target:
            continue
        together = next((key for key in keys if re.match(rf".*\.{key}$", module)), module)
        for look_up in (
            lambda table, together=together: table.get(together),
            lambda table, module=module: next((table[k] for k in table if re.match(rf".*\.{k}$", module)), None),
            lambda table, module=module: next((table[k] for k in table if re.match(rf"(.*\.)?({k})$", module)), None),
        ):
            assert (look_up(config["rank_pattern"]) or config["r"]) == rank(module), module
            assert (look_up(config["alpha_pattern"]) or config["lora_alpha"]) == alpha(module), module


def test_peft_configuration_has_no_key_that_0_10_does_not_know(peft):
    """An unknown key is an error to it. Source: fields of LoraConfig, PeftConfig in 0.10."""
    config = json.loads((peft / PEFT_CONFIG).read_text())
    known = """peft_type auto_mapping base_model_name_or_path revision task_type inference_mode r target_modules
        lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights
        layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core loftq_config
        use_dora layer_replication"""
    assert set(config) <= set(known.split())
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8, True)


@pytest.mark.slow
def test_peft_there_and_back_gives_the_same_bits(run, peft):
    assert np.array_equal(logits(run), logits(peft))
    ours, theirs = load(run), load(peft)
    assert theirs.source.provenance == ours.source.provenance and theirs.candidates == ours.candidates
    expected, found = factors_of(ours), factors_of(theirs)
    assert expected and all(np.array_equal(p.numpy(), found[name].numpy()) for name, p in expected.items())


@pytest.mark.slow
def test_export_merges_a_peft_adapter_like_the_run(run, peft, tmp_path):
    for name, source in (("ours", run), ("theirs", peft)):
        export(ExportConfig(run=str(source), out=str(tmp_path / name), dtype="fp32"))
    ours, theirs = (read_checkpoint(tmp_path / name).tensors for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name].read(), theirs[name].read()) for name in ours)


@pytest.mark.slow
def test_peft_to_paddle_and_again_to_peft(base, tmp_path):
    run = make_run(tmp_path / "run", base, SAME)
    for source, name, form in (("run", "a", "peft"), ("a", "b", "paddle"), ("b", "c", "peft")):
        export(ExportConfig(run=str(tmp_path / source), out=str(tmp_path / name), adapter=form))
    first, last = (read_header(tmp_path / name / PEFT_FILE)[0] for name in "ac")
    assert first.keys() == last.keys() and all(np.array_equal(first[n].read(), last[n].read()) for n in first)
    assert np.array_equal(logits(run), logits(tmp_path / "c"))


# ---- what follows is the same for every model


@pytest.fixture(scope="module")
def tiny(model_folder, tmp_path_factory) -> Path:
    """A run of nano_tiny."""
    return make_run(tmp_path_factory.mktemp("tiny"), model_folder, MIXED)


@pytest.fixture(scope="module")
def tiny_peft(tiny) -> Path:
    export(ExportConfig(run=str(tiny), out=str(tiny / "peft"), adapter="peft"))
    return tiny / "peft"


def changed(folder: Path, target: Path, **config) -> Path:
    """A copy as another tool would have written it: nothing of ours in the header, other keys in the configuration."""
    target.mkdir()
    stored = {name: tensor.read() for name, tensor in read_header(folder / PEFT_FILE)[0].items()}
    write_safetensors(target / PEFT_FILE, stored, dict.fromkeys(stored, "float32"))
    document = json.loads((folder / PEFT_CONFIG).read_text())
    (target / PEFT_CONFIG).write_text(json.dumps({**document, **config}))
    return target


@pytest.mark.slow
def test_an_adapter_without_a_word_of_ours(tiny_peft, model_folder, tmp_path):
    """The base from its configuration, or from base=; all resolutions of the base are in force."""
    foreign = changed(tiny_peft, tmp_path / "a")
    found = find_source(foreign)
    assert (found.provenance, found.base_name, found.base) == (None, str(model_folder), model_folder)
    loaded = load(foreign)
    assert loaded.candidates == load(model_folder).candidates and not loaded.source.rehearsal
    answer = infer(loaded, InferConfig(prompt="What?", max_new_tokens=6))["ids"]
    assert answer == infer(load(tiny_peft), InferConfig(prompt="What?", max_new_tokens=6))["ids"]
    lost = changed(tiny_peft, tmp_path / "b", base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"this adapter does not name its base model; give base=FOLDER"):
        load(lost)
    again = load(lost, base=str(model_folder))
    assert infer(again, InferConfig(prompt="What?", max_new_tokens=6))["ids"] == answer
    gone = changed(tiny_peft, tmp_path / "c", base_model_name_or_path="/nowhere/base")
    with pytest.raises(ValueError, match=r"/nowhere/base, which is not there now .*; give base=FOLDER"):
        load(gone)
    export(ExportConfig(run=str(gone), out=str(tmp_path / "merged"), base=str(model_folder), dtype="fp32"))
    assert json.loads((tmp_path / "merged" / "export.json").read_text())["base"] == str(model_folder)


@pytest.mark.slow
def test_base_is_for_adapters_and_must_be_the_right_one(tiny, tiny_peft, model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"base=x: .* holds neither an adapter nor trained weights"):
        load(model_folder, base="x")
    with pytest.raises(ValueError, match=r"/nowhere: no such folder"):
        load(tiny_peft, base="/nowhere")
    marked = make_run(tmp_path / "run", model_folder, SAME, base_fingerprint="0" * 64)
    export(ExportConfig(run=str(marked), out=str(tmp_path / "peft"), adapter="peft"))
    for folder in (marked, tmp_path / "peft"):
        with pytest.raises(ValueError, match=r"trained on another base model \(.*fingerprint 000000000000; the model"):
            load(folder)
    other = tmp_path / "other"
    shutil.copytree(GOLDENS / "nano_small", other)
    shutil.copy(model_folder / "tokenizer.json", other)
    with pytest.raises(ValueError, match=r"do not fit \(it names .* as its base\)\n  missing"):
        load(changed(tiny_peft, tmp_path / "foreign"), base=str(other))
    theirs = provenance(other)["base_fingerprint"]
    mistaken = make_run(tmp_path / "mistaken", model_folder, MIXED, base_fingerprint=theirs)
    with pytest.raises(ValueError, match=r"does not fit the model and its LoRA groups\n  missing"):
        load(mistaken, base=str(other))


def keys(settings: LoRASettings) -> list[str]:
    found = [f"lora.groups=[{','.join(settings.groups)}]", f"lora.rank={settings.rank}", f"lora.alpha={settings.alpha}"]
    found += [f"lora.ranks.{name}={value}" for name, value in settings.ranks.items()]
    return found + [f"lora.alphas.{name}={value}" for name, value in settings.alphas.items()]


def started(arguments, model_folder, folder, settings, tmp_path, *more):
    config = load_config([*arguments(tmp_path), *keys(settings), f"lora.init={folder}", *more])
    model = load_model(model_folder)
    fingerprint = model_fingerprint(model)
    return make_trainable(model, config, candidates=model.config.candidate_resolutions, base_fingerprint=fingerprint)[0]


@pytest.mark.slow
def test_training_starts_from_a_peft_adapter(arguments, model_folder, tiny, tiny_peft, tmp_path):
    expected = factors_of(load(tiny))
    for folder in (tiny / "adapter", tiny_peft):
        model = started(arguments, model_folder, folder, MIXED, tmp_path)
        assert all(np.array_equal(p.numpy(), expected[name].numpy()) for name, p in model.factors().items())
        assert model.settings.dropout == 0.2  # the run's


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        LoRASettings(groups=MIXED.groups, rank=8, alpha=8.0, ranks=MIXED.ranks, alphas=MIXED.alphas),
        LoRASettings(groups=MIXED.groups, rank=4, alpha=9.0, ranks=MIXED.ranks, alphas=MIXED.alphas),
        LoRASettings(groups=("attention",), rank=4, alpha=8.0),
    ],
)
def test_training_from_an_adapter_of_other_settings_names_the_keys(
    arguments, model_folder, tiny, tiny_peft, tmp_path, settings
):
    """With another alpha the same factors would be another model, without a word."""
    needed = (
        r"lora\.groups=\[attention,experts,shared_experts,dense_mlp,vision,projector\] lora\.rank=4 lora\.alpha=8 "
        r"lora\.ranks\.experts=2 lora\.ranks\.vision=3 lora\.alphas\.experts=7 lora\.alphas\.projector=3$"
    )
    for folder in (tiny / "adapter", tiny_peft):
        with pytest.raises(ValueError, match=rf"^lora\.init=.*other groups, ranks or scalings than the run.*{needed}"):
            started(arguments, model_folder, folder, settings, tmp_path)


def test_training_from_an_adapter_needs_a_rank_and_the_same_base(arguments, model_folder, tiny_peft, tmp_path):
    with pytest.raises(ValueError, match=r"lora\.init=x with lora\.rank=0: no adapter would train"):
        load_config([*arguments(tmp_path), "lora.init=x", "lora.rank=0"])
    marked = make_run(tmp_path / "run", model_folder, SAME, base_fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"trained on another base model"):
        started(arguments, model_folder, marked / "adapter", SAME, tmp_path)


def test_what_adapter_does_not_go_with(tiny, tiny_peft, model_folder, tmp_path):
    config = {"run": str(tiny), "out": str(tmp_path / "out"), "adapter": "peft"}
    with pytest.raises(ValueError, match=r"adapter=peft with layout=paddle dtype=base: these two are for merged"):
        export(ExportConfig(**config, layout="paddle"))
    with pytest.raises(ValueError, match=r"with layout=hf dtype=bf16: .* leave them out"):
        export(ExportConfig(**config, dtype="bf16"))
    with pytest.raises(ValueError, match=r"there is no adapter, so adapter=peft has nothing to write"):
        export(ExportConfig(**{**config, "run": str(model_folder)}))
    with pytest.raises(ValueError, match=r"give overwrite=true to replace it"):
        export(ExportConfig(**{**config, "out": str(tiny_peft)}))
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_written_without_the_bases_weights(tiny, tiny_peft, model_folder, tmp_path):
    """Names and shapes come from config.json: a laptop can write the adapter of a 55 GB model."""
    shutil.copytree(model_folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    config = ExportConfig(run=str(tiny), out=str(tmp_path / "out"), adapter="peft", base=str(tmp_path / "base"))
    assert export(config).verified["modules"] == 110
    ours, theirs = (folder / PEFT_FILE for folder in (tiny_peft, tmp_path / "out"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_an_adapter_takes_its_resolutions_along(tiny, tiny_peft, model_folder, tmp_path):
    """An image of 437 tokens in training had 1431 on the other side: processor_config.json stayed behind.

    Read back here too, from a copy that holds nothing else of ours.
    """
    expected = load(tiny).candidates
    assert expected != load(model_folder).candidates
    document = json.loads((tiny_peft / "processor_config.json").read_text())
    assert [tuple(pair) for pair in document["candidate_resolutions"]] == list(expected)
    assert document["processor_class"] == "DeepseekVLV2Processor" and document["patch_size"] == 14
    copy = changed(tiny_peft, tmp_path / "copy")
    shutil.copy(tiny_peft / "processor_config.json", copy)
    assert load(copy).candidates == expected
    export(ExportConfig(run=str(copy), out=str(tmp_path / "merged"), dtype="fp32"))
    assert load(tmp_path / "merged").candidates == expected
    export(ExportConfig(run=str(copy), out=str(tmp_path / "again"), adapter="paddle"))
    assert json.loads((tmp_path / "again" / "processor_config.json").read_text()) == document
    for wrong in ([[384, 400]], [], "all", [[384]], [[384, -384]], [[True, 384]], [[384 * 10**6, 384]]):
        (copy / "processor_config.json").write_text(json.dumps({"candidate_resolutions": wrong}))
        with pytest.raises(UserError, match=r"processor_config\.json: candidate_resolutions: expected a list of"):
            load(copy)


def without_o_proj(folder: Path, target: Path) -> Path:
    """A PEFT adapter as somebody trains it who left one Linear of a group out."""
    target.mkdir()
    stored = {n: t.read() for n, t in read_header(folder / PEFT_FILE)[0].items() if ".o_proj." not in n}
    write_safetensors(target / PEFT_FILE, stored, dict.fromkeys(stored, "float32"))
    document = json.loads((folder / PEFT_CONFIG).read_text())
    (target / PEFT_CONFIG).write_text(json.dumps({**document, "exclude_modules": ["o_proj"]}))
    return target


@pytest.mark.slow
def test_modules_without_factors_are_named(arguments, model_folder, tiny_peft, tmp_path, capsys):
    """An adapter that lacked a Linear of a group was taken without a word: by infer, both exports and lora.init."""
    part = without_o_proj(tiny_peft, tmp_path / "part")
    what = f"4 modules of its groups have no factors in {part}: attention.o_proj (4)"
    load(part)
    assert f"note: {what}; they compute as in the base\n" in capsys.readouterr().err
    export(ExportConfig(run=str(part), out=str(tmp_path / "merged"), dtype="fp32"))
    assert f"note: {what}; they stay as in the base\n" in capsys.readouterr().err
    export(ExportConfig(run=str(part), out=str(tmp_path / "again"), adapter="peft"))
    assert f"note: {what}; zeros are written for them\n" in capsys.readouterr().err
    started(arguments, model_folder, part, MIXED, tmp_path)
    assert f"note: lora.init: {what}; they start anew\n" in capsys.readouterr().err
    load(tiny_peft)
    assert "have no factors" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("form", "call"), [("peft", "merge_and_unload()"), ("paddle", "merge()")])
@pytest.mark.parametrize("family", ["nano_tiny", "nano_small"])
def test_latent_attention_must_be_merged_first(golden_folder, tmp_path, capsys, family, form, call):
    """The official code and PaddleMIX read kv_b_proj.weight past an unmerged adapter: half of the words were others."""
    run = make_run(tmp_path / "run", golden_folder(family), LoRASettings(groups=("attention",), rank=2))
    assert main([f"run={run}", f"out={tmp_path / 'out'}", f"adapter={form}", "device=cpu"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    card = (tmp_path / "out" / "README.md").read_text()
    if family == "nano_small":
        assert last.startswith(f"note: call {call} after loading it: ") and "reads kv_b_proj.weight past" in last
        assert last.removeprefix("note: ") in card
    else:
        assert "merge" not in last and "kv_b_proj" not in card


def test_an_adapter_that_reads_back_otherwise_gets_no_name(tiny, tmp_path, monkeypatch):
    import train.export.adapter as module

    def damage(path, tensors, dtypes, metadata):
        name = next(iter(tensors))
        write(path, {**tensors, name: tensors[name] + 1}, dtypes, metadata)

    write = module.write_safetensors
    monkeypatch.setattr(module, "write_safetensors", damage)
    with pytest.raises(ValueError, match=r"refused: 1 tensors read back otherwise \(base_model\.model\.vision"):
        export(ExportConfig(run=str(tiny), out=str(tmp_path / "out"), adapter="peft"))
    monkeypatch.setattr(module, "write_safetensors", write)
    config = module.peft_config
    monkeypatch.setattr(module, "peft_config", lambda *given: {**config(*given), "lora_alpha": 9})
    with pytest.raises(ValueError, match=r"refused: a module's A or scaled B changed by"):
        export(ExportConfig(run=str(tiny), out=str(tmp_path / "out"), adapter="peft"))
    assert not (tmp_path / "out").exists()
