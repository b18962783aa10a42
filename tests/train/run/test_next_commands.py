"""What a run says can be typed next is what the command line reads."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from data.images.ref import ImageRef
from data.record import Record
from train.config.load import load_export_config, load_infer_config
from train.run.next_commands import next_commands
from vl2.prompt import Message


def record(*turns: tuple[str, str], images: int = 0) -> Record:
    names = [str(Path.cwd() / "it's a folder" / f"{i}.png") for i in range(images)]
    paths = tuple(ImageRef(kind="file", name=name) for name in names)
    return Record(messages=tuple(Message(*turn) for turn in turns), images=paths, source="a.jsonl", row=1)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_commands_are_read_as_they_are_meant():
    asked = record(("user", '<image>\nWhat\'s "this", $HOME?'), ("assistant", "A cat."), images=1)
    export, infer = (shlex.split(line) for line in next_commands("outputs/my run", [asked]).splitlines())
    assert export[:3] == ["bash", "launch.sh", "export"] and infer[:3] == ["bash", "launch.sh", "infer"]
    assert load_export_config(export[3:]).run == "outputs/my run"
    config = load_infer_config(infer[3:])
    assert (config.model, config.image) == ("outputs/my run", ["it's a folder/0.png"])
    assert config.prompt == 'What\'s "this", $HOME?'


def test_a_mark_in_the_middle_stays():
    asked = record(("user", "Is <image> red?"), ("assistant", "No."), images=1)
    assert "'prompt=Is <image> red?'" in next_commands("run", [asked])


def test_a_short_question_about_one_picture_is_taken_or_none():
    """Without a system message too, which `prompt=` does not give."""
    others = [
        record(("system", "Be brief."), ("user", "<image>\nfirst?"), ("assistant", "No."), images=1),
        record(("user", "second, without a picture?"), ("assistant", "No.")),
        record(("user", "<image> <image> third?"), ("assistant", "No."), images=2),
        record(("user", "<image>" + "long " * 99), ("assistant", "No."), images=1),
        record(("user", "<image>several\nlines"), ("assistant", "No."), images=1),
    ]
    assert next_commands("run", others) == "  bash launch.sh export run=run"
    good = record(("user", "<image>good?"), ("assistant", "Yes."), images=1)
    assert "prompt=good?" in next_commands("run", [*others, good])


def test_a_picture_that_lies_in_the_table_cannot_be_typed():
    """`infer 'image=bytes (18141 bytes)'` was printed as what can be typed."""

    def shown(**image) -> str:
        asked = record(("user", "<image>\nWhat?"), ("assistant", "A cat."), images=1)
        return next_commands("run", [dataclasses.replace(asked, images=(ImageRef(**image),))])

    assert "infer" not in shown(kind="bytes", name="bytes (18141 bytes)", data=b"x")
    assert "image=https://example.org/cat.jpg" in shown(kind="url", name="https://example.org/cat.jpg")


def test_not_every_row_is_read_for_an_example():
    """Of a million rows of text each was read and parsed at the end of the run."""
    read = []

    def rows():
        for i in range(10_000):
            read.append(i)
            yield record(("user", "What?"), ("assistant", "A cat."))

    assert "infer" not in next_commands("run", rows())
    assert len(read) <= 200
