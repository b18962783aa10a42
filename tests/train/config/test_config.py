"""Recipes compose, layers have their order, and every mistake is one line that names the key."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from train.config import compose, conf_files
from train.config.fields import list_keys
from train.config.load import (
    check_divides,
    load_config,
    load_eval_config,
    load_export_config,
    load_infer_config,
    rehearsal_notice,
)
from train.config.schema import LORA_GROUPS, NANO, WHOLE_GROUPS, TrainConfig
from train.machine.devices import Machine

CPU = Machine(gpus=0)
GPU = Machine(gpus=1, driver="CUDA Version: 12.6", gpu_paddle=True)
FOUR_GPUS = Machine(gpus=4, driver="CUDA Version: 12.6", gpu_paddle=True)
RECIPES = sorted(conf_files.recipes())


def train(*arguments, machine=GPU):
    return load_config(["conf=sft_tiny", *arguments], machine)


def test_recipes_are_found():
    assert {"sft_tiny", "pretrain_nano"} <= set(RECIPES)
    assert "rehearsal" not in RECIPES  # the overlay is no recipe
    assert all(conf_files.recipes().values()), "a recipe's first line is its description"


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_composes(recipe, machine):
    config = load_config([f"conf={recipe}"], machine)
    assert isinstance(config, TrainConfig)
    assert config.recipe == recipe


@pytest.mark.parametrize("name", conf_files.groups()["model"])
def test_model_composes(name):
    assert train(f"model={name}").model.path


def test_nothing_below_is_omegaconf():
    """What the code below gets are dataclasses, lists and dictionaries."""

    def walk(value):
        yield value
        if is_dataclass(value):
            for entry in fields(value):
                yield from walk(getattr(value, entry.name))

    assert {type(value).__module__ for value in walk(train("lora.ranks.experts=4"))} <= {
        "builtins",
        "train.config.schema",
        "train.config.data_schema",
    }


def test_resolved_config_reads_back(tmp_path):
    config = train("data.path=a ${b}: 'c', 这", "lora.ranks.experts=4")
    read = yaml.safe_load(compose.to_yaml(config))
    assert read["data"]["path"] == ["a ${b}: 'c', 这"]
    assert read["lora"]["ranks"] == {"experts": 4}
    assert list(read) == [entry.name for entry in fields(TrainConfig)]


# --- layers


def test_command_line_goes_before_overlay_before_recipe():
    recipe, overlay = train(), train(machine=CPU)
    assert (recipe.rehearsal, overlay.rehearsal) == (False, True)
    assert recipe.precision != overlay.precision
    typed = train("precision=fp16", machine=CPU)
    assert typed.rehearsal
    assert typed.precision == "fp16"


@pytest.mark.slow
def test_typed_length_sets_the_other_length_aside():
    """A recipe's max_steps must not cut short the epochs that somebody asks for, nor its epochs a typed max_steps."""
    assert train(machine=CPU).max_steps is not None
    assert (train("epochs=3", machine=CPU).epochs, train("epochs=3", machine=CPU).max_steps) == (3, None)
    assert (train("max_steps=7").epochs, train("max_steps=7").max_steps) == (None, 7)
    both = train("epochs=0.5", "max_steps=7")
    assert (both.epochs, both.max_steps) == (0.5, 7)


def test_run_dir():
    assert train().run_dir == "outputs/sft_tiny"
    assert train(machine=CPU).run_dir == "outputs/rehearsal/sft_tiny"
    assert train("run_dir=/x, y", machine=CPU).run_dir == "/x, y"


def test_rank_of_a_group_has_two_spellings():
    assert train("lora.ranks.experts=4").lora.ranks == {"experts": 4}
    assert train("lora.alphas.experts=8").lora.alphas == {"experts": 8.0}
    assert train("lora.ranks={experts:4,attention:2}").lora.ranks == {"experts": 4, "attention": 2}


# --- rehearsals


@pytest.mark.parametrize(
    ("arguments", "machine", "expected"),
    [
        ([], CPU, True),
        (["data.path=mine.jsonl", "max_steps=5"], CPU, True),
        (["nproc=2", "packs_per_step=2"], CPU, True),
        (["rehearse=false"], CPU, False),
        (["device=cpu"], CPU, False),
        (["model=nano"], CPU, False),
        (["model.path=weights"], CPU, False),
        (["nnodes=2", "master=10.0.0.1:6170"], CPU, False),
        ([], GPU, False),
        (["rehearse=true"], GPU, True),
        # Somebody turned the GPU off for this process: as good as device=cpu.
        ([], Machine(gpus=1, driver="CUDA Version: 12.6", gpu_paddle=True, visible=()), False),
    ],
)
def test_when_a_run_is_a_rehearsal(arguments, machine, expected):
    config = train(*arguments, machine=machine)
    assert config.rehearsal is expected
    assert (Path(config.model.path) == NANO) is (expected or "model=nano" in arguments)


