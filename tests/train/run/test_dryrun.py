"""`dryrun`: everything that training would refuse is said, all of it, and nothing is loaded or changed."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.train.run.test_refusals import snapshot
from train.run import dryrun
from train.run.memory import training_memory
from train.store.overwrite import removable
from vl2.config import VL2Config
from vl2.errors import UserError


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    for place in ("vl2.checkpoint.load.load_model", "train.ask.load.load_model", "train.ask.load.load_with_bar"):
        monkeypatch.setattr(place, lambda *a, **k: pytest.fail("weights were loaded"))


@pytest.fixture
def dry(arguments, capsys):
    """Runs `dryrun` in this process: (exit code, stdout, stderr)."""

    def go(run_dir: Path, *more: str) -> tuple[int, str, str]:
        code = dryrun.main(arguments(run_dir, *more))
        said = capsys.readouterr()
        return code, said.out, said.err

    return go


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def talk(answer: object) -> dict:
    return {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": answer}]}


@pytest.mark.slow
def test_it_says_what_training_says(dry, run, tmp_path, capsys, monkeypatch):
    """The plan's line is the one that the run prints before its first step, the fields that nobody reads likewise."""
    file = write_rows(tmp_path / "rows.jsonl", [{**talk("blue"), "id": i, "url": None if i else "x"} for i in range(9)])
    code, said, noted = dry(tmp_path / "dry", "max_steps=1", f"data.path={file}")
    assert code == 0
    note = f"note: {file}: fields that are not read: id (9 rows), url (1 rows)\n"
    assert note in noted and re.search(rf"^{re.escape(str(file))} +messages +9 +9 +0 +0 ", said, re.M)
    assert "fields that are not read: id (9 rows)" in (tmp_path / "dry" / "report.html").read_text()
    assert "\ntraining would start (all of it: " in said
    monkeypatch.undo()
    assert run(tmp_path / "run", "max_steps=1", f"data.path={file}", validate=False) == 0
    out, err = capsys.readouterr()
    assert note in err
    assert "fields that are not read: id (9 rows)" in (tmp_path / "run" / "report.html").read_text()
    trained = [line.split() for line in out.splitlines()]
    for name in ("plan", "tokens"):
        line = next(line for line in said.splitlines() if line.startswith(f"{name} "))
        assert line.split() in trained


@pytest.mark.slow
def test_bytes_are_those_that_training_takes(dry, model_folder, arguments, tmp_path):
    from train.config.load import load_config

    code, said, _ = dry(tmp_path / "run", "precision=bf16")
    assert code == 0
    need = training_memory(VL2Config.from_folder(model_folder), load_config(arguments(tmp_path, "precision=bf16")))
    found = re.search(
        r"^memory +(.*) in each process.*frozen weights (.*), trained weights (.*), gradients (.*), Adam", said, re.M
    )
    assert found
    assert found[1] == f"{need.num_bytes / 1e6:.1f} MB"
    assert found[2] == f"{need.frozen / 1e6:.1f} MB"
    assert found[3] == found[4] == f"{need.trained / 1e6:.1f} MB"


