"""Checkpoint folders: whole or not there, checksums, the newest whole one, pruning."""

from pathlib import Path

import pytest

from train.store.checkpoints import checkpoint_path, checkpoints, find_checkpoint, prune
from train.store.whole_folder import damage, write_folder


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "weights").write_bytes(b"12345678")
    (folder / "state").write_text("x")


@pytest.fixture
def run_dir(tmp_path) -> Path:
    for step in (2, 4, 6):
        write_folder(checkpoint_path(tmp_path / "checkpoints", step), fill)
    return tmp_path


def test_a_written_folder_is_whole(run_dir):
    folders = checkpoints(run_dir / "checkpoints")
    assert [folder.name for folder in folders] == ["step-000002", "step-000004", "step-000006"]
    assert [damage(folder) for folder in folders] == [None] * 3
    assert (folders[0] / "inner" / "weights").read_bytes() == b"12345678"


def test_a_crash_while_writing_leaves_no_checkpoint(run_dir):
    root = run_dir / "checkpoints"

    def crash(folder: Path) -> None:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(checkpoint_path(root, 8), crash)
    assert len(checkpoints(root)) == 3
    assert not list(root.glob(".*"))  # Ctrl-C in an export would else leave gigabytes
    (root / ".new-step-000008").mkdir()
    fill(root / ".new-step-000008")
    write_folder(checkpoint_path(root, 8), fill)  # sweeps what a killed process leaves
    assert damage(checkpoint_path(root, 8)) is None
    assert not list(root.glob(".*"))


def test_a_folder_is_replaced(run_dir):
    target = checkpoint_path(run_dir / "checkpoints", 4)
    write_folder(target, lambda folder: (folder / "state").write_text("new"))
    assert sorted(path.name for path in target.iterdir()) == ["manifest.json", "state"]
    assert damage(target) is None


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "inner/weights").write_bytes(b"1234567x"), "the checksum of inner/weights is wrong"),
        (lambda folder: (folder / "inner/weights").write_bytes(b"1234"), "inner/weights has 4 bytes instead of 8"),
        (lambda folder: (folder / "state").unlink(), "state is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_damage_is_named_and_passed_over(run_dir, spoil, expected):
    newest = checkpoint_path(run_dir / "checkpoints", 6)
    spoil(newest)
    assert damage(newest) == expected
    found, remarks = find_checkpoint("auto", run_dir)
    assert found.name == "step-000004"
    assert remarks == [f"checkpoint {newest} is damaged ({expected}); passed over"]
    with pytest.raises(ValueError, match="this checkpoint is damaged"):
        find_checkpoint(str(newest), run_dir)


def test_a_path_is_a_checkpoint_or_a_run(run_dir, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("other")
    second = checkpoint_path(run_dir / "checkpoints", 2)
    assert find_checkpoint(str(second), elsewhere) == (second, [])
    assert find_checkpoint(str(run_dir), elsewhere)[0].name == "step-000006"


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("auto", "resume=auto: nothing to resume from in .*absent; there is no run there yet: start without resume"),
        ("/no/such/folder", "resume=/no/such/folder: nothing to resume from in .*no such folder"),
    ],
)
def test_nothing_to_resume_from(tmp_path, resume, message):
    with pytest.raises(ValueError, match=message):
        find_checkpoint(resume, tmp_path / "absent")


def test_no_checkpoint_written_yet(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint was written\); start without resume"):
        find_checkpoint("auto", tmp_path)


def test_prune_keeps_the_newest(run_dir):
    prune(run_dir / "checkpoints", 2)
    assert [folder.name for folder in checkpoints(run_dir / "checkpoints")] == ["step-000004", "step-000006"]
    prune(run_dir / "checkpoints", 0)
    assert len(checkpoints(run_dir / "checkpoints")) == 2


@pytest.mark.parametrize("manifest", [True, False])
def test_a_full_disk_leaves_nothing_behind(run_dir, manifest):
    """Linux's /dev/full answers every write as a full disk does."""
    root = run_dir / "checkpoints"
    before = sorted(path.name for path in root.iterdir())

    def write(folder: Path) -> None:
        fill(folder)
        (folder / "full").symlink_to("/dev/full")
        with (folder / "full").open("wb") as file:
            file.write(b"x" * 100_000)

    with pytest.raises(
        ValueError, match=r"step-000006: the disk is full \(No space left on device\).*nothing was kept"
    ):
        write_folder(checkpoint_path(root, 6), write, manifest=manifest)
    assert sorted(path.name for path in root.iterdir()) == before
    assert damage(checkpoint_path(root, 6)) is None


def test_another_error_while_writing_leaves_nothing_behind(tmp_path):
    def write(folder: Path) -> None:
        fill(folder)
        raise PermissionError("not yours")

    with pytest.raises(PermissionError, match="not yours"):
        write_folder(tmp_path / "new", write)
    assert list(tmp_path.iterdir()) == []
