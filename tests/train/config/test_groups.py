"""Every folder in conf/ is a group: an option sets several keys, and recipes are made of them."""

import json
from dataclasses import asdict, fields, is_dataclass

import pytest

from tests.places import GOLDENS
from train.config import conf_files
from train.config.earlier import in_todays_words
from train.config.load import load_config
from train.config.schema import TrainConfig
from train.machine.devices import Machine

GOLDEN = GOLDENS / "config" / "recipes.json"
MACHINES = {
    "gpu": Machine(gpus=1, driver="CUDA Version: 12.6", gpu_paddle=True),
    "no accelerator": Machine(gpus=0),
}


def takes(recipe, group, option):
    """Whether a recipe names an option in its defaults."""
    return f"- {group}: {option}\n" in (conf_files.CONF / f"{recipe}.yaml").read_text("utf-8")


def train(*arguments, conf="sft_tiny", machine="gpu"):
    return load_config([f"conf={conf}", *arguments], MACHINES[machine])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("recipe", [name for name in conf_files.recipes() if not name.endswith("_4bit")])
@pytest.mark.slow
def test_recipes_made_of_groups_say_what_they_said(recipe, machine):
    """The golden was resolved when every recipe wrote all its values itself."""
    golden = json.loads(GOLDEN.read_text("utf-8"))
    assert f"{recipe}, {machine}" in golden
    found = asdict(train(conf=recipe, machine=machine))
    found["model"]["path"] = found["model"]["path"].removeprefix(f"{conf_files.ROOT}/")
    for name, value in in_todays_words(golden[f"{recipe}, {machine}"]).items():
        if isinstance(value, dict):  # a group: keys have come since
            found[name] = {key: found[name][key] for key in value}
        assert found[name] == value, name


def test_every_folder_is_a_group_with_options():
    found = conf_files.groups()
    assert set(found) == {"data", "lora", "model", "optim"}
    for group, options in found.items():
        assert is_dataclass(getattr(train(), group))
        assert len(options) >= 2
        assert all(options.values()), f"{group}: an option's first line is its description"


IN_USE = {  # (group, option) -> a recipe that takes it and adds nothing to it
    (group, option): next((name for name in conf_files.recipes() if takes(name, group, option)), None)
    for group, options in conf_files.groups().items()
    for option in options
    if group != "model"
}


@pytest.mark.slow
@pytest.mark.parametrize(("group", "option"), IN_USE)
def test_option_takes_the_place_of_the_recipes(group, option):
    """What the recipe's own option says and the typed one does not is the schema's default again."""
    recipe = IN_USE[group, option]
    for other in ("sft_tiny", "sft_tiny_full", "pretrain_nano"):
        found = getattr(train(f"{group}={option}", conf=other), group)
        if recipe:
            assert found == getattr(train(conf=recipe), group)
        else:
            assert found != getattr(train(conf=other), group)


def test_a_key_goes_with_its_group():
    config = train("optim=deepseek_sft_small", "optim.lr=1e-4", "lora=none")
    assert (config.optim.lr, config.optim.schedule, config.optim.weight_decay) == (1e-4, "constant", 0.1)
    assert config.lora.rank == 0
    assert train("optim.lr=1e-4", "optim=deepseek_sft_small").optim == config.optim


@pytest.mark.slow
def test_typed_option_goes_before_the_overlay_of_a_rehearsal():
    """The overlay sets nano's learning rate; what is typed goes before every file."""
    assert train(machine="no accelerator").optim.lr == 4e-3
    config = train("optim=deepseek_sft_tiny", machine="no accelerator")
    assert config.rehearsal
    assert config.optim.lr == 3e-5


def test_plus_and_tilde_of_a_group():
    assert train("+lora=attention").lora.groups == ["attention"]
    assert train("~optim", conf="sft_tiny_full").optim == TrainConfig().optim


def test_option_that_is_none():
    with pytest.raises(ValueError, match=r"^optim=lora_cosin: expected one of .*; did you mean lora_cosine\?"):
        train("optim=lora_cosin")
    with pytest.raises(ValueError, match=r"^optim=\[lora_cosine\]: expected one of"):
        train("optim=[lora_cosine]")
    with pytest.raises(ValueError, match=r"^optim is given twice$"):
        train("optim=lora_cosine", "+optim=lora_cosine")


def test_groups_are_those_of_the_schema():
    nested = {entry.name for entry in fields(TrainConfig) if is_dataclass(getattr(TrainConfig(), entry.name))}
    assert set(conf_files.groups()) <= nested
