"""Different settings on two processes are refused in both, by name."""

from dataclasses import asdict, replace

import pytest

from train.config.load import load_config
from train.run import agreement
from vl2.errors import UserError


def together(monkeypatch, *configs):
    """Each of the configurations as a process of its own has it."""
    for config in configs:
        of_ranks = []
        for other in configs:
            monkeypatch.setattr(agreement, "gather_objects", lambda own, kept=of_ranks: kept.append(own) or [own])
            agreement.check_same_settings(other)
        monkeypatch.setattr(agreement, "gather_objects", lambda own, kept=of_ranks: kept)
        yield lambda config=config: agreement.check_same_settings(config)


def test_other_settings_are_refused_in_every_process(arguments, tmp_path, monkeypatch):
    one = load_config(arguments(tmp_path / "run"))
    other = replace(one, optim=replace(one.optim, lr=0.5), rank=1, command="typed there")
    for check in together(monkeypatch, one, other):
        with pytest.raises(UserError, match=r"^process 1 has other settings .*: optim\.lr=0\.5 there, 0\.01 in"):
            check()


def test_paths_and_the_number_of_the_machine_may_differ(arguments, tmp_path, monkeypatch):
    one = load_config(arguments(tmp_path / "run"))
    other = load_config(arguments(tmp_path / "elsewhere"))
    assert asdict(one) != asdict(other)
    for check in together(monkeypatch, one, replace(other, rank=1, command="typed there")):
        check()
