"""What a run refuses before it trains; nothing that lies there is overwritten."""

import shutil
from pathlib import Path

import pytest


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_a_run_is_refused(run, whole):
    before = snapshot(whole)
    with pytest.raises(ValueError, match=r"already holds a run \(recipe sft_tiny, finished, step 6 of 6\)"):
        run(whole)
    assert snapshot(whole) == before


@pytest.mark.slow
def test_overwrite_replaces_the_run(run, whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "mine.txt").write_text("kept")
    assert run(run_dir, "overwrite=true", "max_steps=1", "seed=1") == 0
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 1
    assert (run_dir / "mine.txt").read_text() == "kept"
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000001"]


def test_overwrite_removes_nothing_when_the_input_is_wrong(run, whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    before = snapshot(run_dir)
    with pytest.raises(ValueError, match="expected a data file"):
        run(run_dir, "overwrite=true", "data.path=/no/such/file.jsonl")
    assert snapshot(run_dir) == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("seed=7", "seed: it was 6, now it is 7"),
        ("packs_per_step=2", "packs_per_step: it was 4, now it is 2"),
        ("data.max_tokens=700", "data.max_tokens: it was 640, now it is 700"),
        ("lora.rank=4", "lora.rank: it was 8, now it is 4"),
        ("lora.dropout=0.1", "lora.dropout: it was 0.2, now it is 0.1"),
        ("lora.groups=[attention]", "lora.groups: it was"),
        ("precision=bf16", "precision: it was fp32, now it is bf16"),
        ("data.max_tiles=2", "data.max_tiles: it was 9, now it is 2"),
    ],
)
def test_resume_with_other_settings_is_refused(run, whole, change, difference):
    before = snapshot(whole)
    with pytest.raises(ValueError, match=r"step-000006 belongs to another run\. What differs:") as error:
        run(whole, "resume=auto", change)
    assert difference in str(error.value)
    assert snapshot(whole) == before


def test_resume_with_other_data_is_refused(run, whole, data_file, tmp_path):
    rows = data_file.read_text().splitlines(keepends=True)
    other = tmp_path / "data.jsonl"
    other.write_text("".join(rows[:-1]))
    for image in data_file.parent.glob("*.png"):
        shutil.copy(image, tmp_path)
    with pytest.raises(ValueError, match="the data \\(other conversations, images or sizes\\)"):
        run(whole, "resume=auto", f"data.path={other}")


def test_resume_from_another_model_is_refused(run, whole, model_folder, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(model_folder, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-2048:] = bytes(2048)
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"the base model: it was {model_folder}, now it is {other}"):
        run(whole, "resume=auto", f"model.path={other}")


def test_resume_of_a_shorter_run_is_refused(run, whole):
    with pytest.raises(
        ValueError, match="step-000006 is at step 6, but this run has 4 steps; raise max_steps or epochs"
    ):
        run(whole, "resume=auto", "max_steps=4")


def test_resume_from_nothing_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"nothing to resume from in .*start without resume"):
        run(tmp_path / "absent", "resume=auto")
    assert not (tmp_path / "absent").exists()
