"""Adapters of PEFT, built by hand from the checkpoint's names: what they mean, and what is refused."""

import re

import numpy as np
import paddle
import pytest

from tests.vl2.adapter.handmade import check, linears, make, new_model, skeleton
from vl2.adapter.folder import load_adapter, open_adapter
from vl2.adapter.formats import PEFT_CONFIG, PEFT_FILE, adapter_format, adapter_metadata
from vl2.adapter.peft_format import PEFT_NAMES
from vl2.adapter.slots import UNTUNED, UNUSED, slots
from vl2.checkpoint.layouts import official_parts
from vl2.checkpoint.tensor_files import read_header, write_safetensors
from vl2.config import VL2Config
from vl2.parameters import build_model


def test_a_list_of_ends_as_most_people_train(tmp_path):
    """q_proj and kv_b_proj of all layers: their group is tuned, its other modules add nothing."""
    factors = make(tmp_path, r".*\.(q_proj|kv_b_proj)", target_modules=["q_proj", "kv_b_proj"])
    assert {module.split(".")[-1] for module in factors} == {"q_proj", "kv_b_proj"}
    check(tmp_path, factors, 2.0)
    adapter = open_adapter(tmp_path, skeleton())
    assert (adapter.settings.groups, adapter.settings.ranks, adapter.settings.alphas) == (("attention",), {}, {})


def test_every_linear_of_every_group(tmp_path):
    """The unused pooling head is hit by such a pattern too; its factors are known and left."""
    factors = make(tmp_path, r"(?!language\.lm_head).*", base_model_name_or_path="some/base")
    assert set(factors) == linears().keys() - set(UNTUNED) and set(UNUSED) < set(factors)
    check(tmp_path, {module: pair for module, pair in factors.items() if module not in UNUSED}, 2.0)
    assert adapter_format(tmp_path) == "peft" and adapter_metadata(tmp_path) == {"base": "some/base"}


def test_rank_and_alpha_patterns_inside_a_group(tmp_path):
    """down_proj of experts and layer 1's o_proj have ranks of their own; a smaller rank fills up with zeros."""
    ranks = {r"mlp\.experts\.\d+\.down_proj": 2, "language.model.layers.1.self_attn.o_proj": 6}
    alphas = {"o_proj": 3, r"experts\.\d+\.(gate|up)_proj": 20.5}

    def rank(module):
        return 2 if re.search(r"\.experts\..*down_proj", module) else 6 if "layers.1.self_attn.o_proj" in module else 4

    def alpha(module):
        return 3 if module.endswith("o_proj") else 20.5 if re.search(r"\.experts\..*(gate|up)_proj", module) else 8

    modules = r".*\.self_attn\.(q_proj|o_proj)|.*\.mlp\.experts\..*"
    factors = make(tmp_path, modules, rank=rank, rank_pattern=ranks, alpha_pattern=alphas)
    assert {a.shape[0] for a, _ in factors.values()} == {2, 4, 6}
    check(tmp_path, factors, lambda module: alpha(module) / rank(module))
    settings = open_adapter(tmp_path, skeleton()).settings
    assert (settings.ranks, settings.alphas) == ({"attention": 6}, {"attention": 3.0, "experts": 20.5})


def test_some_experts_and_excluded_modules(tmp_path):
    factors = make(
        tmp_path,
        r".*\.experts\.[25]\.up_proj|.*\.layers\.[02]\..*\.o_proj",
        target_modules=r".*\.experts\.[25]\.(up|gate)_proj|.*\.o_proj",
        exclude_modules=["gate_proj", "layers.1.self_attn.o_proj", "layers.3.self_attn.o_proj"],
    )
    assert any(".experts.5." in module for module in factors)
    check(tmp_path, factors, 2.0)


def test_bfloat16_factors(tmp_path):
    def halved(tensors):
        return {name: (array.view("uint32") >> 16).astype("uint16") for name, array in tensors.items()}

    factors = make(tmp_path, r".*\.q_proj", tensors=halved)
    cut = {m: tuple((x.view("uint32") & 0xFFFF0000).view("float32") for x in pair) for m, pair in factors.items()}
    check(tmp_path, cut, 2.0)


