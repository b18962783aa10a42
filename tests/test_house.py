"""The size of files and folders, and that README and tests know where things live."""

import re
import statistics
from pathlib import Path

from tests.places import GOLDENS, ROOT
from tests.test_imports import MODULES

LONGEST, MEDIAN = 400, 200  # lines


def test_no_file_outgrows_its_question():
    """A file past the limit holds two things; the one that could be named alone goes to a file of its own."""
    tests = sorted((ROOT / "tests").rglob("*.py"))
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in (*MODULES, *tests)}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}
    product = [lines for path, lines in lengths.items() if not path.startswith("tests/") and lines > 1]
    assert len(product) > 50
    assert statistics.median(product) <= MEDIAN


def test_readme_names_every_room():
    """`train/` has a room for each verb and what they share, and each folder of code its line in the README's tree."""
    text = (ROOT / "README.md").read_text("utf-8")
    (tree,) = re.findall(r"^## Where things live\n+```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    named, path = set(), [""]
    for line in tree.splitlines():
        indent, name = re.fullmatch(r"( *)(\S+/) +\S.*", line).groups()
        path[len(indent) // 2 :] = [name]
        named.add("".join(path).rstrip("/"))
    rooms = {str(module.parent.relative_to(ROOT)) for module in MODULES if module.name != "__init__.py"}
    train = {room for room in rooms if re.fullmatch("train/[^/]+", room)}
    assert 6 <= len(train) <= 9
    assert rooms | {"train"} <= named
    assert [name for name in named if not (ROOT / name).is_dir()] == []


def test_paths_of_the_tests_are_known_in_one_place():
    """A test file that counts folders upwards loses its goldens when it moves."""
    exempt = ("places.py", "make_goldens.py", Path(__file__).name)  # make_goldens.py runs without this repository
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path.name not in exempt]
    assert [path for path in tests if re.search(r"__file__.*\bparents?\b", path.read_text("utf-8"))] == []


def test_goldens_stay_small():
    """They are copied with every clone."""
    size = sum(path.stat().st_size for path in GOLDENS.rglob("*") if path.is_file())
    assert 5e6 < size < 12e6


def test_goldens_say_where_they_come_from():
    """Numbers without their origin cannot be made again, nor trusted when a test fails."""
    told = (GOLDENS / "README.md").read_text("utf-8")
    assert [path.name for path in GOLDENS.iterdir() if path.name not in told and path.name != "README.md"] == []
