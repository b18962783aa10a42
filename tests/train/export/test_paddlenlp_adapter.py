"""An adapter written for PaddleNLP and PaddleMIX, and what they write taken back; all three models."""

import gc
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn
from paddlenlp.peft import LoRAModel

from tests.train.export.adapter_runs import MIXED, SAME, factors_of, linears, logits, make_run
from train.ask.load import load
from train.ask.source import find_source
from train.config.load import load_config
from train.config.schema import ExportConfig
from train.export.merged import export
from train.export.verify import logits_of, make_probe
from train.run.build import make_trainable
from train.store.whole_folder import MANIFEST
from vl2.adapter.formats import PADDLE_CONFIG, PADDLE_PICKLE, PADDLE_SHARD
from vl2.adapter.weights import ROWS
from vl2.checkpoint.folder import read_checkpoint
from vl2.checkpoint.load import load_model
from vl2.checkpoint.tensor_files import read_header, write_safetensors
from vl2.errors import UserError


@pytest.fixture(scope="module", params=["nano_tiny", "nano_small", "nano_base"])
def base(request, golden_folder) -> Path:
    return golden_folder(request.param)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), base, SAME)


@pytest.fixture(scope="module")
def written(run) -> Path:
    """The run's adapter for PaddleNLP."""
    export(ExportConfig(run=str(run), out=str(run / "paddle"), adapter="paddle"))
    return run / "paddle"


@pytest.mark.slow
def test_paddle_there_and_back_gives_the_same_bits(base, run, tmp_path):
    report = export(ExportConfig(run=str(run), out=str(tmp_path / "paddle"), adapter="paddle"))
    assert report.verified["largest_change"] == 0 and report.verified["tensors"] == 2 + 2 * sum(
        not re.search(r"lm_head|attn_pool", module) for module in linears(base)
    )
    assert np.array_equal(logits(run), logits(tmp_path / "paddle"))


@pytest.mark.slow
def test_paddle_has_one_rank_and_scaling_for_all(base, tmp_path):
    """Filled up with zeros, the other scaling inside B: one float32 rounding of B, and sums over more columns."""
    run, out = make_run(tmp_path / "run", base, MIXED), tmp_path / "paddle"
    report = export(ExportConfig(run=str(run), out=str(out), adapter="paddle"))
    assert 0 < report.verified["largest_change"] < 2**-23
    before, after = logits(run), logits(out)
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()
    assert np.abs(after - logits(find_source(run).base)).max() > 0.01 * np.abs(before).max()


class Tree(nn.Layer):
    """Empty Linears and rows under the official names, experts one by one, as PaddleMIX's model has them."""

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
        for name in ROWS:  # of no layer
            setattr(self, name, self.create_parameter([shapes["projector.layers.2"][0]]))

    def forward(self, x):
        return x


