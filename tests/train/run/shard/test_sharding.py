"""Sharding in real processes, which talk through gloo: equal to one process, stage 1 to data parallel bit for bit.

Nothing is clipped and eps is large, so that gradients of another scale would show: AdamW alone hides them. Packs are
few and small: some ranks have only text, some at an epoch's end nothing at all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.places import ROOT
from train.config.load import load_config
from train.config.schema import ExportConfig
from train.export.merged import export
from train.run.build import open_base
from train.run.build_data import build_data
from train.store.whole_folder import damage
from vl2.checkpoint.folder import read_checkpoint
from vl2.checkpoint.tensor_files import read_header

STEPS, SAVED = 7, 4
SETTINGS = (
    *("model.init=random", f"max_steps={STEPS}", f"save_steps={SAVED}", "optim.max_grad_norm=0", "optim.eps=1e-3"),
    *("recompute=1", "eval.every=4", "eval.questions=0"),
)
LORA: tuple[str, ...] = ()
FULL = ("lora.rank=0", "trainable=[projector,language]", "optim.lr=1e-3", "optim.aux_loss=0.1")
WAYS = {"lora": LORA, "full": FULL}
STAGES = {"lora": (*LORA, "sharding.stage=1"), "full": (*FULL, "sharding.stage=1")}
LAYERS = {"lora-2": (*LORA, "sharding.stage=2"), "full-2": (*FULL, "sharding.stage=2")}
LAYERS["full-3"] = (*FULL, "sharding.stage=3")


def start(folder: Path, processes: int, *trainings: list[str]) -> None:
    """Make trainings one after the other, each in all of so many processes."""
    folder.mkdir()
    (folder / "trainings.json").write_text(json.dumps(trainings))
    launcher = ["-m", "train.door.ranks", "cpu", "--nproc_per_node", str(processes), "--log_dir", str(folder / "log")]
    work = ["-u", "-m", "train.door.cli", "tests.train.run.shard.several", str(folder / "trainings.json")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *launcher, sys.executable, *work]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def losses(run_dir: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def state(checkpoint: Path) -> list[dict[str, np.ndarray]]:
    """The optimizer's state, one table a file."""
    paths = sorted(checkpoint.glob("optimizer*.safetensors"))
    return [{name: tensor.read() for name, tensor in read_header(path)[0].items()} for path in paths]


