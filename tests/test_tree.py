"""What must not be in the tree."""

from tests.places import ROOT

# Spelled in two pieces, so that this file is not its own finding.
FOREIGN = [start + end for start, end in (("/work", "/"), ("/farm", "/"), ("/root", "/"), ("/tmp", "/w/"))]


def files():
    """Every file of the product; what runs and tools leave behind is not looked at."""
    for room in ("vl2", "data", "train", "conf", "tests", ".ci"):
        yield from (path for path in (ROOT / room).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.name != ".git")


def test_no_path_of_a_developers_machine():
    looked_at = list(files())
    assert len(looked_at) > 30
    assert [(str(path), text) for path in looked_at for text in FOREIGN if text.encode() in path.read_bytes()] == []


def test_top_level_is_as_designed():
    """Six rooms and one door; data/ is code and must not be ignored."""
    assert not {"data", "data/", "/data", "/data/"} & set((ROOT / ".gitignore").read_text().splitlines())
    for name in ("vl2", "data", "train", "conf", "tests", "launch.sh", "requirements.lock", ".ci/run"):
        assert (ROOT / name).exists()
