"""An adapter written for PEFT and for PaddleNLP, and taken back by infer, export and lora.init; all three models."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn

from tests.places import GOLDENS
from tests.train.provenance import provenance
from train.ask.infer import infer
from train.ask.load import Loaded, load
from train.ask.source import find_source
from train.config.load import load_config
from train.config.schema import ExportConfig, InferConfig
from train.export.merged import export
from train.export.verify import logits_of, make_probe
from train.run.build import make_trainable
from vl2.adapter.folder import save_adapter
from vl2.adapter.formats import PADDLE_SHARD, PEFT_CONFIG, PEFT_FILE
from vl2.checkpoint.fingerprint import model_fingerprint
from vl2.checkpoint.folder import checkpoint_tensors
from vl2.checkpoint.load import load_model
from vl2.checkpoint.tensor_files import read_header
from vl2.lora import apply_lora
from vl2.lora_settings import GROUPS, LoRASettings

MIXED = LoRASettings(
    groups=tuple(GROUPS),
    rank=4,
    alpha=8.0,
    ranks={"experts": 2, "vision": 3},
    alphas={"experts": 7.0, "projector": 3.0},
)
SAME = LoRASettings(groups=tuple(GROUPS), rank=4, alpha=12.0)


@pytest.fixture(scope="module", params=["nano_tiny", "nano_small", "nano_base"])
def base(request, golden_folder) -> Path:
    return golden_folder(request.param)


def make_run(folder: Path, base: Path, settings: LoRASettings, **about) -> Path:
    """A finished run: factors that matter in every module, no B zero."""
    model = load_model(base)
    lora = apply_lora(model, settings, seed=3)
    rng = np.random.default_rng(0)
    for name, factor in lora.factors().items():
        if name.endswith("_B"):
            factor.set_value(rng.normal(0, 0.02, factor.shape).astype("float32"))
    (folder / "adapter").mkdir(parents=True)
    save_adapter(lora, folder / "adapter", provenance(base, **about))
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), base, MIXED)


@pytest.fixture(scope="module")
def peft(run) -> Path:
    export(ExportConfig(run=str(run), out=str(run / "peft"), adapter="peft"))
    return run / "peft"


def factors_of(loaded: Loaded) -> dict[str, paddle.Tensor]:
    return {name: p for name, p in loaded.model.named_parameters() if re.search(r"\.lora(_|\.\w+_)[AB]$", name)}


def logits(folder: Path) -> np.ndarray:
    loaded = load(folder)
    return logits_of(loaded.model, make_probe(loaded.tokenizer, loaded.candidates))


def linears(base: Path) -> dict[str, tuple[int, int]]:
    """(out, in) of every Linear of the official model, by the checkpoint's names: no table and no router."""
    stored = read_header(base / "model.safetensors")[0]
    return {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in stored.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and not re.search(r"embed_tokens|\.gate\.", name)
    }


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
    stored, metadata = read_header(peft / PEFT_FILE)
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


def test_peft_there_and_back_gives_the_same_bits(run, peft):
    assert np.array_equal(logits(run), logits(peft))
    ours, theirs = load(run), load(peft)
    assert theirs.source.provenance == ours.source.provenance and theirs.candidates == ours.candidates
    expected, found = factors_of(ours), factors_of(theirs)
    assert expected and all(np.array_equal(p.numpy(), found[name].numpy()) for name, p in expected.items())


@pytest.mark.slow
def test_paddle_there_and_back_gives_the_same_bits(base, tmp_path):
    run = make_run(tmp_path / "run", base, SAME)
    report = export(ExportConfig(run=str(run), out=str(tmp_path / "paddle"), adapter="paddle"))
    assert report.verified["largest_change"] == 0 and report.verified["tensors"] == 2 * sum(
        not re.search(r"lm_head|attn_pool", module) for module in linears(base)
    )
    assert np.array_equal(logits(run), logits(tmp_path / "paddle"))


