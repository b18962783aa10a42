"""The official layout and PaddleMIX's: told apart, read into the same model, never guessed."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.places import FAMILIES, GOLDENS
from vl2.checkpoint.fingerprint import model_fingerprint, stored_fingerprint
from vl2.checkpoint.folder import read_checkpoint
from vl2.checkpoint.load import load_model
from vl2.checkpoint.model_folder import open_folder
from vl2.checkpoint.tensor_files import write_safetensors
from vl2.errors import UserError

# Written out by hand, from PaddleMIX's modules: what is a paddle.nn.Linear, and the router.
MATRICES = re.compile(
    r"(.*\.(qkv|proj|fc1|fc2|[qkvo]_proj|kv_a_proj_with_mqa|kv_b_proj|(gate|up|down)_proj|gate|lm_head)"
    r"|projector\.layers\.[02]|vision\.attn_pool\.(q|kv))\.weight"
)


@pytest.fixture
def folder(golden_folder) -> Path:
    return golden_folder("nano_tiny")


def to_paddle(folder: Path, *, form: str | None = "np", keep: str = "", shards: int = 1) -> None:
    """Rewrite a checkpoint as PaddleNLP saves PaddleMIX's model: matrices transposed, metadata `form`.

    Args:
        keep: names that contain it stay as they are.
        shards: files to spread the tensors over.
    """
    arrays = {}
    for name, tensor in read_checkpoint(folder).tensors.items():
        turn = MATRICES.fullmatch(name) and tensor.read().ndim == 2 and not (keep and keep in name)
        arrays[name] = tensor.read().T if turn else tensor.read()
    (folder / "model.safetensors").unlink()
    metadata = {"format": form} if form else {"written": "by hand"}
    names = list(arrays)
    files = ["model.safetensors"] if shards == 1 else [f"model-{i}-of-{shards}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        part = {name: arrays[name] for name in names[i::shards]}
        write_safetensors(folder / file, part, dict.fromkeys(part, "bfloat16"), metadata)
    if shards > 1:
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("kind", FAMILIES)
def test_both_layouts_give_the_same_model(kind, golden_folder):
    """Square matrices too (q_proj of nano_tiny is 64 x 64): the others of the checkpoint decide for them."""
    folder = golden_folder(kind)
    official = load_model(folder, dtype="bfloat16")
    expected = {name: p.numpy() for name, p in official.named_parameters()}
    to_paddle(folder, shards=3)
    assert open_folder(folder).weights.layout == "paddle"
    found = {name: p.numpy() for name, p in load_model(folder, dtype="bfloat16").named_parameters()}
    assert found.keys() == expected.keys() and len(found) > 90
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert any(name.startswith("vision.attn_pool.") for name in found)


@pytest.mark.parametrize("form", ["np", "pd", None])
def test_shapes_decide_whatever_the_metadata_leaves_open(form, folder):
    to_paddle(folder, form=form)
    assert open_folder(folder).weights.layout == "paddle"
    shutil.copy(GOLDENS / "nano_tiny" / "model.safetensors", folder)
    arrays = {name: tensor.read() for name, tensor in read_checkpoint(folder).tensors.items()}
    metadata = {"format": "np"} if form == "np" else {"written": "by hand"}
    write_safetensors(folder / "model.safetensors", arrays, dict.fromkeys(arrays, "bfloat16"), metadata)
    assert open_folder(folder).weights.layout == "hf"


def test_contradictions_are_errors_and_not_guesses(folder):
    to_paddle(folder, form="pt")
    with pytest.raises(ValueError, match=r"layout is uncertain: the metadata says format=pt, but the shapes .* paddle"):
        load_model(folder)
    shutil.copy(GOLDENS / "nano_tiny" / "model.safetensors", folder)
    to_paddle(folder, keep="lm_head")
    with pytest.raises(
        ValueError, match=r"some matrices lie as in the official layout \(1, language.lm_head.weight is \[1024, 64\]\)"
    ):
        load_model(folder)


def test_missing_and_unknown_names_of_the_other_layout_are_listed(folder):
    to_paddle(folder)
    arrays = {name: tensor.read() for name, tensor in read_checkpoint(folder).tensors.items()}
    del arrays["vision.attn_pool.kv.weight"]
    arrays["language.model.layers.0.mlp.gate_up_fused_proj.weight"] = np.zeros([2, 2], np.uint16)
    arrays["language.model.layers.1.mlp.gate.weight"] = arrays["language.model.layers.1.mlp.gate.weight"][:, :-1]
    write_safetensors(folder / "model.safetensors", arrays, dict.fromkeys(arrays, "bfloat16"), {"format": "np"})
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert "missing (1): vision.attn_pool.kv.weight" in str(error.value)
    assert "unknown (1): language.model.layers.0.mlp.gate_up_fused_proj.weight" in str(error.value)
    assert re.search(r"layers\.1\.mlp\.gate\.weight is \[64, \d+\], expected \[64, \d+\]", str(error.value))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.slow
def test_fingerprint_of_the_files_is_that_of_the_model(kind, golden_folder):
    """An adapter is bound to its base by it, in either layout and whatever precision it was trained in."""
    folder = golden_folder(kind)
    expected = {dtype: model_fingerprint(load_model(folder, dtype=dtype)) for dtype in ("float32", "float16")}
    assert {dtype: stored_fingerprint(open_folder(folder).weights, dtype) for dtype in expected} == expected
    to_paddle(folder)
    assert {dtype: stored_fingerprint(open_folder(folder).weights, dtype) for dtype in expected} == expected


def test_tensors_of_other_types_are_refused(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header["image_newline"].update(dtype="I64", shape=[16])  # as many bytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    with pytest.raises(
        ValueError, match=r"wrong type, expected float32, float16, bfloat16 \(1\): image_newline is int64"
    ):
        load_model(folder)