def test_an_untuned_module_of_a_group_can_learn(tmp_path):
    """Starting from q_proj alone, the other A stay as initialised, so that their B, zero now, gets a gradient."""
    make(tmp_path, r".*\.q_proj")
    factors = load_adapter(new_model(), tmp_path).factors()
    other = "language.model.layers.1.self_attn.kv_b_proj.lora"
    assert factors[f"{other}_A"].abs().min() > 0 and factors[f"{other}_B"].abs().max() == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_rslora": "yes"}, r"adapter_config\.json: use_rslora is 'yes'; expected true or false"),
        ({"use_dora": True}, r"adapter_config\.json: use_dora is True; only plain LoRA can be read here"),
        ({"modules_to_save": ["lm_heat"]}, r"modules_to_save is \['lm_heat'\]; no module of this model"),
        ({"modules_to_save": ["lm_head"]}, r"missing \(1\): base_model\.model\.language\.lm_head\.weight"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out is True; only plain LoRA"),
        ({"bias": "lora_only"}, r"bias is 'lora_only'; expected none"),
        ({"lora_bias": True}, r"lora_bias is True; only plain LoRA"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\]; only plain LoRA"),
        ({"key_of_next_year": {"a": 1}}, r"key_of_next_year is \{'a': 1\}; only plain LoRA"),
        (
            {"init_lora_weights": "pissa"},
            r"init_lora_weights is 'pissa'; such an adapter adds to a base that was changed",
        ),
        ({"peft_type": "LOHA"}, r"peft_type is 'LOHA'; expected LORA"),
        ({"r": 0}, r"r is 0; expected a positive integer"),
        ({"r": None}, r"r is None; expected a positive integer"),
        ({"lora_alpha": "8"}, r"lora_alpha is '8'; expected a positive number"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern\['q_proj'\] is 2\.5; expected a positive integer"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern is \['q_proj'\]; expected a table of patterns"),
        ({"rank_pattern": {"q_(proj": 2}}, r"rank_pattern holds 'q_\(proj', which is no regular expression"),
        ({"target_modules": None}, r"target_modules is None; expected a regular expression or a list of names"),
        ({"lora_dropout": "0.1"}, r"lora_dropout is '0\.1'; expected a probability in \[0, 1\)"),
        ({"target_modules": "["}, r"target_modules holds '\[', which is no regular expression"),
    ],
)
def test_other_methods_and_wrong_values_are_refused_by_name(tmp_path, config, message):
    make(tmp_path, r".*\.q_proj", **config)
    with pytest.raises(ValueError, match=message):
        open_adapter(tmp_path, skeleton())


NAME = "base_model.model.language.model.layers.0.self_attn.q_proj.lora_{}.weight"


def without(tensors):
    return {name: array for name, array in tensors.items() if name != NAME.format("B")}


def added(tensors):
    return {**tensors, "base_model.model.language.model.embed_tokens.lora_embedding_A": np.zeros((4, 9), "float32")}


def reshaped(tensors):
    return {**tensors, NAME.format("A"): tensors[NAME.format("A")][:, :-1].copy()}


@pytest.mark.parametrize(
    ("change", "config", "lines"),
    [
        (without, {}, [rf"missing \(1\): {NAME.format('B')}"]),
        (added, {}, [r"unknown \(1\): base_model\.model\.language\.model\.embed_tokens\.lora_embedding_A"]),
        (reshaped, {}, [rf"wrong shape \(1\): {NAME.format('A')} is \[4, 63\], expected \[4, 64\]"]),
        # The configuration says another rank, or other modules, than the weights have.
        (None, {"r": 8}, [rf"wrong shape \(8\): {NAME.format('A')} is \[4, 64\], expected \[8, 64\]"]),
        (None, {"target_modules": ["q_proj", "o_proj"]}, [r"missing \(8\): .*layers\.0\.self_attn\.o_proj\.lora_A"]),
        (None, {"target_modules": ["o_proj"]}, [r"missing \(8\): .*o_proj", r"unknown \(8\): .*q_proj"]),
        (
            None,
            {"target_modules": ["query"]},
            [r"unknown \(8\)", r"targets no module of this model; expected modules of"],
        ),
        (
            None,
            {"target_modules": ["q_proj", "lm_head"]},
            [r"adapter_config\.json targets language\.lm_head; expected"],
        ),
    ],
)
def test_weights_configuration_and_base_that_disagree(tmp_path, change, config, lines):
    make(tmp_path, r".*\.q_proj", tensors=change, base_model_name_or_path="org/other", **config)
    with pytest.raises(ValueError, match=r"and the base model do not fit \(it names org/other as its base\)") as error:
        open_adapter(tmp_path, skeleton())
    assert all(re.search(line, str(error.value)) for line in lines), str(error.value)


