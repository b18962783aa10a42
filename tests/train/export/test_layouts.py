"""Exports without training: every tensor bit for bit in both layouts, every other file byte for byte."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors import safe_open

import train.export.merged
import train.export.verify
from tests.train.provenance import provenance
from train.ask.load import load
from train.config.load import load_export_config
from train.config.schema import ExportConfig
from train.export.merged import export
from vl2.checkpoint.folder import read_checkpoint
from vl2.checkpoint.load import load_model
from vl2.checkpoint.model_folder import open_folder
from vl2.checkpoint.tensor_files import write_safetensors
from vl2.parameters import init_model

pytestmark = pytest.mark.slow

# Ours, about an export.
REPORTS = {"export.json", "manifest.json"}


@pytest.fixture
def make_base(golden_folder):
    """A base as it is published: sharded with an index, with a model card, code and generation settings beside."""

    def make(kind: str, folder: Path, *, shards: int) -> Path:
        shutil.copytree(golden_folder(kind), folder)
        (folder / "generation_config.json").write_text('{"do_sample":false}')
        (folder / "processor_config.json").write_text('{"patch_size": 14,\n\n"mask_prompt": false}')
        (folder / "README.md").write_text("the base's card\n")
        if shards > 1:
            tensors = read_checkpoint(folder).tensors
            names = sorted(tensors, key=lambda name: hash_of(name))  # an order that no rule of ours makes
            files = {name: f"model-{i % shards + 1:05d}-of-{shards:06d}.safetensors" for i, name in enumerate(names)}
            for file in sorted(set(files.values())):
                part = {name: tensors[name].read() for name in names if files[name] == file}
                write_safetensors(folder / file, part, dict.fromkeys(part, "bfloat16"))
            (folder / "model.safetensors").unlink()
            total = sum(tensor.num_bytes for tensor in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make


def hash_of(name: str) -> int:
    return sum((i + 1) * ord(letter) for i, letter in enumerate(name)) % 1009


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in REPORTS}


@pytest.mark.parametrize(("kind", "shards"), [("nano_tiny", 3), ("nano_small", 1), ("nano_base", 2)])
def test_hf_to_hf_and_through_paddle_and_back_is_byte_identical(kind, shards, tmp_path, make_base):
    base = make_base(kind, tmp_path / "base", shards=shards)
    report = export(ExportConfig(model=str(base), out=str(tmp_path / "hf")))
    assert contents(tmp_path / "hf") == contents(base) and len(contents(base)) >= 7
    assert report.verified["tensors"] == len(read_checkpoint(base).tensors)
    assert report.verified["tensors_changed"] == 0
    assert report.verified["rounding_mean_logit_change"] == 0.0
    assert report.verified["rounding_next_token_agreement"] == 1.0

    report = export(ExportConfig(model=str(base), out=str(tmp_path / "paddle"), layout="paddle"))
    assert report.layout == "paddle" and report.verified["rounding_mean_logit_change"] == 0.0
    export(ExportConfig(model=str(tmp_path / "paddle"), out=str(tmp_path / "back")))
    assert contents(tmp_path / "back") == contents(base)
    check_paddle_layout(base, tmp_path / "paddle")


def check_paddle_layout(base: Path, folder: Path) -> None:
    """Official names; matrices and the router [in, out], all else as it was; "np", which PaddleNLP's loader wants."""
    before, after = read_checkpoint(base).tensors, read_checkpoint(folder).tensors
    assert before.keys() == after.keys()
    turned = set()
    for name, tensor in before.items():
        values, found = tensor.read(), after[name].read()
        if not np.array_equal(found, values):
            assert np.array_equal(found, values.T), name
            turned.add(name)
    for name in ("lm_head", "model.layers.1.mlp.gate", "model.layers.1.mlp.experts.2.up_proj"):
        assert f"language.{name}.weight" in turned
    assert {"projector.layers.0.weight", "vision.attn_pool.kv.weight", "vision.blocks.0.mlp.fc1.weight"} <= turned
    assert not {"language.model.embed_tokens.weight", "vision.patch_embed.proj.weight", "vision.pos_embed"} & turned
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "np"}
            assert set(file.keys()) == {name for name, tensor in after.items() if tensor.path == path}
    expected = dict(load_model(base, dtype="bfloat16").named_parameters())
    for name, parameter in load_model(folder, dtype="bfloat16").named_parameters():
        assert np.array_equal(parameter.numpy(), expected[name].numpy()), name


