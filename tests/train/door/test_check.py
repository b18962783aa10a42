"""`bash launch.sh test`: which checks it runs in its tiers, and that none hides another's failure."""

import subprocess
import sys

import pytest
import yaml

from tests.places import ROOT
from train.door import launch
from vl2.errors import UserError

LINT = ["ruff check", "ruff format --check", "mypy"]


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The commands that are run, without running them; mypy fails."""
    commands: list[str] = []

    def run(command, *, cwd, env):
        assert command[:2] == [sys.executable, "-m"] and cwd == ROOT
        commands.append(" ".join(command[2:]))
        return subprocess.CompletedProcess(command, 3 if command[2] == "mypy" else 0)

    monkeypatch.setattr(launch.subprocess, "run", run)
    monkeypatch.setattr(launch, "physical_cores", lambda: 16)
    return commands


@pytest.mark.parametrize(
    ("arguments", "tests"),
    [
        ([], ["pytest -n 4 --dist loadfile --no-loadscope-reorder"]),
        (["-x", "tests/data"], ["pytest -x tests/data"]),
        (["quick"], ["pytest -n 4 --dist loadfile --no-loadscope-reorder -m not slow"]),
        (["quick", "tests/data"], ["pytest -m not slow tests/data"]),
        (["lint"], []),
    ],
)
def test_tiers(ran, arguments, tests):
    """A failing check is the exit code, and those after it run all the same."""
    assert launch.main(["test", *arguments]) == 3
    assert ran == LINT + tests


def test_one_core_runs_them_in_one_process(ran, monkeypatch):
    monkeypatch.setattr(launch, "physical_cores", lambda: 1)
    launch.main(["test"])
    assert ran[-1] == "pytest"


def test_lint_takes_no_tests(ran):
    """`test lint tests/data` would look as if these tests had passed."""
    with pytest.raises(UserError, match=r"runs no test and takes no arguments, found tests/data"):
        launch.main(["test", "lint", "tests/data"])
    assert ran == []


def test_the_commit_hook_and_ci_use_the_same_door():
    """No hook with an environment of its own, whose ruff or mypy would be another than CI's."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    assert [(hook["language"], hook["entry"]) for hook in hooks[0]["hooks"]] == [("system", "bash launch.sh test lint")]
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith('launch.sh" test')
