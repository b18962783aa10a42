"""Whole weights beside the factors, in the files of PEFT and PaddleNLP, and rsLoRA's scaling there."""

import numpy as np
import pytest

from tests.vl2.adapter.handmade import check, make, make_paddle, new_model, skeleton
from vl2.adapter.folder import load_adapter, open_adapter
from vl2.adapter.formats import OWN_FILE, PEFT_FILE
from vl2.adapter.weights import in_words, saved_module, whole_parts, written_weights
from vl2.checkpoint.tensor_files import read_header, write_safetensors
from vl2.errors import UserError
from vl2.parameter_groups import WHOLE_GROUPS, whole_parameters

SAVED = ["model.norm", "lm_head", "mlp.gate"]  # as a user types them: ends of names


def add(folder, file, tensors):
    stored = {name: tensor.read() for name, tensor in read_header(folder / file)[0].items()}
    both = {**stored, **tensors}
    write_safetensors(folder / file, both, dict.fromkeys(both, "float32"))


def whole_tensors(prefix, layout):
    """A norm, the head and the routers with numbers of their own, as a format has them, and the numbers by path."""
    rng, parts = np.random.default_rng(1), whole_parts(skeleton(), layout)
    shapes = {name: p.shape for name, p in skeleton().named_parameters()}
    paths = [p for p in parts if p == "language.model.norm.weight" or "lm_head" in p or ".mlp.gate." in p]
    values = {path: rng.normal(0, 0.1, shapes[path]).astype("float32") for path in paths}
    assert len(paths) == 5
    tensors = {}
    for path, value in values.items():
        turned = ("lm_head" in path) if layout == "hf" else (".gate." in path)  # Paddle's head is [in, out]
        tensors[f"{prefix}{path}"] = np.ascontiguousarray(value.T) if turned else value
    return tensors, values


@pytest.mark.parametrize("form", ["peft", "paddle"])
def test_whole_weights_replace_the_bases(form, tmp_path):
    prefix, layout = ("base_model.model.", "hf") if form == "peft" else ("", "paddle")
    tensors, values = whole_tensors(prefix, layout)
    if form == "peft":
        make(tmp_path, r".*\.o_proj", modules_to_save=SAVED)
        add(tmp_path, PEFT_FILE, tensors)
    else:
        patterns = [r"language\.lm_head\.weight", r".*\.mlp\.gate\.weight", r"language\.model\.norm\..*"]
        make_paddle(tmp_path, trainable_modules=patterns)
        add(tmp_path, OWN_FILE, tensors)
    said, model = [], new_model()
    before = {name: p.numpy() for name, p in model.named_parameters()}
    load_adapter(model, tmp_path, say=said.append)
    now = dict(model.named_parameters())
    for name, value in before.items():
        assert np.array_equal(now[name].numpy(), values.get(name, value)), name
    expected = "1 weight of head, 1 weight of norms, 3 weights of routers"
    assert sorted(said[0].split("its own ")[1].split(" in place")[0].split(", ")) == sorted(expected.split(", "))


def test_a_whole_weight_that_is_missing_or_of_no_module(tmp_path):
    make(tmp_path, r".*\.o_proj", modules_to_save=SAVED)
    tensors, _ = whole_tensors("base_model.model.", "hf")
    lacking = dict(list(tensors.items())[1:])
    add(tmp_path, PEFT_FILE, lacking)
    with pytest.raises(UserError, match=rf"whole weights and the base.*\n  missing \(1\): {next(iter(tensors))}"):
        open_adapter(tmp_path, skeleton())
    add(tmp_path, PEFT_FILE, {**tensors, "base_model.model.language.model.embed_tokens.weight": np.zeros((2, 2), "f")})
    with pytest.raises(UserError, match=r"unknown \(1\): base_model\.model\.language\.model\.embed_tokens\.weight"):
        open_adapter(tmp_path, skeleton())


def test_what_is_written_is_read_again(tmp_path):
    """Every group that can train beside adapters, in both layouts: the base's values where the adapter has none."""
    model = skeleton()
    paths = whole_parameters((name for name, _ in model.named_parameters()), WHOLE_GROUPS)
    values = dict(new_model().named_parameters())
    for layout, prefix in (("hf", "base_model.model."), ("paddle", "")):
        written = written_weights(paths, {}, values.__getitem__, prefix, whole_parts(model, layout))
        assert len(written) == len(paths)
        head = written[f"{prefix}language.lm_head.weight"]
        wanted = values["language.lm_head.weight"].numpy()
        assert np.array_equal(head.T if layout == "hf" else head, wanted)
    assert {saved_module(path) for path in paths if path.startswith("vision")} == {"vision"}
    assert saved_module("language.model.layers.3.input_layernorm.weight") == "language.model.layers.3.input_layernorm"
    assert in_words(["image_newline"]) == "image_newline"


@pytest.mark.parametrize(("own_rank", "expected"), [(4, 6 / 2), (9, 6 / 3)])
def test_scaling_of_rslora(own_rank, expected, tmp_path):
    """alpha / sqrt(rank), of every module with its own rank."""
    pattern = {"down_proj": own_rank}
    rank = lambda module: own_rank if module.endswith("down_proj") else 4  # noqa: E731
    patterns = {"use_rslora": True, "lora_alpha": 6, "rank_pattern": pattern}
    factors = make(tmp_path, r".*\.shared_experts\..*", rank=rank, **patterns)
    check(tmp_path, factors, lambda module: expected if module.endswith("down_proj") else 3.0)