def bytes_of(tensors: dict[str, np.ndarray]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.fixture(scope="module")
def settings(golden_folder, data_file) -> tuple[str, ...]:
    """Of every run: a model of one dense layer and one of experts, since many short steps are made."""
    folder = golden_folder("nano_tiny")
    config = json.loads((folder / "config.json").read_text())
    config["language_config"]["num_hidden_layers"], config["vision_config"]["layers"] = 2, 1
    (folder / "config.json").write_text(json.dumps(config))
    return (*SETTINGS, f"model.path={folder}", f"data.eval_path={data_file}")


@pytest.fixture(scope="module")
def one(run, settings, tmp_path_factory) -> Path:
    """Folder of the runs of one process."""
    folder = tmp_path_factory.mktemp("one")
    for name, way in WAYS.items():
        assert run(folder / name, *settings, *way) == 0
    return folder


@pytest.fixture(scope="module")
def two(arguments, settings, tmp_path_factory) -> Path:
    """Folder of the runs of two processes: shared out, and for three steps not."""
    folder = tmp_path_factory.mktemp("two") / "runs"
    shared = [arguments(folder / name, *settings, *way, "nproc=2") for name, way in {**STAGES, **LAYERS}.items()]
    start(folder, 2, *shared, arguments(folder / "none", *settings, "max_steps=3", "nproc=2"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", [*STAGES, *LAYERS])
def test_two_processes_equal_one(way, one, two, arguments, settings):
    """1e-5 is asked for; sums over processes and packs differ in their order only, about 1e-6 here."""
    whole = one / way.partition("-")[0]
    config = load_config(arguments(two / way, *settings))
    plan = build_data(config, open_base(config)).plan
    ranks = [plan.rank_order(step, 2) for step in range(STEPS)]
    pictured = [[any(plan.packs[pack].tiles for pack in own) for own in step] for step in ranks]
    assert [True, False] in pictured or [False, True] in pictured
    assert any(not plan.packs[pack].samples for step in ranks for own in step for pack in own)
    assert len(losses(whole)) == STEPS and len(losses(whole, "eval_loss")) == 3
    assert losses(two / way) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(two / way, "grad_norm") == pytest.approx(losses(whole, "grad_norm"), rel=1e-5)
    assert losses(two / way, "eval_loss") == pytest.approx(losses(whole, "eval_loss"), abs=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_stage_3_is_whole(two, tmp_path):
    """Its weights as those of the stages that keep them whole, and an export comes out of it on one process."""
    found, known = (
        {name: tensor.read() for name, tensor in read_header(two / way / "weights" / "trained.safetensors")[0].items()}
        for way in ("full-3", "full-2")
    )
    assert found.keys() == known.keys() and all(np.array_equal(found[name], known[name]) for name in known)
    export(ExportConfig(run=str(two / "full-3"), out=str(tmp_path / "out"), dtype="fp32"))
    merged = read_checkpoint(tmp_path / "out").tensors
    name = "language.model.layers.1.self_attn.q_proj.weight"
    assert np.array_equal(merged[name].read(), found[name].T)


@pytest.mark.slow
def test_a_process_holds_its_share_of_the_layers(two):
    """Between steps: of stage 2 the whole weights and the sums of its own gradients, of stage 3 its own weights."""
    for way in ("full-2", "full-3"):
        kept = [json.loads(Path(f"{two / way}.rank-{rank}.json").read_text()) for rank in range(2)]
        for held in kept:
            assert held["layers"] > 0 and held["own_layers"] < 0.62 * held["layers"]
            assert held["gradients"] == held["own_layers"]
            assert held["weights"] == (held["own_layers"] if way == "full-3" else held["layers"])
        assert sum(held["own_layers"] for held in kept) == kept[0]["layers"]


@pytest.mark.slow
def test_weights_are_those_of_data_parallel(two):
    assert losses(two / "lora")[:3] == losses(two / "none")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_process_keeps_the_moments_of_its_own_parameters(way, one, two):
    """In memory as in its file; together they are those of one process, and no parameter lies in two."""
    checkpoint = two / way / "checkpoints" / f"step-{STEPS:06d}"
    assert damage(checkpoint) is None
    assert sorted(path.name for path in checkpoint.glob("optimizer*")) == [
        "optimizer-00000-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors",
    ]
    (whole,) = state(one / way / "checkpoints" / f"step-{STEPS:06d}")
    parts = state(checkpoint)
    assert parts[0].keys() | parts[1].keys() == whole.keys() and not parts[0].keys() & parts[1].keys()
    kept = [json.loads(Path(f"{two / way}.rank-{rank}.json").read_text()) for rank in range(2)]
    assert [sum(each["moments"].values()) for each in kept] == [bytes_of(part) for part in parts]
    assert sum(map(bytes_of, parts)) == bytes_of(whole)
    assert max(map(bytes_of, parts)) < 0.52 * bytes_of(whole)
    for part in parts:
        for name in part:
            if name.endswith(":moment1"):
                assert {name.replace(":moment1", ":moment2"), name.replace(":moment1", ":beta1_pow_acc")} < part.keys()
            assert np.linalg.norm(part[name] - whole[name]) <= 1e-3 * np.linalg.norm(whole[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora", "full-3"])
def test_one_process_goes_on_from_two(way, one, two, run, settings, tmp_path):
    first = two / way / "checkpoints" / f"step-{SAVED:06d}"
    name = way.partition("-")[0]
    assert run(tmp_path / "run", *settings, *WAYS[name], f"resume={first}") == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(one / name)[SAVED:], abs=1e-5)


@pytest.mark.slow
def test_four_processes(one, two, arguments, settings, tmp_path):
    """Two pairs that share, and four that go on from what two wrote."""
    folder = tmp_path / "runs"
    of_two = {way: two / way / "checkpoints" / f"step-{SAVED:06d}" for way in ("lora", "full-3")}
    pairs = arguments(folder / "pairs", *settings, *FULL, "nproc=4", "sharding.stage=1", "sharding.degree=2")
    lora = arguments(folder / "lora", *settings, *STAGES["lora"], "nproc=4", f"resume={of_two['lora']}")
    full = arguments(folder / "full-3", *settings, *LAYERS["full-3"], "nproc=4", f"resume={of_two['full-3']}")
    start(folder, 4, pairs, lora, full)
    assert losses(folder / "pairs") == pytest.approx(losses(one / "full"), abs=1e-5)
    assert losses(folder / "lora") == pytest.approx(losses(one / "lora")[SAVED:], abs=1e-5)
    assert losses(folder / "full-3") == pytest.approx(losses(one / "full")[SAVED:], abs=1e-5)
    last = f"step-{STEPS:06d}"
    assert [len(state(folder / run / "checkpoints" / last)) for run in ("pairs", "lora", "full-3")] == [2, 4, 4]
