"""Which folders a run may use, and what overwriting removes."""

import pytest

from train.store.run_dir import check_run_dir, clear_run_dir, write_marker


@pytest.fixture
def used(tmp_path):
    """The folder of a finished run, with a file of the user's in it."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step-000002").mkdir(parents=True)
    (run_dir / "data").mkdir()
    (run_dir / "notes.txt").write_text("mine")
    (run_dir / "metrics.jsonl").write_text("{}\n")
    write_marker(run_dir, recipe="sft_tiny", status="finished", step=6, steps=6)
    return run_dir


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
    check_run_dir(used, resume="auto", overwrite=False)
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


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="expected a folder, found a file"):
        check_run_dir(tmp_path / "run", resume="", overwrite=False)


def test_overwriting_removes_only_what_a_run_wrote(used):
    clear_run_dir(used)
    assert sorted(path.name for path in used.iterdir()) == ["data", "notes.txt"]
