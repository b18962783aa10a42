"""metrics.jsonl when a run goes on, and when wandb counts as logged in."""

import json

from train.run.watch.lines import MetricsFile, keep_steps, of_validation, read_metrics
from train.run.watch.log import MetricsLog
from train.run.watch.wandb_run import has_credentials

HOST = "https://api.wandb.example"


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    """A run that was killed at step 5 goes on from step 3; the last line was cut off while it was written."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 6)]
    path.write_text("".join(lines) + '{"step": 6, "lo')
    keep_steps(path, 3)
    assert path.read_text() == "".join(lines[:3])


def test_credentials_are_looked_for_without_the_network(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_credentials(HOST)
    (tmp_path / "netrc").write_text("machine api.other.example login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert not has_credentials(HOST)
    (tmp_path / "netrc").write_text("machine api.wandb.example login user password secret\n")
    assert has_credentials(HOST)
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_credentials(HOST)


def test_a_number_of_a_validation_is_said_once(tmp_path):
    """After the last step a run asks again, with the pictures exchanged too; an interrupted one finds the same."""
    for more in ({}, {"eval_permuted": 0.1}):
        file = MetricsFile(tmp_path, first_step=2)
        with MetricsLog([file], validated=file.validated) as log:
            for found in ({"eval_loss": 1.0}, {"eval_loss": 1.0, **more}):
                log.validation(2, found)
    lines = of_validation(read_metrics(tmp_path / "metrics.jsonl"))
    assert lines == [{"step": 2, "eval_loss": 1.0}, {"step": 2, "eval_permuted": 0.1}]


def test_a_line_that_was_cut_off_is_passed_over(tmp_path):
    """A full disk cut one in the middle: the error of the last picture took the place of the disk's."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert keep_steps(tmp_path / "metrics.jsonl", 2) == [{"step": 1, "loss": 2.0}]
