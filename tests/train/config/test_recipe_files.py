"""conf=FILE.yaml: a recipe from anywhere, and the config.yaml that a run has written."""

from dataclasses import asdict
from pathlib import Path

import pytest

from train.config.compose import to_yaml
from train.config.load import load_config, rehearsal_notice
from train.config.schema import NANO
from train.machine.devices import Machine

CPU = Machine(gpus=0)
GPU = Machine(gpus=1, driver="CUDA Version: 12.6", gpu_paddle=True)
AWKWARD = "a ${b}: \\\\${c} 'd', \\${ 这"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# Mine.\ndefaults:\n  - sft_tiny\n  - _self_\n\noptim:\n  lr: 5e-5\n")
    return path


@pytest.fixture
def written(tmp_path):
    """Writes the configuration of a run as the run does, and returns the file."""

    def write(*arguments, machine=GPU):
        config = load_config(arguments, machine)
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        return path, config

    return write


def test_recipe_from_anywhere(recipe, monkeypatch):
    config = load_config([f"conf={recipe}"], GPU)
    assert (config.recipe, config.run_dir) == ("mine", "outputs/mine")
    assert (config.optim.lr, config.optim.schedule, config.lora.dropout) == (5e-5, "cosine", 0.05)
    monkeypatch.chdir(recipe.parent)
    assert load_config(["conf=mine.yaml"], GPU).optim == config.optim
    assert load_config(["conf=./mine.yaml", "optim=deepseek_sft_tiny"], GPU).optim.lr == 3e-5


@pytest.mark.slow
def test_recipe_from_anywhere_rehearses(recipe, tmp_path):
    config = load_config([f"conf={recipe}"], CPU)
    assert config.rehearsal
    assert Path(config.model.path) == NANO
    plain = tmp_path / "plain.yaml"
    plain.write_text("model: {path: x}\n")  # names no option of any group
    assert Path(load_config([f"conf={plain}"], CPU).model.path) == NANO
    assert load_config([f"conf={plain}", "lora=attention"], CPU).lora.groups == ["attention"]


@pytest.mark.slow
def test_a_runs_own_config_repeats_it(written):
    """Texts come back as they were typed, `${...}` too; what belongs to that one command does not."""
    path, first = written("conf=sft_tiny", f"data.path={AWKWARD}", "optim.lr=1e-8", "overwrite=true", "run_dir=there")
    again = load_config([f"conf={path}"], GPU)
    assert (again.run_dir, again.overwrite, again.data.path) == ("outputs/sft_tiny", False, [AWKWARD])
    assert again.command == f"bash launch.sh conf={path}"
    own = ("run_dir", "overwrite", "command")
    assert {**asdict(again), **{key: None for key in own}} == {**asdict(first), **{key: None for key in own}}
    assert load_config([f"conf={path}", "resume=auto"], GPU).run_dir == "there"
    assert load_config([f"conf={path}", "resume=auto", "run_dir=here"], GPU).run_dir == "here"


@pytest.mark.slow
def test_a_rehearsals_config_stays_a_rehearsal(written):
    path, first = written("conf=sft_tiny", "max_steps=5", machine=CPU)
    for machine in (CPU, GPU):
        again = load_config([f"conf={path}"], machine)
        assert again.rehearsal
        assert (again.max_steps, again.optim, again.model) == (5, first.optim, first.model)
        assert again.run_dir == "outputs/rehearsal/sft_tiny"
    assert "bash launch.sh conf=sft_tiny\n" in rehearsal_notice(again, [f"conf={path}"])
    with pytest.raises(ValueError, match=r"the settings of a rehearsal, for nano; the real run is conf=sft_tiny"):
        load_config([f"conf={path}", "rehearse=false"], GPU)
    assert not load_config([f"conf={path}", "model=nano"], CPU).rehearsal


@pytest.mark.slow
def test_a_real_runs_config_stays_real(written):
    path, _ = written("conf=sft_tiny")
    assert not load_config([f"conf={path}"], CPU).rehearsal
    assert load_config([f"conf={path}", "rehearse=true"], CPU).max_steps == 150


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: {lrr: 3}", r"mine.yaml: unknown key 'optim.lrr'; did you mean optim.lr\?$"),
        ("optim: {lr: fast}", r"mine.yaml: optim.lr: expected a number; Value 'fast'"),
        ("defaults: [nope]", r"mine.yaml: Could not load 'nope'"),
        ("defaults: nope", r"mine.yaml: expected a list under defaults, found 'nope'"),
        ("defaults: [{optim: x}]", r"mine.yaml: Could not find 'optim/x'"),
        ("- a", "mine.yaml: expected keys with values, found list"),
        ("", "mine.yaml: expected keys with values, found NoneType"),
        ("a: [", "mine.yaml: while parsing"),
        ("a: ${", "mine.yaml: .*"),
        ("rehearsal: true\nlora: {rank: x}", "mine.yaml: lora.rank: expected a whole number; Value 'x'"),
    ],
)
def test_mistake_in_a_file(content, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        load_config([f"conf={path}"], GPU)
    assert "\n" not in str(refused.value)


def test_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(ValueError, match=r"^conf=sft_tiny.yaml: expected a recipe file, .*; did you mean sft_tiny\?$"):
        load_config(["conf=sft_tiny.yaml"], GPU)
    with pytest.raises(ValueError, match=r"^conf=outputs/mine: expected a recipe file"):
        load_config(["conf=outputs/mine"], GPU)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"x.yaml: .*(codec|unacceptable)"):
        load_config([f"conf={tmp_path / 'x.yaml'}"], GPU)


def test_the_command_is_kept():
    """Which command made a run was nowhere to be read."""
    config = load_config(["conf=sft_tiny", "data.path=my file.jsonl"], GPU)
    assert config.command == "bash launch.sh conf=sft_tiny 'data.path=my file.jsonl'"
