"""Validation of a run: when it is due, that it changes nothing in training, that it says what `eval` says."""

import json

import pytest

from tests.train.run.test_run import losses, metrics, same_state
from train.config.load import load_config
from train.config.validation import Every, read_every
from train.run.validation import due_steps
from train.store.overwrite import removable
from vl2.errors import UserError


class Epochs:
    """The part of a plan that says when a validation is due."""

    def __init__(self, *steps: int, whole: int):
        self.num_steps, self.whole_epochs = sum(steps), (whole,) * len(steps)


@pytest.mark.parametrize(
    ("every", "plan", "expected"),
    [
        ("0", Epochs(5, 5, whole=5), []),
        ("4", Epochs(5, 5, whole=5), [4, 8, 10]),
        ("4.0", Epochs(5, 3, whole=5), [4, 8]),
        ("20", Epochs(5, whole=5), [5]),
        ("epoch", Epochs(5, 4, whole=5), [5, 9]),
        ("0.5", Epochs(5, 4, whole=5), [3, 5, 8, 9]),  # the second half of the second epoch is cut off
        ("0.3", Epochs(10, 10, whole=10), [3, 6, 9, 13, 16, 19, 20]),
        ("0.1", Epochs(10, whole=10), list(range(1, 11))),
        ("0.001", Epochs(3, whole=3), [1, 2, 3]),
    ],
)
def test_when_a_validation_is_due(every, plan, expected):
    assert sorted(due_steps(read_every(every), plan)) == expected


def test_a_longer_run_is_validated_at_the_same_steps_before_its_end():
    short, long = (due_steps(Every(part=0.25), Epochs(*steps, whole=8)) for steps in ((8, 3), (8, 8)))
    assert short - {11} == {step for step in long if step < 11}


@pytest.mark.parametrize("text", ["-1", "1.5", "often", "nan", "inf", ""])
def test_an_interval_that_means_nothing_is_refused(text):
    with pytest.raises(UserError, match=rf"eval\.every={text}: expected a whole number of optimizer steps \(20\)"):
        read_every(text)


def test_rows_to_validate_on_are_missing(arguments, tmp_path):
    with pytest.raises(UserError, match=r"eval\.every=2: no rows are held out .*data\.eval_fraction.*data\.eval_path"):
        load_config(arguments(tmp_path, "eval.every=2"))
    load_config(arguments(tmp_path, "eval.every=2", "data.eval_rows=3"))
    load_config(arguments(tmp_path, "eval.every=2", "data.path=null"))  # drawn shapes have their own


# ---- a run that is validated


@pytest.fixture(scope="module")
def held_out(tmp_path_factory, data_file):
    """The last 6 rows of the tests' data, which lie beside their pictures."""
    lines = data_file.read_text("utf-8").splitlines(keepends=True)[-6:]
    path = data_file.with_name("held_out.jsonl")
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def validated(run, held_out, tmp_path_factory):
    """The run `whole`, validated every two steps: dropout on, a checkpoint every two steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "validated"
    assert run(run_dir, "save_steps=2", f"data.eval_path={held_out}", "eval.every=2", "eval.questions=4") == 0
    return run_dir


@pytest.mark.slow
def test_validation_changes_nothing_in_training(validated, whole):
    assert losses(validated) == losses(whole)
    same_state(validated, whole)


@pytest.mark.slow
def test_validation_says_what_eval_says(validated, held_out, tmp_path, capsys):
    """Of the same rows and weights; lines stand where the steps are, before and after included."""
    import train.ask.evaluate as entry

    lines = metrics(validated)
    assert [(line["step"], "eval_loss" in line) for line in lines][:4] == [(0, True), (1, False), (2, False), (2, True)]
    found = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(found) == [0, 2, 4, 6]
    summary = json.loads((validated / "summary.json").read_text())
    assert [summary["evaluation"][when]["loss"] for when in ("before", "after")] == [found[0], found[6]]
    for step, folder in ((4, validated / "checkpoints" / "step-000004"), (6, validated)):
        arguments = [f"model={folder}", f"data.path={held_out}", f"out={tmp_path / 'out.jsonl'}", "device=cpu"]
        assert entry.main([*arguments, "max_new_tokens=1"]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(found[step], abs=1e-6)


@pytest.mark.slow
def test_samples_lie_in_the_run_and_go_with_it(validated):
    """A page for each validation, with a question, its expected answer and the model's."""
    pages = sorted(path.name for path in (validated / "samples").iterdir())
    assert pages == [f"step-{step:06d}.html" for step in (0, 2, 4, 6)]
    text = (validated / "samples" / pages[1]).read_text("utf-8")
    assert text.count("<tr>") == 5 and "step 2" in text and "http" not in text.replace("http-equiv", "")
    gone = removable(validated, None)
    assert {validated / "samples" / name for name in pages} <= set(gone)
