"""`help` names every verb, recipe and key, with default, unit and meaning."""

import os
import signal
import subprocess
import sys

import pytest

from tests.places import ROOT
from train.config import conf_files
from train.config.compose import read_command_line
from train.config.fields import list_keys
from train.config.peers import OURS
from train.config.schema import TrainConfig
from train.door import help
from train.door.launch import LOADERS, VERBS, main
from vl2.errors import UserError


def test_overview_names_verbs_and_recipes():
    text = help.overview()
    recipes = conf_files.recipes()
    assert len(recipes) >= 2
    for name, description in recipes.items():
        assert f"  {name} " in text
        assert description.split()[0] in text
    for verb in set(VERBS) - {"train"}:
        assert f"bash launch.sh {verb} " in text
    for group, options in conf_files.groups().items():
        assert f"  {group}= " in text
        assert ", ".join(options) in text


@pytest.mark.parametrize(
    ("verb", "least"),
    [("train", 50), ("dryrun", 50), ("export", 5), ("infer", 10), ("eval", 5), ("serve", 20), ("doctor", 2)],
)
def test_every_key_is_listed(verb, least):
    words = help.verb_help(verb).split()
    text = " ".join(words)
    specs = list_keys(help.SCHEMAS[verb])
    assert len(specs) >= least
    assert set(help.SCHEMAS) == {*LOADERS, "runs", "doctor"}
    for spec in specs:
        assert spec.name in words
        assert " ".join(spec.doc.split()) in text
        assert spec.unit in text


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        ([], "Fine-tunes DeepSeek-VL2 on PaddlePaddle."),
        (["-h"], "Fine-tunes DeepSeek-VL2 on PaddlePaddle."),
        (["--help"], "Fine-tunes DeepSeek-VL2 on PaddlePaddle."),
        (["help", "--help"], "Fine-tunes DeepSeek-VL2 on PaddlePaddle."),
        (["conf=sft_tiny", "--help"], "Training: "),
        (["infer", "-h"], "One answer: "),
        (["config", "--help"], "Fine-tunes DeepSeek-VL2 on PaddlePaddle."),
    ],
)
def test_every_way_to_ask_for_help(arguments, first, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # SIGPIPE stays as the tests have it
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(first)


@pytest.mark.parametrize("arguments", [["help", "train"], ["config", "conf=sft_tiny"]])
def test_a_reader_that_has_enough_ends_it_without_a_word(arguments):
    """`help | head` printed a BrokenPipeError's traceback."""
    code = f"from train.door.launch import main; main({arguments!r})"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == -signal.SIGPIPE


def test_names_of_other_programs_lead_to_ours():
    known = {spec.name for schema in help.SCHEMAS.values() for spec in list_keys(schema)}
    assert set(OURS.values()) <= known
    for theirs, ours in {
        "max_length": "data.max_tokens",
        "learning_rate": "optim.lr",
        "num_train_epochs": "epochs",
        "batch_size": "packs_per_step",
        "gradient_accumulation_steps": "packs_per_step",
        "lora_r": "lora.rank",
        "lora_target": "lora.groups",
        "output_dir": "run_dir",
        "dataset": "data.path",
        "val_size": "data.eval_fraction",
        "interleave_probs": "data.sources",
        "media_dir": "data.image_root",
        "logging_steps": "log_steps",
    }.items():
        with pytest.raises(UserError, match=rf"^unknown key '{theirs}'; did you mean {ours}\?$"):
            read_command_line([f"{theirs}=1"], TrainConfig)


def test_a_line_of_help():
    text = help.verb_help("train")
    assert "  data.max_tiles = 9                      Most local tiles of one image" in text
    assert "[tiles, 1 to 9]" in text
    assert "  data.path = null " in text
    assert "  lora.groups = [attention,experts,shared_experts,dense_mlp]\n" in text
    assert "[cosine|constant]" in text


def test_lines_fit():
    long = [line for verb in help.SCHEMAS for line in help.verb_help(verb).splitlines() if len(line) > 120]
    assert not long


def test_help_of_an_unknown_verb():
    with pytest.raises(ValueError, match=r"no keys for 'infr'; help takes one of .*; did you mean infer\?"):
        help.verb_help("infr")
