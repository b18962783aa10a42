"""What trains in a run: settings that do not go together are refused by name."""

import pytest

from train.config.earlier import in_todays_words
from train.config.load import load_config
from train.config.schema import WHOLE_GROUPS, GroupConfig, LoRAConfig, OptimConfig, TrainConfig
from train.config.trains import check_groups, check_trains, trained_groups
from train.machine.devices import Machine
from vl2.errors import UserError

GPU = Machine(gpus=1, driver="CUDA Version: 12.6", gpu_paddle=True)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"pissa": True, "init": "a"}, r"^lora\.pissa=true with lora\.init=a: .*; give one of them$"),
        ({"pissa": True, "dropout": 0.05}, r"^lora\.pissa=true with lora\.dropout=0\.05: .*; give lora\.dropout=0$"),
        ({"also_train": ["vision"], "groups": ["vision"]}, r"^lora\.also_train=\['vision'\]: vision has adapters by"),
        ({"rank": 0, "plus_scale": 16.0}, r"^lora\.plus_scale=16\.0 with lora\.rank=0: no adapter would train; give"),
        ({"rank": 0, "pissa": True}, r"^lora\.pissa=True with lora\.rank=0"),
        ({"rank": 0, "rslora": True}, r"^lora\.rslora=True with lora\.rank=0"),
        ({"rank": 0, "also_train": ["norms"]}, r"^lora\.also_train=\['norms'\] with lora\.rank=0"),
    ],
)
def test_adapters(lora, message):
    check_trains(TrainConfig())
    with pytest.raises(UserError, match=message):
        check_trains(TrainConfig(lora=LoRAConfig(**lora)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["lora.rank=0"],
            r"^model\.frozen=nf4 with lora\.rank=0 and trainable=\['projector', 'language'\]: .*give lora\.r",
        ),
        (
            ["lora.pissa=true", "lora.dropout=0"],
            r"^model\.frozen=nf4 with lora\.pissa=true: .*; give lora\.pissa=false$",
        ),
        (["model.init=random"], r"^model\.frozen=nf4 with model\.init=random: there is no checkpoint"),
        (
            ["nproc=2", "sharding.stage=3", "eval.questions=0"],
            r"^model\.frozen=nf4 with sharding\.stage=3: .*=2 or mod",
        ),
        (["model.frozen=none", "model.frozen_cache=a"], r"^model\.frozen_cache=\S*a with model\.frozen=none: nothing"),
        (
            ["model.frozen=int4"],
            r"model\.frozen=int4: expected one of none, nf4, int8; did you mean model\.frozen=nf4\?$",
        ),
    ],
)
def test_weights_in_few_bits(settings, message):
    """What cannot be done with them is refused before a model is read; adapters and other parts can be trained."""
    given = ["conf=sft_tiny", "device=cpu", "rehearse=false", "model.frozen=nf4"]
    load_config(given)
    load_config([*given, "lora.rank=0", "trainable=[projector]"])
    load_config([*given, "nproc=2", "sharding.stage=2"])
    given = given[:-1] if any(setting.startswith("model.frozen=") for setting in settings) else given
    with pytest.raises(UserError, match=message):
        load_config([*given, *settings])


def test_groups_that_train():
    config = TrainConfig(lora=LoRAConfig(groups=["experts"], also_train=["projector", "norms"]))
    assert trained_groups(config) == ("experts", "projector", "norms")
    config = TrainConfig(lora=LoRAConfig(rank=0), trainable=["vision", "language"])
    assert set(trained_groups(config)) == {*WHOLE_GROUPS, "attention", "experts", "shared_experts", "dense_mlp"} - {
        "projector"
    }


def test_rates_of_groups():
    """An option of conf/optim may say something of a group that does not train; the user may not."""
    config = TrainConfig(optim=OptimConfig(groups={"vision": GroupConfig(lr_scale=0.1)}))
    check_groups(config, lambda group: False)
    with pytest.raises(UserError, match=r"^optim\.groups\.vision: vision does not train .*, or name it in lora\.gr"):
        check_groups(config, lambda group: True)
    config.lora.also_train = ["norms"]
    config.optim.groups = {"norms": GroupConfig(weight_decay=0.1)}
    with pytest.raises(UserError, match=r"^optim\.groups\.norms\.weight_decay: norms are vectors, which never decay"):
        check_groups(config, lambda group: True)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optim.groups.vison.lr_scale=0.1", r"^optim\.groups=vison: expected one of .*; did you mean vision\?$"),
        ("optim.groups.experts.lr=0.1", r"^unknown key 'optim\.groups\.experts\.lr'.*expected lr_scale, weight_decay"),
        (
            "optim.groups.experts.lr_scale=fast",
            r"^optim\.groups\.experts\.lr_scale=fast: expected a number, found",
        ),
        ("optim.groups.experts=0.1", r"^optim\.groups\.experts=0\.1: expected \{key: value\}, found float$"),
        ("optim.groups.vision.lr_scale=0.1", r"^optim\.groups\.vision: vision does not train in this run"),
        ("optim.vision_lr_scale=0.1", r"^unknown key 'optim\.vision_lr_scale'; did you mean optim\.groups\?$"),
        ("lora.also_train=[norm]", r"^lora\.also_train=norm: expected one of .*; did you mean norms\?$"),
    ],
)
@pytest.mark.slow
def test_as_typed(argument, message):
    with pytest.raises(UserError, match=message):
        load_config(["conf=sft_tiny", argument], GPU)


@pytest.mark.slow
def test_a_recipe_of_the_users_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [sft_tiny, _self_]\noptim: {groups: {vision: {lr_scale: 0.5}}}\n")
    with pytest.raises(UserError, match=r"^optim\.groups\.vision: vision does not train"):
        load_config([f"conf={path}"], GPU)
    config = load_config([f"conf={path}", "lora.groups=[vision]", "optim.groups.vision.weight_decay=1"], GPU)
    assert config.optim.groups == {"vision": GroupConfig(lr_scale=0.5, weight_decay=1.0)}


def test_earlier_settings_in_todays_words():
    before = {"optim": {"lr": 1.0, "vision_lr_scale": 0.5}, "seed": 3}
    groups = {"vision": {"lr_scale": 0.5, "weight_decay": None}}
    assert in_todays_words(before) == {"optim": {"lr": 1.0, "groups": groups}, "seed": 3}
    before["optim"]["vision_lr_scale"] = 1.0
    assert in_todays_words(before)["optim"] == {"lr": 1.0, "groups": {}}
    assert in_todays_words({"optim": {"lr": 1.0}}) == {"optim": {"lr": 1.0}}