def test_pdparams_of_paddlemix_become_safetensors(tmp_path, make_base):
    """PaddleNLP's file of old, [in, out] inside, has no order or metadata to keep: the model's order is taken."""
    base = make_base("nano_tiny", tmp_path / "base", shards=1)
    expected = {name: tensor.read() for name, tensor in read_checkpoint(base).tensors.items()}
    export(ExportConfig(model=str(base), out=str(tmp_path / "paddle"), layout="paddle"))
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "paddle", old)
    tensors = read_checkpoint(old).tensors
    paddle.save({n: paddle.to_tensor(t.read()) for n, t in tensors.items()}, str(old / "model_state.pdparams"))
    for name in ("model.safetensors", "manifest.json"):  # PaddleNLP writes no manifest
        (old / name).unlink()
    report = export(ExportConfig(model=str(old), out=str(tmp_path / "hf")))
    assert report.verified["rounding_mean_logit_change"] == 0.0
    found = read_checkpoint(tmp_path / "hf").tensors
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(expected, "bfloat16")
    assert all(np.array_equal(found[name].read(), values) for name, values in expected.items())
    assert not list((tmp_path / "hf").glob("*.pdparams"))


def test_another_type_is_rounded_and_said_in_the_config(tmp_path, make_base):
    base = make_base("nano_tiny", tmp_path / "base", shards=3)
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype"] = config["language_config"]["torch_dtype"] = "bfloat16"
    (base / "config.json").write_text(json.dumps(config))
    report = export(ExportConfig(model=str(base), out=str(tmp_path / "fp16"), dtype="fp16"))
    assert report.dtype == "float16" and 0 < report.verified["rounding_kl"] < 1e-6
    after = json.loads((tmp_path / "fp16" / "config.json").read_text())
    assert after["torch_dtype"] == after["language_config"]["torch_dtype"] == "float16"
    export(ExportConfig(model=str(base), out=str(tmp_path / "fp32"), dtype="fp32"))
    tensors, base_tensors = read_checkpoint(tmp_path / "fp32").tensors, read_checkpoint(base).tensors
    index = json.loads((tmp_path / "fp32" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.num_bytes for t in tensors.values())
    assert {name: t.path.name for name, t in tensors.items()} == {n: t.path.name for n, t in base_tensors.items()}
    assert {t.dtype for t in tensors.values()} == {"float32"}
    # bfloat16 -> float32 -> bfloat16 loses nothing
    export(ExportConfig(model=str(tmp_path / "fp32"), out=str(tmp_path / "back"), dtype="bf16"))
    back = read_checkpoint(tmp_path / "back").tensors
    assert all(np.array_equal(back[name].read(), tensor.read()) for name, tensor in base_tensors.items())


def test_each_tensor_keeps_its_own_type(tmp_path, make_base):
    """A correction bias in float32 beside bfloat16 weights stays float32."""
    base = make_base("nano_base", tmp_path / "base", shards=1)
    tensors = read_checkpoint(base).tensors
    bias = "language.model.layers.1.mlp.gate.e_score_correction_bias"
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    arrays[bias] = np.linspace(0, 1, arrays[bias].size).astype(np.float32)
    dtypes = {name: "float32" if name == bias else "bfloat16" for name in arrays}
    write_safetensors(base / "model.safetensors", arrays, dtypes)
    report = export(ExportConfig(model=str(base), out=str(tmp_path / "out"), layout="paddle"))
    assert report.dtype == "bfloat16/float32"
    found = read_checkpoint(tmp_path / "out").tensors[bias]
    assert found.dtype == "float32" and np.array_equal(found.read(), arrays[bias])


def test_full_fine_tune_from_random_weights_is_exported(tmp_path, make_base):
    """`init: random`: the base's weights are in no file; the trained ones lie stacked, in float32."""
    base = make_base("nano_small", tmp_path / "base", shards=1)
    run = tmp_path / "run" / "weights"
    run.mkdir(parents=True)
    skeleton = open_folder(base).weights.skeleton
    model = init_model(skeleton.config, skeleton.image_token_id, seed=5)
    rng = np.random.default_rng(0)
    trained = {
        name: (p.numpy() + rng.normal(0, 0.1, p.shape)).astype(np.float32)
        for name, p in model.named_parameters()
        if name.startswith("language.") and "correction" not in name
    }
    write_safetensors(run / "trained.safetensors", trained, dict.fromkeys(trained, "float32"))
    about = provenance(base, init="random", seed=5, max_tiles=9, precision="fp32", base_fingerprint="")
    (run / "metadata.json").write_text(json.dumps(about))
    report = export(ExportConfig(run=str(run.parent), out=str(tmp_path / "out"), layout="paddle", dtype="fp32"))
    assert report.verified["trained_used"] == len(trained)
    assert report.verified["tensors_changed"] > len(trained)  # experts are stacked
    assert report.verified["rounding_mean_logit_change"] == 0.0
    found = {name: p.numpy() for name, p in load(tmp_path / "out", "fp32").model.named_parameters()}
    for name, value in trained.items():
        assert np.array_equal(found[name], value), name
    untouched = dict(model.named_parameters())["vision.attn_pool.kv.weight"].numpy()
    assert np.array_equal(found["vision.attn_pool.kv.weight"], untouched)
    assert "A fine-tuned DeepSeek-VL2" in (tmp_path / "out" / "README.md").read_text()


def test_trained_weights_of_another_shape_are_refused(tmp_path, make_base):
    base = make_base("nano_tiny", tmp_path / "base", shards=1)
    run = tmp_path / "run" / "weights"
    run.mkdir(parents=True)
    write_safetensors(
        run / "trained.safetensors", {"image_newline": np.ones([3], np.float32)}, {"image_newline": "float32"}
    )
    (run / "metadata.json").write_text(json.dumps(provenance(base)))
    with pytest.raises(ValueError, match=r"image_newline is float32\[3\], expected float32\[64\]"):
        export(ExportConfig(run=str(run), out=str(tmp_path / "out")))


def test_arguments_that_cannot_be_meant_are_refused(tmp_path, make_base):
    base = make_base("nano_tiny", tmp_path / "base", shards=1)
    with pytest.raises(ValueError, match="run= or model=, not both"):
        load_export_config(["run=a", "model=b", "out=c"])
    with pytest.raises(ValueError, match="adapter=, base= and checkpoint= are for what was trained"):
        load_export_config(["model=b", "out=c", "adapter=peft"])
    with pytest.raises(ValueError, match="needs out=FOLDER"):
        load_export_config([f"model={base}"])
    with pytest.raises(ValueError, match=rf"nothing was trained there.*export model={base}"):
        export(ExportConfig(run=str(base), out=str(tmp_path / "out")))
    for out in (base, tmp_path):  # even an export that may be replaced
        with pytest.raises(ValueError, match="what is to be exported lies there"):
            export(ExportConfig(model=str(base), out=str(out), overwrite=True))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="files that no export wrote"):
        export(ExportConfig(model=str(base), out=str(tmp_path / "full"), overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "full"]


def test_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch, make_base):
    base = make_base("nano_tiny", tmp_path / "base", shards=1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(10**9, 10**9 - 240_000, 240_000))
    with pytest.raises(
        ValueError, match=r"no room on the disk: the export takes 1\.3 MB, 0\.2 MB are free; .*another disk"
    ):
        export(ExportConfig(model=str(base), out=str(tmp_path / "a" / "b")))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_disk_that_fills_up_while_writing_leaves_nothing(tmp_path, monkeypatch, make_base):
    """The third tensor meets a full disk: no folder under the final name, none beside, and an error with figures."""
    base = make_base("nano_tiny", tmp_path / "base", shards=3)
    out = tmp_path / "out"
    export(ExportConfig(model=str(base), out=str(out)))
    before = contents(out)
    opened = Path.open

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 20_000

        def __enter__(self):
            return self

        def __exit__(self, *problem):
            self.file.close()

        def write(self, data):
            self.left -= memoryview(data).nbytes
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    def open_full(path, mode="r", *more, **options):
        file = opened(path, mode, *more, **options)
        return Full(file) if mode == "wb" and path.suffix == ".safetensors" else file

    monkeypatch.setattr(Path, "open", open_full)
    for target in (tmp_path / "new", out):  # a new name, and one that stands
        with pytest.raises(
            ValueError, match=r"the disk is full \(No space left on device\) after 0\.\d MB; nothing was kept"
        ):
            export(ExportConfig(model=str(base), out=str(target), overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    assert contents(out) == before


def test_folder_that_cannot_be_removed_is_named(tmp_path, monkeypatch, make_base):
    base = make_base("nano_tiny", tmp_path / "base", shards=1)

    def full(*more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("train.export.merged.write_weights", full)
    monkeypatch.setattr("train.store.whole_folder.shutil.rmtree", lambda *more, **options: None)
    with pytest.raises(ValueError, match=r"disk is full .*\.new-out could not be removed"):
        export(ExportConfig(model=str(base), out=str(tmp_path / "out")))


def test_export_that_cannot_be_read_back_is_refused(tmp_path, monkeypatch, make_base):
    base = make_base("nano_tiny", tmp_path / "base", shards=1)
    written = train.export.merged.write_weights

    def damage(folder, *more):
        written(folder, *more)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    monkeypatch.setattr(train.export.merged, "write_weights", damage)
    with pytest.raises(ValueError, match=r"refused: it cannot be read back: .*truncated"):
        export(ExportConfig(model=str(base), out=str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_factor_that_no_tensor_takes_up_is_refused(tmp_path, monkeypatch, make_base):
    base = make_base("nano_tiny", tmp_path / "base", shards=1)
    monkeypatch.setattr("train.export.merge.Merge.trained", lambda self: {"language.model.layers.0.lost.lora_A"})
    with pytest.raises(ValueError, match=r"1 trained weights that no tensor took up: .*lost\.lora_A"):
        export(ExportConfig(model=str(base), out=str(tmp_path / "out")))


def test_merge_that_is_not_the_adapter_is_refused():
    ones = np.ones([3, 5])
    assert train.export.verify.verify_merge(ones, ones * (1 + 9e-5)) == pytest.approx(9e-5)
    with pytest.raises(ValueError, match=r"merge changes logits by 2\.00e-04 of the largest, more than 1e-04"):
        train.export.verify.verify_merge(ones, ones * (1 + 2e-4))
    with pytest.raises(ValueError, match="merge changes logits by nan"):
        train.export.verify.verify_merge(ones, ones * np.nan)
