"""Checkpoint folders: whole or not there, checksums, the newest whole one, pruning."""

import errno
import os
from pathlib import Path

import pytest

from train.store import whole_folder
from train.store.checkpoints import (
    checkpoint_path,
    checkpoints,
    find_checkpoint,
    later_checkpoints,
    prune,
    set_aside,
)
from train.store.facts import write_fact
from train.store.run_state import CheckpointState, History, Identity
from train.store.whole_folder import damage, strangers, write_folder

STATE = CheckpointState(
    step=2,
    identity=Identity(model_fingerprint="f", model_path="model", tokenizer="t", settings={}, plan={}),
    history=History(losses=[2.0, 1.0], tokens=20, seconds=0.5),
    scaler=None,
    wandb_id="abc",
    versions={},
)


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "weights").write_bytes(b"12345678")
    (folder / "state").write_text("x")
    write_fact(folder / "state.json", STATE)
    (folder / "trainer_state.json").write_text('{"global_step": 2}\n')
    (folder / "config.yaml").write_text("optim: {lr: 0.1}\n")


def flip(path: Path) -> None:
    """Change one bit, as a disk may."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


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
    assert not list(target.parent.glob(".*"))
    assert damage(target) is None


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "inner/weights").write_bytes(b"1234567x"), "the checksum of inner/weights is wrong"),
        (lambda folder: (folder / "inner/weights").write_bytes(b"1234"), "inner/weights has 4 bytes instead of 8"),
        (lambda folder: (folder / "state").unlink(), "state is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: expected a JSON object, found []"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"files": {"state": 1}}'),
            "manifest.json: files.state: input should be an object, found 1",
        ),
        (
            lambda folder: (folder / "manifest.json").write_text('{"files": {"../x": {"bytes": 1, "sha256": ""}}}'),
            "manifest.json: files names '../x', which is outside of the folder",
        ),
    ],
)
def test_damage_is_named_and_passed_over(run_dir, spoil, expected):
    """A manifest with other types than ours gave a KeyError or TypeError instead of the checkpoint before."""
    newest = checkpoint_path(run_dir / "checkpoints", 6)
    spoil(newest)
    assert damage(newest) == expected
    found, state, remarks = find_checkpoint("auto", run_dir)
    assert (found.name, state) == ("step-000004", STATE)
    assert remarks == [f"checkpoint {newest} is damaged ({expected}); passed over"]
    with pytest.raises(ValueError, match="this checkpoint is damaged"):
        find_checkpoint(str(newest), run_dir)


def cut(path: Path) -> None:
    """Lose the end, as in a crash. (The last byte of a JSON file is a line break, without which it says the same.)"""
    path.write_bytes(path.read_bytes().rstrip()[:-1])


@pytest.mark.parametrize("spoil", [flip, cut, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize(
    "name", ["inner/weights", "state", "state.json", "trainer_state.json", "config.yaml", "manifest.json"]
)
def test_damage_of_any_file_is_passed_over(run_dir, name, spoil):
    newest = checkpoint_path(run_dir / "checkpoints", 6)
    spoil(newest / name)
    found, state, (remark,) = find_checkpoint("auto", run_dir)
    assert (found.name, state) == ("step-000004", STATE)
    assert name in remark and "passed over" in remark


@pytest.mark.parametrize("name", ["inner/weights", "state.json", "trainer_state.json", "config.yaml"])
def test_a_file_of_the_checkpoint_before_is_damage(run_dir, name):
    """As long as the right one, and whole in its own place: two files that changed places."""
    root = run_dir / "checkpoints"

    def other(folder: Path) -> None:
        fill(folder)
        (folder / name).write_bytes(bytes(reversed((folder / name).read_bytes())))

    write_folder(checkpoint_path(root, 5), other)
    own, theirs = (checkpoint_path(root, step) / name for step in (6, 5))
    kept = own.read_bytes()
    own.write_bytes(theirs.read_bytes())
    theirs.write_bytes(kept)
    found, state, remarks = find_checkpoint("auto", run_dir)
    assert (found.name, state, len(remarks)) == ("step-000004", STATE, 2)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("state.json", "{}", "step is missing"),
        ("state.json", '{"format": 9}', "a later version wrote it"),
        ("config.yaml", "optim: [", "cannot be read"),
        ("config.yaml", "- 1\n", "expected the settings of a run"),
        ("config.yaml", "optim: 3\n", "expected the settings of a run"),
    ],
)
def test_a_state_or_configuration_that_cannot_be_read_counts_as_damage(run_dir, name, content, reason):
    """Whole by its checksums, and yet not ours: it ended resume=auto with a traceback."""

    def write(folder: Path) -> None:
        fill(folder)
        (folder / name).write_text(content)

    newest = checkpoint_path(run_dir / "checkpoints", 8)
    write_folder(newest, write)
    found, _, (remark,) = find_checkpoint("auto", run_dir)
    assert found.name == "step-000006" and reason in remark and name in remark
    with pytest.raises(ValueError, match="this checkpoint is damaged"):
        find_checkpoint(str(newest), run_dir)


def test_a_path_is_a_checkpoint_or_a_run(run_dir, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("other")
    second = checkpoint_path(run_dir / "checkpoints", 2)
    assert find_checkpoint(str(second), elsewhere) == (second, STATE, [])
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


def test_a_kill_while_it_prunes_leaves_no_half_of_a_checkpoint(run_dir, monkeypatch):
    """It removed them file by file under their names, and a half one was passed over as damaged at every start."""
    root = run_dir / "checkpoints"
    with monkeypatch.context() as patched:
        patched.setattr("train.store.checkpoints.shutil.rmtree", lambda path, **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(root, 2)
    assert [folder.name for folder in checkpoints(root)] == ["step-000004", "step-000006"]
    assert find_checkpoint("auto", run_dir)[2] == []
    assert [left.name for left in root.glob(".pruned-*")] == [".pruned-step-000002"]
    prune(root, 2)
    assert not list(root.glob(".pruned-*"))


def test_a_kill_between_the_two_renames_that_replace_a_checkpoint(run_dir, monkeypatch):
    """The old one and the new one were both there, under names that nobody looked for."""
    root, rename = run_dir / "checkpoints", Path.rename

    def killed(path, target):
        if path.name.startswith(".new-"):
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write_folder(checkpoint_path(root, 6), fill)
    assert not checkpoint_path(root, 6).exists()
    assert find_checkpoint("auto", run_dir)[0] == checkpoint_path(root, 6)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write_folder(checkpoint_path(root, 6), fill)
    with pytest.raises(ZeroDivisionError):  # and where the next attempt fails too
        write_folder(checkpoint_path(root, 6), lambda folder: 1 / 0)
    assert find_checkpoint("auto", run_dir)[0] == checkpoint_path(root, 6)


def test_prune_counts_whole_checkpoints(run_dir):
    """With the newest two damaged and keep_checkpoints=2 it deleted the only whole ones."""
    root = run_dir / "checkpoints"
    write_folder(checkpoint_path(root, 8), fill)
    for step in (6, 8):
        flip(checkpoint_path(root, step) / "inner" / "weights")
    prune(root, 1)
    assert [folder.name for folder in checkpoints(root)] == ["step-000004", "step-000006", "step-000008"]
    flip(checkpoint_path(root, 4) / "state")
    prune(root, 1)  # none is whole: nothing is deleted
    assert len(checkpoints(root)) == 3


def test_prune_reads_no_checkpoint_twice(run_dir, monkeypatch):
    """Those that this process wrote it knows; a full fine-tune's hold 40 GB."""
    monkeypatch.setattr("train.store.whole_folder._sha256", lambda path: 1 / 0)
    prune(run_dir / "checkpoints", 2)
    assert len(checkpoints(run_dir / "checkpoints")) == 2