def test_recipe_that_trains_nano_is_the_real_thing():
    assert not load_config(["conf=pretrain_nano"], CPU).rehearsal


def test_rehearsal_notice_names_the_real_command():
    arguments = ["conf=sft_tiny", "data.path=my file.jsonl", "rehearse=true"]
    notice = rehearsal_notice(load_config(arguments, CPU), arguments)
    assert "REHEARSAL" in notice
    assert "bash launch.sh conf=sft_tiny 'data.path=my file.jsonl'\n" in notice
    assert "rehearse=false" in notice
    assert "text tokens" in notice  # what is not exact with one's own data
    plain = rehearsal_notice(train(machine=CPU), ["conf=sft_tiny"])
    assert "no accelerator" in plain
    assert "text tokens" not in plain


@pytest.mark.slow
def test_rehearsal_notice_says_how_long_it_takes():
    """It said "for a few steps", which were 150 and took minutes."""

    def said(*arguments: str) -> str:
        return rehearsal_notice(train(*arguments, machine=CPU), ["conf=sft_tiny"]).splitlines()[0]

    assert said().endswith("nano model, for 150 steps: about 3 min on 2 idle cores, longer beside other work.")
    assert "for 600 steps: about 21 min on" in said("max_steps=600", "packs_per_step=2")
    assert said("epochs=2").endswith("nano model, for 2 epochs.")


# --- processes


def test_one_process_a_gpu():
    assert train(machine=FOUR_GPUS).nproc == 4
    assert train("nproc=2", machine=FOUR_GPUS).nproc == 2
    assert train("device=cpu", machine=FOUR_GPUS).nproc == 1
    assert train("device=cpu", "nproc=2", machine=FOUR_GPUS).nproc == 2


def test_packs_are_shared_evenly():
    with pytest.raises(ValueError, match=r"packs_per_step=8 cannot be shared by 3 processes.*packs_per_step=9.*2 proc"):
        train("nproc=3", machine=FOUR_GPUS)
    with pytest.raises(ValueError, match=r"packs_per_step=6 cannot be shared by 4 processes"):
        train("packs_per_step=6", "nproc=2", "nnodes=2", "master=10.0.0.1:6170", machine=FOUR_GPUS)
    check_divides(8, 4)


