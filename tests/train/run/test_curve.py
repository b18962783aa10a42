"""The picture of a run."""

import json

import numpy as np
import pytest
from PIL import Image

from train.run.curve import draw_curve, running_mean


def test_running_mean():
    assert running_mean([4, 2, 0], 2) == pytest.approx([4, 3, 1])
    assert running_mean([5], 20) == pytest.approx([5])


@pytest.mark.parametrize("steps", [1, 3, 200])
def test_picture_shows_the_losses(tmp_path, steps):
    """More than a white page: blue where the losses are."""
    lines = [{"step": step, "loss": 5 / step, "lr": 1e-3 / step} for step in range(1, steps + 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png", title="sft_tiny")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and min(image.size) >= 400
        red, _, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(int), -1, 0)
    assert (blue - red > 60).sum() > (20 if steps == 1 else 200)


def test_nothing_logged_draws_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png", title="sft_tiny")
    assert not (tmp_path / "curve.png").exists()
