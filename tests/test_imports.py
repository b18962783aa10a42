"""Every module imports; imports go from room to room in one direction and never in a circle."""

import ast
import importlib
from pathlib import Path

import pytest

from tests.places import ROOT

TOP = ("vl2", "data", "train")
MODULES = sorted(path for top in TOP for path in (ROOT / top).rglob("*.py"))

# The model's rooms, lowest first.
MODEL = ("vl2", "vl2.checkpoint", "vl2.adapter")
# For all: it imports nothing itself.
ERRORS = "vl2.errors"
# What each room may import beside itself; a name stands for a room, or for one module of it.
ALLOWED = {
    "vl2": (),
    "vl2.checkpoint": ("vl2",),
    "vl2.adapter": ("vl2", "vl2.checkpoint"),
    "data": ("vl2.tiles", "vl2.prompt", "vl2.tokenizer"),
    "train.machine": (),
    "train.config": ("train.machine",),
    "train.store": ("train.machine", "train.config"),
    "train.page": ("train.machine", "train.config", "train.store", "data", *MODEL),
    "train.ask.scores": ("data", *MODEL),
    "train.ask": ("train.ask.scores", "train.machine", "train.config", "train.store", "train.page", "data", *MODEL),
    "train.run.watch": ("train.machine", "train.config", "train.store", "train.page", "data", "vl2"),
    "train.run.shard": ("train.config", "train.store", "vl2.checkpoint"),
    "train.run": (
        "train.run.shard",
        "train.ask.scores",
        "train.run.watch",
        "train.machine",
        "train.config",
        "train.store",
        "train.page",
        "train.ask",
        "data",
        *MODEL,
    ),
    "train.export": ("train.machine", "train.config", "train.store", "train.ask", "data", *MODEL),
    "train.serve": ("train.machine", "train.config", "train.store", "train.ask", "data", *MODEL),
    "train.door": (
        *("train.machine", "train.config", "train.store", "train.ask", "train.run", "train.export", "train.serve"),
        *MODEL,
    ),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The longest room that a module's name begins with; data's inner folders belong to it."""
    return max((room for room in ALLOWED if f"{module}.".startswith(f"{room}.")), key=len, default="")


def our_imports(path: Path) -> set[str]:
    """The modules of this repository that a file imports, wherever in the file the import stands."""
    names = {module_name(module) for module in MODULES}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import; write the room's name"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & names
            found.update(inside or {node.module})
    return {name for name in found if name.split(".")[0] in (*TOP, "tests")}


GRAPH = {module_name(path): our_imports(path) for path in MODULES}


def test_modules_are_found():
    assert len(MODULES) >= 3
    rooms = {room_of(name) for name in GRAPH if name not in TOP}
    assert rooms == set(ALLOWED)


@pytest.mark.parametrize("name", GRAPH)
def test_module_imports(name):
    importlib.import_module(name)


def test_imports_go_from_room_to_room_in_one_direction():
    wrong = []
    for name, imports in GRAPH.items():
        room = room_of(name)
        for target in imports - {name}:
            inside = room_of(target) == room or target == ERRORS
            if not inside and target not in ALLOWED[room] and room_of(target) not in ALLOWED[room]:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_imports_form_no_circle():
    """Within a room too, and whether the import stands at the top or inside a function."""
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"imported in a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in finished:
            return
        for target in sorted(GRAPH.get(name, ())):
            if target != name:
                visit(target, (*path, name))
        finished.add(name)

    for name in GRAPH:
        visit(name, ())
