"""What a run is built of, as its settings say."""

import pytest

from train.config.load import load_config
from train.run.build import open_base
from train.run.build_data import build_data


@pytest.fixture
def plan(arguments, tmp_path):
    """plan("key=value", ...): the plan of a run, without making it."""

    def build(*more):
        config = load_config(arguments(tmp_path / "run", *more))
        return build_data(config, open_base(config)).plan

    return build


def test_epochs_and_max_steps_whichever_comes_first(plan):
    """epochs=1 max_steps=6 made two epochs: with max_steps given, epochs was dropped."""
    one_epoch = plan("max_steps=null", "epochs=1").num_steps
    assert one_epoch < 6
    assert plan("epochs=1", "max_steps=6").num_steps == one_epoch
    assert plan("epochs=100", "max_steps=6").num_steps == 6


def test_no_workers_measures_in_the_process_itself(plan, monkeypatch, tmp_path):
    """data.workers=0 measured with all cores."""

    def start(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing has been measured yet
    monkeypatch.setattr("data.measure._MIN_PARALLEL", 1)
    monkeypatch.setattr("data.processes.ProcessPoolExecutor", start)
    with pytest.raises(AssertionError, match="a process was started"):
        plan("data.workers=2", "max_steps=1")
    assert plan("data.workers=0", "max_steps=1").num_steps == 1


@pytest.mark.parametrize(("typed", "expected"), [(["data.workers=1"], 5), (["data.measure_workers=3"], 3)])
def test_measuring_takes_all_cores(plan, monkeypatch, tmp_path, typed, expected):
    """It took as many as build packs beside a step: two of a server's cores, and in a rehearsal one."""
    started = []

    def start(workers, *_, **__):
        started.append(workers)
        raise AssertionError("started")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("data.measure._MIN_PARALLEL", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(5))
    monkeypatch.setattr("data.processes.ProcessPoolExecutor", start)
    with pytest.raises(AssertionError, match="started"):
        plan(*typed, "max_steps=1")
    assert started == [expected]