# --- mistakes


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optm.lr=3", r"^unknown key 'optm.lr'; did you mean optim.lr\?$"),
        ("lr=3", r"^unknown key 'lr'; did you mean optim.lr\?$"),
        ("optim.lrr=3", r"^unknown key 'optim.lrr'; did you mean optim.lr\?$"),
        ("+new.key=3", r"^unknown key 'new.key'"),
        ("+lora.rank=4", r"^\+lora.rank=4: \+ adds what is not there, and lora.rank is: give lora.rank=4 or \+\+lora"),
        ("+data.path=x", r"^\+data.path=x: \+ adds what is not there, and data.path is: give data.path=x"),
        (
            "~lora.rank",
            r"^~lora.rank: ~ takes an option or a table's entry away, and lora.rank is a key: give lora.rank=",
        ),
        (
            "~data.path",
            r"^~data.path: ~ takes an option or a table's entry away, and data.path is a key: give data.path",
        ),
        (
            "~lora.ranks.experts",
            r"^~lora.ranks.experts: Could not delete from config. 'lora.ranks.experts' does not exist",
        ),
        ("~lr", r"^unknown key 'lr'; did you mean optim.lr\?$"),
        ("max_steps=${nope}", r"^max_steps=\$\{nope\}: expected a whole number.*; Interpolation key 'nope' not found$"),
        ("command=x", r"^command is set by the door$"),
        ("hydra.run.dir=x", r"^unknown key 'hydra.run.dir'"),
        ("optim=3", r"^optim=3: expected one of deepseek_sft_base, .*\(one key of it is optim.KEY=VALUE\)$"),
        ("optim.lr", r"'optim.lr': expected key=value"),
        ("--multirun", r"'--multirun': expected key=value"),
        (
            "optim.lr=fast",
            r"^optim.lr=fast: expected a number; Value 'fast' of type 'str' could not be converted to Float$",
        ),
        ("optim.lr=1,2", r"^optim.lr=1,2: expected a number; Ambiguous value for argument 'optim.lr=1,2'$"),
        ("optim.lr=a(b", r"^optim.lr=a\(b: expected a number; no viable alternative at input 'a\(b'$"),
        (
            "max_steps=5.5",
            r"^max_steps=5.5: expected a whole number \(optimizer steps\) or null; Value '5.5' of type 'float'",
        ),
        ("max_steps=${optim.lr}", r"^max_steps=\$\{optim.lr\}: expected a whole number"),
        ("rehearse=maybe", r"^rehearse=maybe: expected true or false or null; Value 'maybe' is not a valid bool"),
        (
            "lora.groups=attention",
            r"^lora.groups=attention: expected a list \[a,b\]; .*str is not a ListConfig, list or tuple",
        ),
        ("lora.groups=[atention]", r"^lora.groups=atention: expected one of .*; did you mean attention\?$"),
        ("lora.groups=[]", r"^lora.groups=\[\]: nothing would train"),
        ("lora.ranks.experts=x", r"^lora.ranks.experts=x: expected a table"),
        ("lora.ranks.expert=4", r"^lora.ranks=expert: expected one of .*; did you mean experts\?$"),
        ("lora.ranks.experts=0", r"^lora.ranks.experts=0: expected at least 1$"),
        ("lora.ranks.vision=4", r"^lora.ranks.vision: vision is not in lora.groups"),
        ("lora.alphas.vision=4", r"^lora.alphas.vision: vision is not in lora.groups"),
        ("lora.alphas.experts=x", r"^lora.alphas.experts=x: expected a table"),
        ("lora.rank=-1", r"^lora.rank=-1: expected at least 0$"),
        ("trainable=[visio]", r"^trainable=visio: expected one of vision, projector, language; did you mean vision\?$"),
        ("data.max_tiles=10", r"^data.max_tiles=10: expected at most 9 tiles$"),
        ("data.max_tiles=0", r"^data.max_tiles=0: expected at least 1 tiles$"),
        ("packs_per_step=0", r"^packs_per_step=0: expected at least 1 packs$"),
        (
            "wandb.mode=disabled",
            r"^wandb.mode=disabled: expected one of auto, online, offline; did you mean log=\[\]\?$",
        ),
        ("optim.schedule=cos", r"^optim.schedule=cos: expected one of cosine, constant; did you mean cosine\?$"),
        ("precision=日", r"^precision=日: expected one of bf16, fp16, fp32$"),
        ("model=tny", r"^model=tny: expected one of base, nano, small, tiny; did you mean tiny\?.*model.path=FOLDER"),
        ("recipe=x", r"^recipe is set by the door; give conf=NAME$"),
        ("rehearsal=true", r"^rehearsal is set by the door; give rehearse=true$"),
        ("nproc=2", r"^nproc=2: this machine has 1 usable GPU"),
        ("nnodes=2", r"^nnodes=2: give master=IP:PORT"),
        ("rank=1", r"^rank=1: the machines are numbered 0 to 0"),
        ("conf=sft_small", r"^conf is given twice$"),
    ],
)
def test_mistake_on_the_command_line(argument, message):
    with pytest.raises(ValueError, match=message):
        train(argument)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nproc=1", "sharding.stage=1"], r"^sharding\.stage=1 with one process: .* give nproc= .* sharding\.stage=0$"),
        (["nproc=2", "sharding.degree=2"], r"^sharding\.degree=2 with sharding\.stage=0: nothing is shared"),
        (["nproc=4", "sharding.stage=1", "sharding.degree=3"], r"^sharding\.degree=3: .* \(2, 4\), or 0: all$"),
        (["nproc=4", "sharding.stage=1", "sharding.degree=1"], r"^sharding\.degree=1: expected a divisor of the 4"),
        (["nproc=2", "sharding.stage=4"], r"^sharding\.stage=4: expected at most 3$"),
        (
            ["nproc=4", "sharding.stage=2", "sharding.degree=2"],
            r"^sharding\.degree=2 with sharding\.stage=2: it",
        ),
        (
            ["nproc=2", "sharding.stage=2", "recompute=0"],
            r"^recompute=0 with sharding\.stage=2: every layer is",
        ),
        (["nproc=2", "sharding.stage=2", "precision=fp16"], r"^precision=fp16 with sharding\.stage=2: its loss scaler"),
        (["nproc=2", "sharding.stage=3"], r"^lora\.rank=8 with sharding\.stage=3: .* give sharding\.stage=1 or 2, or"),
        (
            ["nproc=2", "sharding.stage=3", "lora.rank=0"],
            r"^eval\.questions=\d+ with .*; give eval\.questions=0, the",
        ),
    ],
)
def test_sharding_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        train(*arguments, machine=FOUR_GPUS)


def test_sharding_over_machines():
    many = ["nproc=2", "nnodes=4", "master=10.0.0.1:6170", "packs_per_step=8", "sharding.stage=1", "sharding.degree=2"]
    assert train(*many, machine=FOUR_GPUS).sharding.degree == 2