def test_later_checkpoints_are_set_aside_under_names_that_nobody_takes(run_dir, tmp_path_factory):
    root = run_dir / "checkpoints"
    assert later_checkpoints(checkpoint_path(root, 2), tmp_path_factory.mktemp("other")) == []
    for again in ("", "-2"):
        later = later_checkpoints(checkpoint_path(root, 2), run_dir)
        assert [folder.name for folder in later] == ["step-000004", "step-000006"]
        assert [place.name for place in set_aside(later)] == [f"aside{again}-step-00000{n}" for n in (4, 6)]
        assert [folder.name for folder in checkpoints(root)] == ["step-000002"]
        assert find_checkpoint("auto", run_dir)[0].name == "step-000002"
        for step in (4, 6):
            write_folder(checkpoint_path(root, step), fill)
    prune(root, 1)
    assert len(list(root.glob("aside*"))) == 4 and all(damage(folder) is None for folder in root.glob("aside*"))


def test_a_link_is_followed_not_replaced(tmp_path):
    """`out` may be a link to another disk; the export replaced the link and filled the first disk."""
    (tmp_path / "disk" / "place").mkdir(parents=True)
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "place")
    write_folder(link, fill)
    assert link.is_symlink() and damage(tmp_path / "disk" / "place") is None
    dangling = tmp_path / "later"
    dangling.symlink_to(tmp_path / "disk" / "later")
    write_folder(dangling, fill)
    assert dangling.is_symlink() and damage(tmp_path / "disk" / "later") is None


def test_a_bad_block_counts_as_damage(run_dir, monkeypatch):
    """A read error of the disk was a traceback, where the checkpoint before could be taken."""
    newest = checkpoint_path(run_dir / "checkpoints", 6)

    def fail(path):
        if path.is_relative_to(newest):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256(path)

    sha256 = whole_folder._sha256
    monkeypatch.setattr(whole_folder, "_sha256", fail)
    found, _, (remark,) = find_checkpoint("auto", run_dir)
    assert found.name == "step-000004" and "config.yaml cannot be read (Input/output error)" in remark


def test_strangers_in_a_folder_are_told(run_dir):
    folder = checkpoint_path(run_dir / "checkpoints", 2)
    assert strangers(folder) == []
    (folder / "inner" / "notes.txt").write_text("mine")
    (folder / "link").symlink_to("/nowhere")
    assert strangers(folder) == ["inner/notes.txt", "link"]


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
