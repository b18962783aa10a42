"""What ends a run while it trains: an error that names the step, the rows or the weights, and nothing saved."""

import multiprocessing
import shutil

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "load-balance loss"])
def test_a_loss_that_is_not_finite_names_the_rows(arguments, tmp_path, monkeypatch, name):
    """Made so by hand: Paddle's CPU cross entropy takes NaN logits for equal ones, and only the gradient shows it."""
    import train.run.training as entry

    def poisoned(base, config, **options):
        model, groups = make_trainable(base, config, **options)
        loss = model.loss

        def broken(batch, balance, *of_tokens):
            loss_sum, count = loss(batch, balance, *of_tokens)
            if name == "loss":
                return loss_sum * float("nan"), count
            balance.layers[0] = balance.layers[0] * float("nan")
            return loss_sum, count

        model.loss = broken
        return model, groups

    make_trainable = entry.make_trainable
    monkeypatch.setattr(entry, "make_trainable", poisoned)
    with pytest.raises(FloatingPointError, match=rf"step 1: the {name} of pack 0 is nan \(.*data\.jsonl, row \d+"):
        entry.train(load_config(arguments(tmp_path / "run", "optim.aux_loss=0.1")))


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