@pytest.mark.slow
def test_paddle_has_one_rank_and_scaling_for_all(run, tmp_path):
    """Filled up with zeros, the other scaling inside B: one float32 rounding of B, and sums over more columns."""
    report = export(ExportConfig(run=str(run), out=str(tmp_path / "paddle"), adapter="paddle"))
    assert 0 < report.verified["largest_change"] < 2**-23
    before, after = logits(run), logits(tmp_path / "paddle")
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()
    assert np.abs(after - logits(find_source(run).base)).max() > 0.01 * np.abs(before).max()


class Tree(nn.Layer):
    """Empty Linears under the official names, experts one by one, as PaddleMIX's model has them."""

    config = SimpleNamespace(tensor_parallel_degree=1)

    def __init__(self, shapes):
        super().__init__()
        for module, (out, size) in shapes.items():
            *path, leaf = module.split(".")
            layer = self
            for name in path:
                if name not in layer._sub_layers:
                    layer.add_sublayer(name, nn.Layer())
                layer = layer._sub_layers[name]
            layer.add_sublayer(leaf, nn.Linear(size, out, bias_attr=False))

    def forward(self, x):
        return x


@pytest.mark.slow
def test_paddlenlp_reads_what_is_written_for_it(base, tmp_path):
    """Its loader warns at most: so every factor is compared, and none may be left as it was made."""
    from paddlenlp.peft import LoRAModel

    run = make_run(tmp_path / "run", base, SAME)
    export(ExportConfig(run=str(run), out=str(tmp_path / "paddle"), adapter="paddle"))
    model = LoRAModel.from_pretrained(Tree(linears(base)), str(tmp_path / "paddle"))
    stored = read_header(tmp_path / "paddle" / PADDLE_SHARD)[0]
    found = {name: p for name, p in model.model.state_dict().items() if "lora_" in name}
    assert found.keys() == stored.keys()
    assert all(np.array_equal(p.numpy(), stored[name].read()) for name, p in found.items())
    layer = model.model.language.model.layers._sub_layers["1"].mlp.experts._sub_layers["2"].down_proj
    ours = factors_of(load(run))
    name = "language.model.layers.1.mlp.experts.lora.down_{}"
    x = np.random.default_rng(0).normal(size=(3, layer.weight.shape[0])).astype("float32")
    a, b = (ours[name.format(letter)].numpy()[2] for letter in "AB")
    expected = x @ layer.weight.numpy() + 3.0 * (x @ a) @ b
    assert np.abs(layer(paddle.to_tensor(x)).numpy() - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_export_merges_a_peft_adapter_like_the_run(run, peft, tmp_path):
    for name, source in (("ours", run), ("theirs", peft)):
        export(ExportConfig(run=str(source), out=str(tmp_path / name), dtype="fp32"))
    ours, theirs = (checkpoint_tensors(tmp_path / name) for name in ("ours", "theirs"))
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
    from vl2.checkpoint.tensor_files import write_safetensors

    target.mkdir()
    stored = {name: tensor.read() for name, tensor in read_header(folder / PEFT_FILE)[0].items()}
    write_safetensors(target / PEFT_FILE, stored, dict.fromkeys(stored, "float32"))
    document = json.loads((folder / PEFT_CONFIG).read_text())
    (target / PEFT_CONFIG).write_text(json.dumps({**document, **config}))
    return target


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


def test_training_starts_from_a_peft_adapter(arguments, model_folder, tiny, tiny_peft, tmp_path):
    expected = factors_of(load(tiny))
    for folder in (tiny / "adapter", tiny_peft):
        model = started(arguments, model_folder, folder, MIXED, tmp_path)
        assert all(np.array_equal(p.numpy(), expected[name].numpy()) for name, p in model.factors().items())
        assert model.settings.dropout == 0.2  # the run's


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
        with pytest.raises(ValueError, match=rf"^lora\.init=.*other groups, ranks or alphas than the run.*{needed}"):
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
