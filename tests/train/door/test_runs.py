"""`runs`: what lies in a folder, in whatever state, and what differs between two runs."""

import json

import pytest

from train.door import runs
from train.door.launch import main
from train.store.lock import hold
from train.store.run_dir import RunMarker, write_marker
from train.store.run_state import Best
from vl2.errors import UserError


@pytest.fixture
def place(tmp_path):
    """Runs of every state, one of them deep down, and broken ones."""
    for name, status in {
        "a/b/finished": "finished",
        "running": "running",
        "killed": "running",
        "lost": "diverged",
        "ended": "failed",
    }.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        best = Best(metric="loss", step=4, value=1.25) if status == "finished" else None
        evaluation = {"before": {"exact_match": 0.0}, "after": {"exact_match": 0.975}} if best else {}
        marker = RunMarker(
            recipe="sft_tiny",
            rehearsal=False,
            status=status,
            step=4,
            steps=6,
            wandb_id=None,
            evaluation=evaluation,
            best=best,
            why="data.jsonl: the disk is full" if status == "failed" else "",
        )
        write_marker(folder, marker)
        lines = [{"step": i, "loss": 6.0 - i, "tokens": 100, "seconds": 2.0, "memory_gb": 1.5} for i in range(1, 6)]
        lines.insert(4, {"step": 4, "eval_loss": 1.25})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
        (folder / "config.yaml").write_text(f"run_dir: {name}\noptim: {{lr: {len(name)}.0e-4}}\nseed: 1\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text('{"recipe":')
    (tmp_path / "a" / "b" / "finished" / "export").mkdir()
    (tmp_path / "a" / "b" / "finished" / "export" / "run.json").write_text("{}")  # no run of its own
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_runs_of_every_state(place, capsys):
    with hold(place / "running" / ".lock", "run_dir"):
        assert main(["runs", str(place), "json=true"]) == 0
        found = {row["folder"].removeprefix(f"{place}/"): row for row in json.loads(capsys.readouterr().out)["runs"]}
        assert main(["runs", str(place)]) == 0
    states = {name: row["state"] for name, row in found.items()}
    expected = {
        "running": "running",
        "killed": "killed",
        "lost": "diverged",
        "ended": "failed",
        "a/b/finished": "finished",
        "broken": None,
    }
    assert states == expected
    assert found["ended"]["why"] == "data.jsonl: the disk is full" and found["lost"]["why"] is None
    assert "run.json: not JSON" in found["broken"]["problem"]
    one = found["a/b/finished"]
    assert (one["step"], one["steps"], one["loss_first"], one["loss"], one["eval_loss"]) == (5, 6, 5.0, 1.0, 1.25)
    assert (one["best"], one["accuracy_before"], one["accuracy_after"]) == ("loss 1.25 at 4", 0.0, 0.975)
    assert one["tokens_per_second"] == 50.0 and one["size_bytes"] > 500 and one["seconds_ago"] < 600
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if "a/b/finished" in line]
    for cell in ("finished", "5/6", "1.0000", "1.2500", "loss 1.25 at 4", "0.0% -> 97.5%"):
        assert cell in line
    *_, broken, ended = text.splitlines()
    assert broken.startswith(f"{place}/broken: {place}/broken/run.json: not JSON")
    assert ended == f"{place}/ended: data.jsonl: the disk is full"


def test_what_differs_between_two(place, capsys):
    both = [str(place / "killed"), str(place / "a" / "b" / "finished")]
    assert main(["runs", f"diff=[{','.join(both)}]"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["optim.lr", "0.0006", "0.0012"] in lines
    assert ["state", "killed", "finished"] in lines and ["accuracy_after", "-", "97.5%"] in lines
    assert not any(line and line[0] in ("run_dir", "seed") for line in lines)
    assert main(["runs", f"diff=[{both[0]},{both[0]}]", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{place}/nowhere"], "expected a folder with runs"),
        (["diff={place}/killed"], "expected two folders of runs"),
        (["diff=[{place}/killed,{place}/notes]"], "found no run.json in"),
        (["{place}", "jsn=true"], "unknown key 'jsn'; did you mean json"),
    ],
)
def test_what_is_refused(place, arguments, message):
    with pytest.raises(UserError, match=message):
        main(["runs", *(argument.format(place=place) for argument in arguments)])


def test_an_empty_place_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.main([]) == 0
    assert capsys.readouterr().out == "no runs in outputs\n"
