"""The picture of a run."""

import json

import numpy as np
import pytest
from PIL import Image

from train.run.watch.curve import draw_curve, ends_by_source, losses_by_source, smooth
from train.run.watch.picture import CurvePicture


def test_smoothing_looks_to_both_sides():
    assert smooth([4, 2, 0, 0]) == pytest.approx([4, 2, 1.5, 1.5])
    assert smooth([5]) == pytest.approx([5])
    assert smooth([4, 2, 0], [1, 2, 1]) == pytest.approx([4, 2, 2])


def test_the_smoothed_line_lies_in_the_points():
    """The mean of 20 steps before lay far above every point where the loss fell, on a logarithmic axis most of all."""
    falling = np.exp(-np.arange(100) / 10)
    assert np.exp(smooth(np.log(falling)))[:-10] == pytest.approx(falling[:-10])
    noisy = falling * np.exp(np.random.default_rng(0).normal(size=100))
    assert abs(np.log(np.exp(smooth(np.log(noisy))) / falling)[15:-15]).max() < 0.7  # the noise's mean, not above it


@pytest.mark.parametrize("steps", [1, 3, 200])
@pytest.mark.slow
def test_picture_shows_the_losses(tmp_path, steps):
    """More than a white page: blue where the losses are."""
    lines = [{"step": step, "loss": 5 / step, "lr": 1e-3 / step} for step in range(1, steps + 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curve(tmp_path, title="sft_tiny")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and min(image.size) >= 400
        red, _, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(int), -1, 0)
    assert (blue - red > 60).sum() > (20 if steps == 1 else 200)


def test_nothing_logged_draws_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    draw_curve(tmp_path, title="sft_tiny")
    assert not (tmp_path / "curve.png").exists()


def mixture(steps):
    """Lines of a mixture in which "charts" is learned from in every third step only."""
    lines = []
    for step in range(1, steps + 1):
        loss_of, supervised_of = {"photos": 4 / step}, {"photos": 30}
        if step % 3 == 0:
            loss_of["charts"], supervised_of["charts"] = 8.0, 10 + step
        lines.append({"step": step, "loss": 5 / step, "lr": 1e-3, "loss_of": loss_of, "supervised_of": supervised_of})
    return lines


def test_losses_by_source_are_means_of_tokens():
    lines = mixture(9)
    lines[5]["loss_of"]["charts"] = 2.0
    found = losses_by_source(lines)
    assert list(found) == ["photos", "charts"]
    steps, mean = found["charts"]
    assert steps.tolist() == [3, 6, 9]
    assert mean == pytest.approx([8.0, *[(8 * 13 + 2 * 16 + 8 * 19) / 48] * 2])
    _, mean = losses_by_source(lines, log=True)["charts"]
    assert mean == pytest.approx([8.0, *[np.exp((np.log(8) * 32 + np.log(2) * 16) / 48)] * 2])
    assert losses_by_source([{"step": 1, "loss": 2.0, "lr": 0.1}]) == {}


def test_loss_of_a_source_at_both_ends():
    """The first step may have learned from two tokens of a source; a quarter of its steps says more."""
    lines = mixture(24)
    ends = ends_by_source(lines)
    assert ends["photos"] == pytest.approx(
        [np.mean([4 / s for s in range(1, 7)]), np.mean([4 / s for s in range(19, 25)])]
    )
    lines[2]["loss_of"]["charts"], lines[23]["loss_of"]["charts"] = 9.0, 1.0
    of_charts = [13, 16], [31, 34]  # tokens of the first two of eight steps, and of the last two
    expected = [(9 * 13 + 8 * 16) / sum(of_charts[0]), (8 * 31 + 34) / sum(of_charts[1])]
    assert ends_by_source(lines)["charts"] == pytest.approx(expected)
    assert ends_by_source(lines[:2]) == {"photos": [4.0, 2.0]}


def test_picture_names_the_sources(tmp_path, monkeypatch):
    """A long path is cut, `$` starts no formula, and a name with `_` is in the legend all the same."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure) or path.write_bytes(b""))
    names = ["photos", f"/data/{'very/' * 20}long.jsonl", "_x", "costs_$5_$"]
    lines = [
        {
            "step": 1,
            "loss": 2.0,
            "lr": 0.1,
            "loss_of": dict.fromkeys(names, 1.0),
            "supervised_of": dict.fromkeys(names, 3),
        }
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curve(tmp_path, title="sft_tiny")
    (legend,) = drawn[0].legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["loss", "photos", f"…{names[1][-31:]}", " _x", r"costs_\$5_\$", "lr"]


def test_picture_of_many_sources_draws_those_that_were_learned_most(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure) or path.write_bytes(b""))
    names = [f"s{i}" for i in range(40)]
    of = {"loss_of": dict.fromkeys(names, 1.0), "supervised_of": {name: 1 + i for i, name in enumerate(names)}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "lr": 0.1, **of}) + "\n")
    draw_curve(tmp_path, title="sft_tiny")
    shown = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert shown == ["loss", *reversed(names[28:]), "and 28 more sources", "lr"]


def test_picture_shows_validations_and_the_best_one(tmp_path, monkeypatch):
    """A step whose loss is no number is left out, a cut or asked question is no score."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure) or path.write_bytes(b""))
    lines = [
        {"step": 0, "eval_loss": 3.0, "eval_exact_match": 0.0, "eval_questions": 9.0, "eval_loss_of": {"cats": 3.0}},
        {"step": 1, "loss": 2.0, "lr": 0.1},
        {"step": 2, "loss": float("nan"), "lr": 0.1},
        {"step": 2, "eval_loss": 1.0, "eval_exact_match": 0.5, "eval_questions": 9.0, "eval_cut": 1.0},
        {"step": 3, "eval_exact_match_permuted": 0.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curve(tmp_path, title="costs $5", best_step=2)
    above, below, _ = drawn[0].axes
    shown = {line.get_label(): line.get_xydata().tolist() for line in above.lines}
    assert shown["loss"] == [[1, 2.0]]
    assert shown["loss on held-out rows"] == [[0, 3.0], [2, 1.0]]
    assert shown["best"] == [[2, 1.0]]
    named = [line for line in below.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in named] == ["exact match", "exact match permuted"]
    assert named[0].get_xydata().tolist() == [[0, 0.0], [2, 0.5]]


@pytest.mark.slow
def test_picture_at_a_checkpoint_is_drawn_in_a_process_of_its_own(tmp_path):
    """In a thread it took turns with the steps; half a picture is never seen."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "lr": 0.1}\n')
    picture = CurvePicture(tmp_path, title="sft_tiny")
    picture.saved()
    assert picture._drawing.wait(60) == 0
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG"
    (tmp_path / "curve.png").unlink()
    picture.saved()
    picture.close(failed=True)  # the one that goes on is given up
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".png"] == ["curve.png"]
