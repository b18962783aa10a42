"""What ends a run while it trains: an error that names the step, the rows or the weights, and nothing saved."""

import json
import multiprocessing
import shutil
from dataclasses import replace

import paddle
import pytest

import train.run.trainer as trainer
from train.config.load import load_config
from train.run.training import train


@pytest.mark.slow
def test_an_adapter_that_nothing_uses_stops_the_first_step(arguments, tmp_path, monkeypatch):
    """As absorbed MLA does with kv_b_proj: the projection's weight is read, its forward is never called."""
    import train.run.training as entry

    def dead(base, config, **options):
        model, groups = make_trainable(base, config, **options)
        model.model.language.model.layers[2].self_attn.k_proj.disable_lora = True
        return model, groups

    make_trainable = entry.make_trainable
    monkeypatch.setattr(entry, "make_trainable", dead)
    with pytest.raises(RuntimeError, match=r"no gradient reaches 2 .*layers\.2\.self_attn\.k_proj\.lora_A"):
        entry.train(load_config(arguments(tmp_path / "run")))


@pytest.mark.slow
def test_divergence_names_the_step_and_saves_nothing(arguments, tmp_path):
    config = load_config(arguments(tmp_path / "run", "optim.max_grad_norm=0", "max_steps=6"))
    config.optim.lr = 1e30  # beyond the bound of the key, so that it diverges at once
    with pytest.raises(FloatingPointError, match=r"step 2: the gradient norm is (nan|inf)\. Lower optim\.lr=1e\+30"):
        train(config)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.fixture
def poison(monkeypatch):
    """Makes a loss of a pack nan: poison(name of the loss, packs). Paddle's CPU cross entropy takes NaN logits for
    equal ones, and only the gradient would show it.
    """
    train_pack = trainer.train_pack

    def use(name: str, packs: set[int]) -> None:
        def poisoned(model, inputs, **about):
            done = train_pack(model, inputs, **about)
            if done.pack not in packs:
                return done
            with paddle.no_grad():
                for parameter in (p for p in model.parameters() if p.grad is not None):
                    parameter.grad.scale_(float("nan"))
            return replace(done, **{name: paddle.to_tensor(float("nan"))})

        monkeypatch.setattr(trainer, "train_pack", poisoned)

    return use


def found_in(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "nonfinite.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "said"), [("loss", "loss"), ("aux_loss", "load-balance loss")])
def test_a_loss_that_is_not_finite_names_the_rows(run, tmp_path, poison, name, said):
    poison(name, {0})
    with pytest.raises(FloatingPointError, match=rf"step 1: the {said} of pack 0 is nan \(.*data\.jsonl, row \d+"):
        run(tmp_path / "run", "max_steps=2")
    (line,) = found_in(tmp_path / "run")
    assert (line["step"], line["what"], line["left_out"]) == (1, f"the {said} of pack 0 is nan", False)
    (pack,) = line["packs"]
    assert pack["pack"] == 0 and {row["source"].rpartition("/")[2] for row in pack["rows"]} == {"data.jsonl"}


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_left_out(run, data_file, tmp_path, poison, capsys):
    """Weights and moments stay, the schedule goes on, the file names rows and pictures; a resumed run does the same."""
    options = ("on_nonfinite=skip", "packs_per_step=2", "max_steps=5", "save_steps=1", "keep_checkpoints=9")
    poison("loss", {4, 5, 8})  # of steps 3 and 5
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert run(straight, *options) == 0
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] is None for line in lines] == [False, False, True, False, True]
    assert [line["grad_norm"] is None for line in lines] == [False, False, True, False, True]
    before, after = (straight / "checkpoints" / f"step-00000{step}" for step in (2, 3))
    for name in ("adapter/peft_model.safetensors", "optimizer.safetensors"):
        assert (before / name).read_bytes() == (after / name).read_bytes(), name
    found = found_in(straight)
    assert [(line["step"], line["left_out"]) for line in found] == [(3, True), (5, True)]
    named = [row for line in found for pack in line["packs"] for row in pack["rows"]]
    written = data_file.read_text().splitlines()
    for row in named:
        images = json.loads(written[row["row"] - 1])["images"]
        assert [image.rpartition("/")[2] for image in row["images"]] == images
    assert json.loads((straight / "summary.json").read_text())["steps_left_out"] == 2
    assert "steps left out" in capsys.readouterr().out

    shutil.copytree(straight, resumed)
    assert run(resumed, *options, f"resume={resumed / 'checkpoints' / 'step-000002'}") == 0
    assert found_in(resumed) == found
    for name in ("adapter/peft_model.safetensors", "checkpoints/step-000005/optimizer.safetensors"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name


@pytest.mark.slow
def test_too_many_steps_left_out_end_the_run(run, tmp_path, poison, monkeypatch):
    monkeypatch.setattr("train.run.finite.MAX_LEFT_OUT", 2)
    poison("loss", set(range(100)))
    with pytest.raises(FloatingPointError, match=r"step 2: 2 steps in a row had to be left out; in this one the"):
        run(tmp_path / "run", "on_nonfinite=skip", "packs_per_step=1", "max_steps=5")
    assert [line["left_out"] for line in found_in(tmp_path / "run")] == [True, False]


def test_an_image_that_breaks_after_measuring_is_named(run, data_file, tmp_path):
    """Through a worker process, which would have mangled the error."""
    for image in data_file.parent.glob("*.png"):
        shutil.copy(image, tmp_path)
    shutil.copy(data_file, tmp_path)
    for image in tmp_path.glob("*.png"):
        content = image.read_bytes()
        middle = content.index(b"IDAT") + 20
        image.write_bytes(content[:middle] + bytes(30) + content[middle + 30 :])
    with pytest.raises(ValueError, match=rf"{tmp_path}/data.jsonl, row \d+, images\[0\]: "):
        run(tmp_path / "run", f"data.path={tmp_path / 'data.jsonl'}", "data.workers=1")
    # Workers take no signal, so one that stayed would keep this process from ever exiting.
    assert multiprocessing.active_children() == []
