"""Which folders a run may use, and what overwriting removes."""

import json
from pathlib import Path

import pytest

from train.store.facts import write_fact
from train.store.overwrite import removable, remove
from train.store.provenance import ExportReport
from train.store.run_dir import RunMarker, check_run_dir, read_marker, write_marker
from train.store.whole_folder import write_folder

MARKER = RunMarker(
    recipe="sft_tiny", rehearsal=False, status="finished", step=6, steps=6, wandb_id="a1b2c3d4", evaluation={}
)
REPORT = ExportReport(
    run="run",
    base="model",
    kind="adapter",
    adapter=None,
    layout="hf",
    dtype="float32",
    rehearsal=False,
    recipe="",
    versions={},
    verified={},
    cost=None,
)


def fill(folder: Path) -> None:
    (folder / "weights").write_text("1")


def fill_export(folder: Path) -> None:
    write_fact(folder / "export.json", REPORT)


@pytest.fixture
def used(tmp_path):
    """The folder of a finished run with its exports, and files of the user's in it."""
    run_dir = tmp_path / "run"
    for name in ("adapter", "checkpoints/step-000002", "checkpoints/aside-step-000004"):
        write_folder(run_dir / name, fill)
    for name in ("export", "adapter_peft", "adapter_paddle", "export-step-000002"):
        write_folder(run_dir / name, fill_export)
    (run_dir / "data").mkdir()
    (run_dir / "notes.txt").write_text("mine")
    (run_dir / "metrics.jsonl").write_text("{}\n")
    (run_dir / "samples").mkdir()
    (run_dir / "samples" / "step-000002.html").write_text("")
    (run_dir / "visualdl").mkdir()
    (run_dir / "visualdl" / "vdlrecords.run.log").write_bytes(b"")
    (run_dir / "wandb" / "offline-run-20261125_1-a1b2c3d4").mkdir(parents=True)
    (run_dir / "wandb" / "latest-run").symlink_to("offline-run-20261125_1-a1b2c3d4")
    write_marker(run_dir, MARKER)
    return run_dir


def overwrite(run_dir: Path) -> list[str]:
    """What is left after overwriting."""
    marker = check_run_dir(run_dir, resume="", overwrite=True)
    assert marker is not None
    remove(removable(run_dir, marker.wandb_id), run_dir)
    return sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*"))


def test_absent_empty_and_prepared_folders_are_free(tmp_path):
    check_run_dir(tmp_path / "absent", resume="", overwrite=False)
    check_run_dir(tmp_path, resume="", overwrite=False)
    (tmp_path / "data").mkdir()  # drawn by an attempt that failed later
    check_run_dir(tmp_path, resume="", overwrite=False)


def test_another_run_is_refused(used):
    message = r"already holds a run \(recipe sft_tiny, finished, step 6 of 6\); resume=auto goes on .* overwrite=true"
    with pytest.raises(ValueError, match=message):
        check_run_dir(used, resume="", overwrite=False)
    with pytest.raises(ValueError, match="already holds a run"):
        check_run_dir(used, resume="/some/other/run/checkpoints/step-000002", overwrite=False)
    assert check_run_dir(used, resume="auto", overwrite=False) == MARKER
    check_run_dir(used, resume=str(used / "checkpoints/step-000002"), overwrite=False)
    check_run_dir(used, resume="", overwrite=True)


def test_resume_and_overwrite_exclude_each_other(used):
    with pytest.raises(ValueError, match="resume and overwrite=true are both given"):
        check_run_dir(used, resume="auto", overwrite=True)


def test_foreign_files_are_refused_whatever_is_asked(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds files that are no run of this program \(thesis.tex\)"):
            check_run_dir(tmp_path, resume="", overwrite=overwrite)


def test_no_run_below_a_file_or_at_an_impossible_path(tmp_path):
    """A file as run_dir was told, one above it was a NotADirectoryError once everything had been measured."""
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="run: expected a folder, found a file"):
        check_run_dir(tmp_path / "run", resume="", overwrite=False)
    with pytest.raises(ValueError, match=rf"b: expected a folder, found {tmp_path}/run, a file"):
        check_run_dir(tmp_path / "run" / "a" / "b", resume="", overwrite=False)
    for impossible in ("x" * 300, "a\0b"):
        with pytest.raises(ValueError, match="no path of a folder"):
            check_run_dir(tmp_path / impossible, resume="", overwrite=False)


@pytest.mark.parametrize("content", ["{}", "", "[]", '{"recipe": 3}', "\ud800".encode("utf-8", "surrogatepass")])
def test_any_run_json_makes_no_run(used, content):
    """`{}` counted as a run: overwrite=true deleted whatever bore one of our names."""
    path = used / "run.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="no run of this program wrote it: choose another run_dir"):
            check_run_dir(used, resume="", overwrite=overwrite)
    # After a crash that cut it off, the checkpoints are what counts.
    assert check_run_dir(used, resume="auto", overwrite=False) is None


def test_overwriting_removes_only_what_a_run_wrote(used):
    """It left adapter_peft and adapter_paddle of the old run beside the new one."""
    assert overwrite(used) == ["data", "notes.txt"]


def test_overwriting_leaves_foreign_entries_that_bear_our_names(used):
    (used / "checkpoints" / "best").mkdir()
    (used / "wandb" / "run-20250101_1-zzzzzzzz").mkdir()
    (used / "export-step-000009").mkdir()
    (used / "export-step-000009" / "mine.txt").write_text("mine")
    left = ["checkpoints/best", "export-step-000009/mine.txt", "notes.txt", "wandb/run-20250101_1-zzzzzzzz"]
    assert set(left) <= set(overwrite(used))
    assert not (used / "checkpoints" / "step-000002").exists()


@pytest.mark.parametrize(
    "name", ["adapter/mine.txt", "export/mine.txt", "checkpoints/step-000002/mine.txt", "adapter_peft/a/mine.txt"]
)
def test_a_foreign_file_in_what_would_be_removed_is_named(used, name):
    (used / name).parent.mkdir(exist_ok=True)
    (used / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name}: not written by a run"):
        check_run_dir(used, resume="", overwrite=True)


def test_results_without_a_manifest_are_not_replaced(used):
    (used / "adapter" / "manifest.json").unlink()
    for options in ({"resume": "", "overwrite": True}, {"resume": "auto", "overwrite": False}):
        with pytest.raises(ValueError, match="adapter: not written by a run, or it has lost its manifest"):
            check_run_dir(used, **options)


def test_links_in_a_run_are_followed(used, tmp_path):
    (used / "checkpoints").rename(tmp_path / "disk")
    (used / "checkpoints").symlink_to(tmp_path / "disk")
    overwrite(used)
    assert (used / "checkpoints").is_symlink() and list((tmp_path / "disk").iterdir()) == []


def test_a_marker_of_format_1_is_read(tmp_path):
    document = {"recipe": "r", "rehearsal": True, "status": "running", "step": 1, "steps": 2, "identity": {"a": 1}}
    (tmp_path / "run.json").write_text(json.dumps(document))
    marker = read_marker(tmp_path)
    assert marker is not None and (marker.step, marker.wandb_id, marker.evaluation) == (1, None, {})
