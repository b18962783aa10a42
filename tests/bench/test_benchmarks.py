"""The benchmarks run as their docstrings say, here on their smallest sizes."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import data, experts, images, length, packing, soak, step, vision_cache
from tests.places import ROOT
from train.door.launch import BENCHMARKS, prepare_benchmark


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_step(attention, capsys):
    step.main([attention, "--size=toy", "--repeats=1"])
    said = capsys.readouterr().out
    assert f"{attention}: step " in said
    assert "tokens/s, peak " in said
    assert json.loads(said.splitlines()[-1]).keys() == {"seconds", "gemm_share", "peak_mb"}


@pytest.mark.slow
def test_length(capsys):
    length.main(["--size=toy", "--tokens=700", "--conversations", "1", "2", "--repeats=1", "--one=800"])
    said = capsys.readouterr().out
    assert "one conversation of 800 tokens: " in said
    assert json.loads(said.splitlines()[-1]).keys() == {"700", "1400", "excess", "one", "peak_mb"}


def test_a_pack_of_conversations_shows_each_its_own_pictures():
    both = length.pack(2, 700)
    assert both["seq_lens"].tolist() == [700, 700] and both["position_ids"].max() == 699
    assert both["tiles"].shape[0] == 6 and not (both["tiles"][:3] == both["tiles"][3:]).all()


@pytest.mark.slow
def test_experts(capsys):
    experts.main(["--rows=198", "--repeats=1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == ["even", "zipf 0.3", "zipf 1"]
    assert all(0 < weights < products for weights, products, *_ in found.values())


def test_products_of_a_step():
    """By hand for the toy: 2 layers of width 64, one of them with 4 experts of 16 of which every token takes 4."""
    lora, data = step.build("mha", "toy"), step.batch()
    linear = 2 * 4 * 64 * 64 + 3 * 64 * 64 + 3 * 64 * 32  # attention twice, dense MLP, shared experts
    factors = 8 * (2 * 4 * 128 + 3 * (64 + 32))
    experts, expert_factors = 4 * 3 * 64 * 16, 4 * 8 * 3 * (64 + 16)
    tower = 4 * 48 * 48 + 2 * 48 * int(48 * 3.7362) + 3 * 14 * 14 * 48
    per_token = 2 * (linear + experts) + 3 * (factors + expert_factors)
    expected = 1024 * per_token + 343 * 2 * 64 * 8192 + 3 * 729 * tower + 3 * 196 * (4 * 48 * 64 + 64 * 64)
    expected += 3 * 2 * 2 * 1024**2 * (32 + 32) + 2 * 3 * 729**2 * 48
    assert step.products(lora, data) == pytest.approx(2 * expected, rel=1e-3)


@pytest.mark.slow
def test_data(capfd):
    """Ratios are of one run on one machine: none is asserted here, only that all is measured and the last line JSON."""
    data.main(["rows=2100", "pictures=6"])
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["rows"] == 2100 and found["ten_more_rows"] == 10
    assert min(found.values()) >= 0 and found["second_seconds"] < found["first_seconds"]
    with pytest.raises(SystemExit):
        data.main(["rows=many"])


@pytest.mark.slow
def test_vision_cache(capsys):
    vision_cache.main(["nano", "--steps=1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["same_losses"] and found["without"]["calls"] == found["filling"]["calls"] == 2
    assert found["with"]["calls"] == 0 and found["tower_share"] > 0


def test_packing(capsys):
    packing.main(["--samples", "50"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["samples", "50", "50"]


def test_images(capsys):
    images.main(["--count", "20", "--decoded", "2", "--size", "96", "64"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["count"], found["header_part"]) == (20, round(found["header_ms"] / found["decode_ms"], 4))


@pytest.mark.slow
def test_soak():
    """Five kills at moments that the seed draws: every checkpoint stays, and the run's end is as without them.

    In a process of its own: it forks, and what is forked from one whose threads have computed waits for them for ever.
    """
    command = [sys.executable, "-m", "train.door.cli", "tests.bench.soak"]
    with subprocess.Popen(
        [*command, "kills=5", "steps=6"], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as soaking:
        try:
            said, _ = soaking.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            os.killpg(soaking.pid, signal.SIGKILL)  # and what it forked
            raise
    assert soaking.returncode == 0, said
    found = json.loads(said.splitlines()[-1])
    assert found["kills"] >= 5 and found["lost"] == 0


def test_a_soak_of_no_number_is_refused():
    with pytest.raises(SystemExit):
        soak.main(["kills=many"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_docstring_names_the_command(name):
    module = importlib.import_module(f"tests.bench.{name}")
    assert f"bash launch.sh bench {name}" in module.__doc__
    assert callable(module.main)


def test_benchmark_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"^bench stp: expected one of cost, data, experts, .*; did you mean step\?$"):
        prepare_benchmark(["stp"])


@pytest.mark.slow
def test_the_door_runs_a_benchmark_from_any_folder(tmp_path):
    """As the step's docstring had it, that one ended in ModuleNotFoundError, and without the door's settings."""
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "launch.sh"), "bench", "packing", "--samples", "50"],
        cwd=tmp_path,
        env={**os.environ, "VENV": "none", "PATH": search},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "max_tiles_per_pack" in done.stdout