def test_every_bad_row_is_listed(dry, tmp_path):
    """Training stops at the first; a dry run goes on to the last, and its exit code is that of a refusal."""
    rows = [talk("blue"), "{", talk(7), talk("blue"), {"messages": []}, {**talk("x"), "images": ["gone.png"]}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    code, said, errors = dry(tmp_path / "run", f"data.path={file}")
    assert code == 2
    assert re.findall(r"bad row: \S+, row (\d)", errors) == ["2", "3", "5", "6"]
    assert "error: training would refuse: 4 bad rows; correct them, or leave them out" in errors
    assert "2 samples, 4 rows skipped" in said  # the rest is planned all the same
    assert "\ntraining would refuse this (all of it: " in said


@pytest.mark.parametrize(("max_bad", "code"), [(1, 2), (2, 0)])
def test_bad_rows_that_training_leaves_out_are_no_refusal(dry, tmp_path, max_bad, code):
    file = write_rows(tmp_path / "rows.jsonl", [talk("blue"), "{", talk(7)])
    found, _, errors = dry(tmp_path / "run", f"data.path={file}", "data.on_bad_record=skip", f"data.max_bad={max_bad}")
    assert found == code
    assert errors.count("bad row:") == 2


def test_bad_rows_are_listed_when_no_row_is_usable(dry, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ["oops", "oh"])
    code, _, errors = dry(tmp_path / "run", f"data.path={file}")
    assert code == 2
    assert errors.count("bad row:") == 2
    assert "empty dataset" in errors


def test_reading_stops_where_there_are_too_many(dry, tmp_path, monkeypatch):
    monkeypatch.setattr(dryrun, "MOST_LISTED", 12)
    file = write_rows(tmp_path / "rows.jsonl", ["oops"] * 40)
    code, _, errors = dry(tmp_path / "run", f"data.path={file}")
    assert code == 2
    assert errors.count("bad row: ") == 10
    assert "... and 2 more bad rows" in errors
    assert "more than 12 bad rows; reading stopped there" in errors


def test_bad_rows_of_the_held_out_questions_are_listed(dry, tmp_path):
    file = write_rows(tmp_path / "asked.jsonl", [talk("blue"), talk(7)])
    code, _, errors = dry(tmp_path / "run", f"data.eval_path={file}")
    assert code == 2
    assert f"bad row: {file}, row 2" in errors


def test_bad_rows_are_listed_when_the_questions_are_not_there(dry, tmp_path):
    """The list was lost with what came after it."""
    file = write_rows(tmp_path / "rows.jsonl", [talk("blue"), talk(7)])
    code, _, errors = dry(tmp_path / "run", f"data.path={file}", "data.eval_path=/no/such.jsonl")
    assert code == 2
    assert f"bad row: {file}, row 2" in errors
    assert "training would refuse: /no/such.jsonl" in errors


def test_a_field_of_any_name_is_named(dry, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{**talk("blue"), "<b>\0": 1}])
    code, _, errors = dry(tmp_path / "run", f"data.path={file}", "max_steps=1")
    assert code == 0
    assert r"not read: '<b>\x00' (1 rows)" in errors
    assert r"not read: &#39;&lt;b&gt;\x00&#39; (1 rows)</bdi>" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_a_model_on_the_hub_is_counted_without_its_weights(dry, model_folder, tmp_path, monkeypatch):
    """What was fetched of it is config and tokenizer: no fault of the model's."""
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (model_folder / name).is_file():
            (fetched / name).write_bytes((model_folder / name).read_bytes())

    def fetch(name, *, weights):
        assert (name, weights) == ("someone/some-model", False)
        return fetched

    monkeypatch.setattr(dryrun, "resolve_model", fetch)
    code, said, errors = dry(tmp_path / "run", "model.path=someone/some-model")
    assert code == 0
    assert "20 samples" in said
    assert re.search(r"the weights of someone/some-model are not here: training fetches them, \d\.\d MB in bf", errors)


