"""Every module imports, and imports point one way only."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("vl2", "data", "train")
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def our_imports(path: Path) -> set[str]:
    """The modules of this repository that a file imports, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import; write the room's name"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in found if name.split(".")[0] in (*ROOMS, "tests")}


def test_modules_are_found():
    assert len(MODULES) >= 3


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_module_imports(path):
    importlib.import_module(module_name(path))


def test_imports_point_one_way():
    """vl2 knows nothing of the others, data knows three files of vl2, train knows both."""
    allowed = {"vl2": ("vl2",), "data": ("data", "vl2.tiles", "vl2.prompt", "vl2.tokenizer"), "train": ROOMS}
    wrong = []
    for path in MODULES:
        room = path.relative_to(ROOT).parts[0]
        for name in our_imports(path):
            if name == "vl2" and room == "data":
                continue  # `from vl2 import tiles`: the pair vl2.tiles is in the set too
            if not any(name == arrow or name.startswith(f"{arrow}.") for arrow in allowed[room]):
                wrong.append(f"{module_name(path)} imports {name}")
    assert not wrong
