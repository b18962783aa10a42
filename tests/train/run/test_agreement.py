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


def test_a_folder_that_one_machine_does_not_see(tmp_path, monkeypatch):
    """Rank 0 would have waited for ever for the other's part of its first checkpoint."""
    monkeypatch.setattr(agreement, "_SEEN_SECONDS", 0.0)
    monkeypatch.setattr(agreement, "gather_objects", lambda seen: [True, seen])
    with pytest.raises(UserError, match=r"^run_dir=.*: 1 of 2 processes do not see .*; give a folder that all"):
        agreement.check_seen_by_all(tmp_path / "run" / "run.json")
    (tmp_path / "run.json").touch()
    agreement.check_seen_by_all(tmp_path / "run.json")