def test_a_published_model_that_cannot_be_had_is_counted_by_its_config(dry, tmp_path, monkeypatch):
    def fail(name, *, weights):
        raise UserError(f"the model {name} cannot be had")

    monkeypatch.setattr(dryrun, "resolve_model", fail)
    code, said, errors = dry(tmp_path / "run", "model.path=deepseek-ai/deepseek-vl2-tiny", "precision=bf16")
    assert code == 2
    assert "frozen weights 6.74 GB, trained weights " in said
    assert "training would refuse: the model deepseek-ai/deepseek-vl2-tiny cannot be had" in errors
    assert "cannot be had" in (tmp_path / "run" / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_an_adapter_to_start_from_is_compared(dry, whole, tmp_path):
    """Names, shapes, ranks and alphas, without the base's weights."""
    init = f"lora.init={whole / 'adapter'}"
    code, _, errors = dry(tmp_path / "run", init)
    assert code == 0
    assert "note: not compared: whether lora.init=" in errors
    code, _, errors = dry(tmp_path / "run", init, "lora.rank=4")
    assert code == 2
    assert "this adapter has other groups, ranks or scalings than the run" in errors


def test_all_faults_are_said_at_once(dry, tmp_path, monkeypatch):
    """Data that is not there, a LoRA group that the model lacks and memory that is short: one look finds them all."""
    from train.machine import memory

    monkeypatch.setattr(
        memory, "find_free_memory", lambda: memory.FreeMemory(num_bytes=10**6, where="RAM, MemAvailable")
    )
    code, _, errors = dry(tmp_path / "run", "data.path=/no/such.jsonl", f"lora.init={tmp_path}")
    assert code == 2
    for said in ("no room in memory: training", "expected a data file", str(tmp_path)):
        assert any(said in line for line in errors.splitlines() if line.startswith("error: training would refuse: "))


def test_a_model_whose_weights_do_not_fit_is_found(dry, model_folder, tmp_path):
    """Names and shapes are compared with the config by the files' headers."""
    model = tmp_path / "model"
    model.mkdir()
    for file in model_folder.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    code, _, errors = dry(tmp_path / "run", f"model.path={model}")
    assert code == 2
    assert re.search(r"training would refuse: .*model", errors)


@pytest.mark.slow
def test_a_folder_that_is_taken_is_refused_and_kept(dry, whole, tmp_path):
    """By a run, whose own page stays, or by other files: then no page is written."""
    run_dir, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(whole, run_dir)
    before = snapshot(run_dir)
    code, said, errors = dry(run_dir)
    assert (code, "training would refuse: " in errors, "already holds a run" in errors) == (2, True, True)
    after = snapshot(run_dir)
    assert after.pop(str(run_dir / "dryrun.html"))
    assert after == before
    for name in ("mine.txt", "run.json"):
        other.mkdir(exist_ok=True)
        (other / name).write_text("mine")
        code, said, errors = dry(other)
        assert (code, list(other.iterdir())) == (2, [other / name])
        assert "(no page is written into a folder of other files)" in said
        (other / name).unlink()


@pytest.mark.slow
def test_training_takes_the_place_of_a_dry_run(dry, run, tmp_path, monkeypatch):
    """Its page is no foreign file in the folder, and the run's own takes its place."""
    run_dir = tmp_path / "run"
    assert dry(run_dir)[0] == 0
    assert [path.name for path in run_dir.iterdir()] == ["report.html"]
    assert "dry run" in (run_dir / "report.html").read_text("utf-8")
    monkeypatch.undo()
    assert run(run_dir, "max_steps=1", validate=False) == 0
    assert "dry run" not in (run_dir / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_a_run_keeps_its_own_page_beside_a_dry_run(dry, whole, tmp_path):
    """`dryrun ... resume=auto` asks about a run that is there, and damages nothing of it."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    before = snapshot(run_dir)
    assert str(run_dir / "report.html") in before  # of the training
    code, said, _ = dry(run_dir, "resume=auto")
    assert code == 0
    assert f"(all of it: {run_dir / 'dryrun.html'})" in said
    after = snapshot(run_dir)
    assert after.pop(str(run_dir / "dryrun.html"))
    assert after == before
    left = removable(run_dir, None)
    assert run_dir / "dryrun.html" in left and run_dir / "report.html" in left


def test_nothing_is_drawn_into_run_dir(dry, tmp_path):
    """Training draws its shapes there; a dry run draws them elsewhere and takes them away again."""
    shapes = ("data.path=null", "data.shapes.train=4", "data.shapes.test=2", "data.max_tokens=4096")
    code, said, _ = dry(tmp_path / "run", *shapes)
    assert code == 0
    assert "4 samples" in said and "2 rows, 2 of them asked" in said  # the shapes' own are held out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["report.html"]