def test_an_adapter_of_a_model_with_more_layers(tmp_path):
    """Its own weights and configuration agree; layer 4 is not in this base."""

    def deeper(tensors):
        return {**tensors, **{n.replace("layers.0.", "layers.4."): a for n, a in tensors.items() if "layers.0." in n}}

    make(tmp_path, r".*\.q_proj", tensors=deeper)
    with pytest.raises(ValueError, match=r"do not fit\n  unknown \(2\): .*layers\.4\.self_attn\.q_proj\.lora_A"):
        open_adapter(tmp_path, skeleton())


def test_files_that_are_not_there_or_not_readable(tmp_path):
    make(tmp_path, r".*\.q_proj")
    (tmp_path / PEFT_FILE).unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors there"):
        open_adapter(tmp_path, skeleton())
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle, which may run code and is not read"):
        open_adapter(tmp_path, skeleton())
    (tmp_path / PEFT_CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: not JSON"):
        open_adapter(tmp_path, skeleton())
    (tmp_path / PEFT_CONFIG).write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config\.json: expected a JSON object, found a list"):
        open_adapter(tmp_path, skeleton())


def test_a_damaged_entry_of_ours(tmp_path):
    make(tmp_path, r".*\.q_proj")
    stored = {name: tensor.read() for name, tensor in read_header(tmp_path / PEFT_FILE)[0].items()}
    write_safetensors(tmp_path / PEFT_FILE, stored, dict.fromkeys(stored, "float32"), {"format": "pt", "vl2": "{"})
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: the entry 'vl2' of its header: not JSON"):
        open_adapter(tmp_path, skeleton())


def test_names_at_real_size_need_no_weights():
    """DeepSeek-VL2-Tiny: 48 attention, 11 x 64 x 3 expert, 33 shared, 3 dense, 27 x 4 vision, 2 projector Linears."""
    language = {"hidden_size": 1280, "intermediate_size": 6848, "moe_intermediate_size": 896, "vocab_size": 129280}
    language |= {"num_hidden_layers": 12, "num_attention_heads": 10, "num_key_value_heads": 10, "use_mla": False}
    language |= {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
    config = VL2Config.from_dict(
        {"language_config": {**language, "q_lora_rank": None}, "projector_config": {"n_embed": 1280}}
    )
    found = slots(build_model(config, 128815))
    groups = [slot.group for slot in found.values()]
    counts = {"attention": 48, "experts": 2112, "shared_experts": 33, "dense_mlp": 3, "vision": 108, "projector": 2}
    assert {name: groups.count(name) for name in counts} == counts
    shapes = {
        PEFT_NAMES.name(module, letter): PEFT_NAMES.shape(slot, letter, 8)
        for module, slot in found.items()
        for letter in "AB"
    }
    prefix = "base_model.model.language.model.layers.11.mlp"
    assert shapes[f"{prefix}.experts.63.down_proj.lora_A.weight"] == (8, 896)
    assert shapes[f"{prefix}.experts.63.down_proj.lora_B.weight"] == (1280, 8)
    assert shapes[f"{prefix}.shared_experts.up_proj.lora_B.weight"] == (1792, 8)
    assert shapes["base_model.model.vision.blocks.26.attn.qkv.lora_B.weight"] == (3456, 8)
    assert shapes["base_model.model.projector.layers.0.lora_A.weight"] == (8, 4608)
    assert len(shapes) == 2 * 2306


def test_logits_of_a_foreign_adapter_are_those_of_the_merged_weights(tmp_path):
    """All the way to logits, and not by `slots`: W + alpha / r * B A added to the official tensors, [out, in]."""
    factors = make(tmp_path, r"language\.model\..*_proj")
    ids = np.arange(5, 35)
    batch = {"input_ids": ids, "position_ids": np.arange(30), "seq_lens": np.array([30])}

    def logits(model):
        with paddle.no_grad():
            return model.language.logits(model(batch)).numpy()

    merged, added = new_model(), set()
    parameters = dict(merged.named_parameters())
    for path, parts in official_parts(merged):
        whole = parameters[path].numpy()
        for part in parts:
            module = part.name.removesuffix(".weight")
            if module in factors:
                a, b = factors[module]
                whole[part.at] += 2.0 * (b @ a).T
                added.add(module)
        parameters[path].set_value(whole)
    assert added == set(factors)
    expected = logits(merged)
    found = logits(load_adapter(new_model(), tmp_path).model)
    assert np.abs(logits(new_model()) - expected).max() > 0.1 * np.abs(expected).max()
    # x (W + s A B) against x W + s (x A) B: another order of float32 sums.
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