def test_no_length_and_nothing_to_train():
    with pytest.raises(ValueError, match="epochs and max_steps are both null"):
        train("epochs=null", "max_steps=null")
    with pytest.raises(ValueError, match=r"lora.rank=0 and trainable=\[\]"):
        train("lora.rank=0", "trainable=[]")


def test_unknown_recipe_lists_recipes():
    with pytest.raises(
        ValueError, match=r"unknown recipe 'sft_tny'; did you mean sft_tiny\? \(in conf/: .*pretrain_nano"
    ):
        load_config(["conf=sft_tny"], CPU)
    with pytest.raises(ValueError, match=r"no recipe: give conf=NAME, one of pretrain_nano"):
        load_config(["max_steps=3"], CPU)
    with pytest.raises(ValueError, match="unknown recipe 'rehearsal'"):
        load_config(["conf=rehearsal"], CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 3}", r"^conf/broken.yaml: unknown key 'optim.lrr'; did you mean optim.lr\?$"),
        ("optim: {lr: fast}", r"^conf/broken.yaml: optim.lr: expected a number; Value 'fast'"),
        ("optim: 3", r"conf/broken.yaml: .*int is not a subclass of OptimConfig"),
        ("data: {max_tiles: 12}", r"^data.max_tiles=12: expected at most 9 tiles$"),
        ("optim: [", "while parsing"),
    ],
)
def test_mistake_in_a_recipe(text, message, tmp_path, monkeypatch):
    (tmp_path / "broken.yaml").write_text(f"# A recipe with a mistake.\n{text}\n")
    monkeypatch.setattr(conf_files, "CONF", tmp_path)
    with pytest.raises(ValueError, match=message):
        load_config(["conf=broken"], GPU)


# --- the other verbs


def test_infer():
    config = load_infer_config(["model=here", "prompt=null", "image=a,b.png", "image=c=d.png", "temperature=0.5"])
    assert (config.prompt, config.image, config.temperature) == ("null", ["a,b.png", "c=d.png"], 0.5)
    assert Path(load_infer_config(["model=nano", "prompt=x"]).model) == NANO
    with pytest.raises(ValueError, match="infer needs model=FOLDER"):
        load_infer_config(["prompt=x"])
    with pytest.raises(ValueError, match="infer needs prompt=TEXT"):
        load_infer_config(["model=here"])
    with pytest.raises(ValueError, match="not both"):
        load_infer_config(["model=here", "prompt=x", "messages=y"])
    with pytest.raises(ValueError, match=r"unknown key 'promt'; did you mean prompt\?"):
        load_infer_config(["model=here", "promt=x"])
    with pytest.raises(ValueError, match=r"top_p=2.0: expected at most 1"):
        load_infer_config(["model=here", "prompt=x", "top_p=2"])
    with pytest.raises(ValueError, match="conf=sft_tiny: only training has recipes"):
        load_infer_config(["model=here", "prompt=x", "conf=sft_tiny"])


def test_export_and_eval():
    assert load_export_config(["run=r, (1)"]).out == "r, (1)/export"
    with pytest.raises(ValueError, match="export needs run=FOLDER"):
        load_export_config([])
    with pytest.raises(ValueError, match="layout=hff: expected one of hf, paddle; did you mean hf"):
        load_export_config(["run=r", "layout=hff"])
    assert load_eval_config(["model=m", "data.path=d, 1.jsonl"]).data.path == ["d, 1.jsonl"]
    with pytest.raises(ValueError, match=r"eval needs data.path=FILE"):
        load_eval_config(["model=m"])


def test_home_folder_of_a_path(monkeypatch):
    """Bash expands `~` at the start of a word only, so `data.path=~/x` arrives with it."""
    monkeypatch.setenv("HOME", "/home/me")
    assert train("data.path=~/x.jsonl").data.path == ["/home/me/x.jsonl"]
    assert load_infer_config(["model=m", "prompt=~/x"]).prompt == "~/x"


def test_null_of_an_optional_text():
    assert train("data.path=null").data.path == []
    assert train("wandb.name=null").wandb.name == "null"


def test_every_key_says_what_it_is():
    specs = list_keys(TrainConfig)
    assert len(specs) > 50
    assert [spec.name for spec in specs if not spec.doc.endswith((".", "?"))] == []


def test_names_are_those_of_the_rooms_below():
    """The schema spells them out because it must load without Paddle."""
    from data.shapes.write import TASKS
    from vl2.lora_settings import GROUPS
    from vl2.parameter_groups import WHOLE_GROUPS as ALSO

    assert tuple(GROUPS) == LORA_GROUPS and ALSO == WHOLE_GROUPS
    (task,) = [spec for spec in list_keys(TrainConfig) if spec.name == "data.shapes.task"]
    assert set(task.choices) == set(TASKS)