@pytest.mark.slow
def test_paddlenlp_reads_what_is_written_for_it(base, run, written):
    """Its loader warns at most: so every factor is compared, and none may be left as it was made.

    It looked for the two rows as well, which it leaves trainable, and refused a file without them.
    """
    model = read_by_paddlenlp(base, written)
    stored = read_header(written / PADDLE_SHARD)[0]
    found = {name: p for name, p in model.model.state_dict().items() if "lora_" in name or name in ROWS}
    assert found.keys() == stored.keys() == model.get_trainable_state_dict().keys()
    assert all(np.array_equal(p.numpy(), stored[name].read()) for name, p in found.items())
    assert all(np.array_equal(found[name].numpy(), read_float32(read_checkpoint(base).tensors[name])) for name in ROWS)
    layer = model.model.language.model.layers._sub_layers["1"].mlp.experts._sub_layers["2"].down_proj
    ours = factors_of(load(run))
    name = "language.model.layers.1.mlp.experts.lora.down_{}"
    x = np.random.default_rng(0).normal(size=(3, layer.weight.shape[0])).astype("float32")
    a, b = (ours[name.format(letter)].numpy()[2] for letter in "AB")
    expected = x @ layer.weight.numpy() + 3.0 * (x @ a) @ b
    assert np.abs(layer(paddle.to_tensor(x)).numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def read_float32(tensor) -> np.ndarray:
    return paddle.to_tensor(tensor.read()).astype("float32").numpy()


def read_by_paddlenlp(base: Path, folder: Path) -> LoRAModel:
    gc.collect()  # it takes every warning while it loads for an error, those of Python's clearing up as well
    return LoRAModel.from_pretrained(Tree(linears(base)), str(folder))


def saved_by_paddlenlp(base: Path, written: Path, folder: Path, changes: dict[str, float]) -> Path:
    """What LoRAModel.save_pretrained writes, as PaddleMIX calls it, once something was added to some of the rows."""
    model = read_by_paddlenlp(base, written)
    for name, change in changes.items():
        row = getattr(model.model, name)
        row.set_value(row + change)
    model.save_pretrained(str(folder), save_model_config=False)
    assert {file.name for file in folder.iterdir()} == {PADDLE_PICKLE, PADDLE_CONFIG}
    shutil.copy(written / "processor_config.json", folder)
    return folder


@pytest.mark.slow
def test_what_paddlenlp_saves_is_read(base, run, written, tmp_path, capsys):
    """Its two rows were unknown tensors here. They are the base's: the adapter is the run's, and nothing is to say."""
    folder = saved_by_paddlenlp(base, written, tmp_path / "theirs", {})
    capsys.readouterr()
    loaded = load(folder, base=str(base))
    expected, found = factors_of(load(run)), factors_of(loaded)
    assert expected and all(np.array_equal(p.numpy(), found[name].numpy()) for name, p in expected.items())
    assert loaded.candidates == load(run).candidates
    for name in ROWS:
        value = dict(load(base).model.named_parameters())[name]
        assert np.array_equal(getattr(loaded.model, name).numpy(), value.numpy())
    assert "in place of" not in capsys.readouterr().err
    export(ExportConfig(run=str(folder), base=str(base), out=str(tmp_path / "peft"), adapter="peft"))
    assert not any(name in read_header(tmp_path / "peft" / "adapter_model.safetensors")[0] for name in ROWS)


@pytest.mark.slow
def test_rows_that_were_trained_are_part_of_the_adapter(base, run, written, tmp_path, capsys):
    """PaddleMIX trains them, as PaddleNLP does not freeze them: then they replace the base's, wherever they can."""
    folder = saved_by_paddlenlp(base, written, tmp_path / "theirs", {"image_newline": 0.5})
    capsys.readouterr()
    loaded = load(folder, base=str(base))
    said = capsys.readouterr().err
    assert f"note: {folder}: the adapter has its own image_newline in place of the base's\n" in said
    assert "view_seperator" not in said
    row = paddle.to_tensor(read_checkpoint(base).tensors["image_newline"].read()).astype("float32") + 0.5
    assert np.array_equal(loaded.model.image_newline.numpy(), row.astype(loaded.model.image_newline.dtype).numpy())
    ours, theirs = logits(run), logits_of(loaded.model, make_probe(loaded.tokenizer, loaded.candidates))
    assert np.abs(ours - theirs).max() > 1e-3 * np.abs(ours).max()
    config = {"run": str(folder), "base": str(base)}
    report = export(ExportConfig(**config, out=str(tmp_path / "merged"), dtype="fp32"))
    assert report.verified["trained_used"] == len(factors_of(loaded)) + 1
    merged, stored = (read_checkpoint(path).tensors for path in (tmp_path / "merged", base))
    assert np.array_equal(merged["image_newline"].read(), row.numpy())
    assert np.array_equal(merged["view_seperator"].read(), read_float32(stored["view_seperator"]))
    export(ExportConfig(**config, out=str(tmp_path / "again"), adapter="paddle"))
    assert np.array_equal(read_header(tmp_path / "again" / PADDLE_SHARD)[0]["image_newline"].read(), row.numpy())
    with pytest.raises(UserError, match=r"it has trained image_newline too, which PEFT's files cannot hold"):
        export(ExportConfig(**config, out=str(tmp_path / "peft"), adapter="peft"))
    assert not (tmp_path / "peft").exists()


@pytest.mark.slow
def test_training_does_not_start_from_rows_that_its_adapter_would_lose(arguments, model_folder, tmp_path):
    run = make_run(tmp_path / "run", model_folder, SAME)
    export(ExportConfig(run=str(run), out=str(tmp_path / "written"), adapter="paddle"))
    folder = saved_by_paddlenlp(model_folder, tmp_path / "written", tmp_path / "theirs", {"view_seperator": 0.5})
    groups = f"lora.groups=[{','.join(SAME.groups)}]"
    config = load_config([*arguments(tmp_path), groups, "lora.rank=4", "lora.alpha=12", f"lora.init={folder}"])
    model = load_model(model_folder)
    with pytest.raises(
        UserError, match=r"^lora\.init=.*: it has trained view_seperator too, which this run's adapter would not"
    ):
        make_trainable(model, config, candidates=model.config.candidate_resolutions, base_fingerprint="f")


def test_rows_of_another_model_and_a_base_without_weights(model_folder, tmp_path):
    run = make_run(tmp_path / "run", model_folder, SAME)
    out = tmp_path / "written"
    export(ExportConfig(run=str(run), out=str(out), adapter="paddle"))
    stored = {name: tensor.read() for name, tensor in read_header(out / PADDLE_SHARD)[0].items()}
    stored["image_newline"] = stored["image_newline"][:-1]
    write_safetensors(out / PADDLE_SHARD, stored, dict.fromkeys(stored, "float32"), {"format": "np"})
    (out / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"do not fit\n  wrong shape \(1\): image_newline is \[63\], expected \[64\]"):
        load(out, base=str(model_folder))
    shutil.copytree(model_folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    config = ExportConfig(run=str(run), out=str(tmp_path / "o"), adapter="paddle", base=str(tmp_path / "base"))
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        export(config)
