"""Runs on several sources, and rows held out of them: what is built, what is measured, what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest

from data.packs import PackDataset
from data.plan import EMPTY_PACK
from tests.train.conftest import write_data
from tests.train.run.test_run import metrics
from tests.train.run.three_sources import NAMES, write_three_sources
from train.config.load import load_config
from train.machine.devices import Machine
from train.run.build import build_base, open_base
from train.run.build_data import build_data
from train.run.training import train
from train.run.watch.curve import losses_by_source
from vl2.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Two files of conversations: 20 of which three have a picture, and 13 of text."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "other").mkdir()
    return {"pictures": write_data(folder), "texts": write_data(folder / "other", rows=13, images=0, seed=7)}


@pytest.fixture
def build(arguments, tmp_path):
    """build("key=value", ...): what a run would learn from; data.path is null unless given."""

    def go(*more):
        config = load_config(arguments(tmp_path / "run", "data.path=null", *more))
        return build_data(config, open_base(config))

    return go


def sources(files, **settings: str) -> str:
    """data.sources of the two files, with further settings of each: texts="repeat:2"."""
    entries = (f"{{path:{path},name:{name},{settings.get(name, '')}}}" for name, path in files.items())
    return f"data.sources=[{','.join(entries)}]".replace(",}", "}")


def rows(data) -> list[tuple[str, int]]:
    """Which rows are trained on."""
    return [(Path(record.source).parent.name, record.row) for record in data.dataset.records]


# ---- what is built


def test_two_sources_are_the_file_of_both(build, files, tmp_path):
    """Taken once each, whether as sources or as paths: the same packs and the same fingerprint."""
    both = tmp_path / "both.jsonl"
    both.write_text(files["pictures"].read_text() + files["texts"].read_text())
    for i in range(3):
        shutil.copy(files["pictures"].parent / f"{i}.png", tmp_path)
    whole = build(f"data.path={both}", "max_steps=9")
    for several in (sources(files), f"data.path=[{files['pictures']},{files['texts']}]"):
        data = build(several, "max_steps=9")
        assert data.plan.packs == whole.plan.packs
        assert data.plan.fingerprint == whole.plan.fingerprint
        messages = [[record.messages for record in dataset.records] for dataset in (data.dataset, whole.dataset)]
        assert messages[0] == messages[1]
    assert whole.sources is None
    assert data.sources.names == (str(files["pictures"]), str(files["texts"]))


def test_repeat_and_limit_reach_the_plan(build, files):
    data = build(sources(files, texts="repeat:2.5", pictures="limit:4"), "max_steps=null", "epochs=2")
    taken = np.bincount([sample for pack in data.plan.packs for sample in pack.samples])
    assert taken.tolist() == [2] * 4 + [5] * 13
    assert data.sources.names == ("pictures", "texts")
    assert data.plan.settings["data.sources"] == "4 rows x 1, 13 rows x 2.5"


def test_a_source_reads_its_rows_its_own_way(build, files, tmp_path):
    """Another form, columns and system message than the other source; what it does not say holds for both."""
    table = tmp_path / "table.csv"
    table.write_text("frage,antwort\nred,blue\n")
    entries = f"{{path:{table},columns:{{user:frage,assistant:antwort}},system:Briefly.}},{{path:{files['texts']}}}"
    data = build(f"data.sources=[{entries}]", "data.system=Be kind.")
    own, other = data.dataset.records[0].messages, data.dataset.records[1].messages
    assert [(message.role, message.content) for message in own] == [
        *(("system", "Briefly."), ("user", "red"), ("assistant", "blue"))
    ]
    assert other[0].content == "Be kind."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"^source empty: expected at least one row that can be used, found none; it is empty$"),
        ('{"messages": 3}\n', r"^source empty: .*; all 1 rows were skipped, the first: .*, row 1, messages: .*3$"),
    ],
)
def test_a_source_without_a_usable_row_is_named(build, files, tmp_path, content, message):
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        build(sources({**files, "empty": tmp_path / "empty.jsonl"}), "data.on_bad_record=skip")


# ---- held-out rows


def test_held_out_rows_are_not_trained_on_and_stay_on_their_side(build, files):
    """Rows were added, and the seed changed: none that was trained on is asked now, and none the other way round."""
    few = build(f"data.path={files['pictures']}", "data.eval_fraction=0.3")
    more = build(sources(files), "data.eval_fraction=0.3", "seed=7")
    sides = []
    for data in (few, more):
        asked = {(Path(record.source).parent.name, record.row) for record in data.questions}
        assert asked.isdisjoint(rows(data))
        assert len(asked) == data.held_out.rows == data.held_out.asked
        sides.append((asked, set(rows(data))))
    assert len(sides[0][0]) + len(sides[0][1]) == 20
    assert len(sides[1][0]) + len(sides[1][1]) == 33
    assert sides[0][0] < sides[1][0]
    assert sides[0][1] < sides[1][1]
    assert few.plan.fingerprint != build(f"data.path={files['pictures']}").plan.fingerprint


def test_eval_rows_caps_what_is_asked(build, files):
    data = build(sources(files), "data.eval_fraction=0.5", "data.eval_rows=3")
    assert (len(data.questions), data.held_out.asked) == (3, 3)
    assert data.held_out.rows > 3
    assert len(rows(data)) == 33 - data.held_out.rows
    capped = build(sources(files), "data.eval_fraction=0.5", "eval.questions=2")
    assert len(capped.questions) == 2
    assert rows(capped) == rows(data)
    unasked = build(sources(files), "data.eval_fraction=0.5", "eval.questions=0")
    assert not unasked.questions
    assert rows(unasked) == rows(data)


def test_what_is_on_both_sides_is_counted(build, files, tmp_path):
    """A held-out file with two rows of the training data, one of them with a picture, and the picture once more."""
    lines = [json.loads(line) for line in files["pictures"].read_text().splitlines()]
    shown = next(line for line in lines if line["images"])
    other = {**shown, "messages": [shown["messages"][0], {"role": "assistant", "content": "something else"}]}
    text = next(line for line in lines if not line["images"])
    path = files["pictures"].parent / "held.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (shown, other, text)))
    data = build(sources(files), f"data.eval_path={path}")
    assert (data.held_out.rows, data.held_out.same_conversations, data.held_out.same_pictures) == (3, 2, 1)
    assert data.held_out.note.startswith("2 conversation(s) and 1 picture(s) of the held-out rows are trained on too")
    apart = build(f"data.path={files['texts']}", f"data.eval_path={path}")
    assert apart.held_out.note == ""
    pictures = build(f"data.path={path}", "data.eval_fraction=0.5")  # one of the two with the picture on each side
    assert pictures.held_out.same_conversations == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.eval_fraction=0.0001"], r"^data\.eval_fraction=0\.0001: none of the 13 rows is held out"),
        (["data.eval_rows=5"], r"^data\.eval_rows: none of the 13 rows is held out, of which about 0\.05 should be"),
    ],
)
def test_an_empty_side_is_refused(build, files, more, message):
    with pytest.raises(UserError, match=message):
        build(f"data.path={files['texts']}", *more)


# ---- what is measured


@pytest.fixture(scope="module")
def mixed(run, files, tmp_path_factory) -> Path:
    """Folder of a run of three steps on both files, the texts twice."""
    run_dir = tmp_path_factory.mktemp("runs") / "mixed"
    settings = ("data.path=null", sources(files, texts="repeat:2"), "max_steps=3", "save_steps=2")
    assert run(run_dir, *settings) == 0
    return run_dir


@pytest.mark.slow
def test_losses_of_sources_add_up_to_the_loss(mixed):
    for line in metrics(mixed):
        assert set(line["loss_of"]) == set(line["supervised_of"]) == {"pictures", "texts"}
        assert sum(line["supervised_of"].values()) == line["supervised"]
        total = sum(line["loss_of"][name] * count for name, count in line["supervised_of"].items())
        assert total / line["supervised"] == pytest.approx(line["loss"], rel=1e-6)
        assert line["loss_of"]["pictures"] != pytest.approx(line["loss_of"]["texts"], rel=1e-4)


def test_loss_of_a_source_is_that_of_its_rows_alone(arguments, files, mixed, tmp_path):
    """The rows of the first step, each by itself in the base model, which is what an adapter begins as.

    1e-5: the other rows of a pack change the order of float32 sums; a row given to the wrong source is off by 1e-2.
    """
    config = load_config(arguments(tmp_path / "run", "data.path=null", sources(files, texts="repeat:2"), "max_steps=3"))
    folder = open_base(config)
    data, model = build_data(config, folder), build_base(config, folder)
    samples = [sample for pack in data.plan.step(0) for sample in pack.samples]
    tiles = data.dataset.sizes.tiles
    alone = [replace(EMPTY_PACK, samples=(sample,), tiles=int(tiles[sample])) for sample in samples]
    plan = replace(data.plan, packs=tuple(alone), packs_per_step=len(alone), steps_per_epoch=(1,))
    packs = PackDataset(data.dataset.records, plan, data.dataset.sizes, data.tokenizer, data.candidates)
    totals = {name: [0.0, 0] for name in data.sources.names}
    with paddle.no_grad():
        for i, sample in enumerate(samples):
            loss, count = model.loss(packs[i])
            total = totals[data.sources.names[data.dataset.source_of[sample]]]
            total[0], total[1] = total[0] + float(loss), total[1] + count
    first = metrics(mixed)[0]
    assert first["loss_of"] == pytest.approx({name: loss / count for name, (loss, count) in totals.items()}, abs=1e-5)
    assert first["supervised_of"] == {name: count for name, (_, count) in totals.items()}


def test_losses_of_sources_are_summed_up(mixed):
    summary = json.loads((mixed / "summary.json").read_text())
    assert set(summary["loss_of"]) == {"pictures", "texts"}
    first, last = summary["loss_of"]["texts"]
    assert last < first


@pytest.mark.slow
def test_one_source_has_no_losses_of_sources(whole):
    assert not [key for line in metrics(whole) for key in line if key in ("loss_of", "supervised_of")]
    assert json.loads((whole / "summary.json").read_text())["loss_of"] == {}


@pytest.mark.slow
def test_a_mixture_goes_on_where_it_stopped_and_nowhere_else(run, files, mixed, tmp_path):
    """From step 2: the same third step, bit for bit; under other repeats it is refused in words."""
    run_dir = tmp_path / "run"
    shutil.copytree(mixed, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-000003")
    settings = ("data.path=null", "max_steps=3", "save_steps=2", "resume=auto")
    with pytest.raises(UserError, match=r"data\.sources: it was 20 rows x 1, 13 rows x 2, now it is 20 .* 13 rows x 3"):
        run(run_dir, sources(files, texts="repeat:3"), *settings)
    assert run(run_dir, sources(files, texts="repeat:2"), *settings) == 0
    for before, again in zip(metrics(mixed), metrics(run_dir), strict=True):
        assert (again["loss"], again["loss_of"]) == (before["loss"], before["loss_of"])


@pytest.mark.slow
def test_nano_learns_from_three_sources_in_three_forms(tmp_path):
    """Photographs in a Parquet table with columns of its own, drawn shapes as LLaVA tells them, text as alpaca does."""
    sources = write_three_sources(tmp_path, rows=24)
    (tmp_path / "mine.yaml").write_text(f"defaults: [sft_tiny, _self_]\ndata:\n  sources: {sources}\n")
    small = ("max_steps=16", "data.max_tokens=1400", "data.workers=0", "log=[]", "data.eval_fraction=0.1")
    config = load_config([f"conf={tmp_path / 'mine.yaml'}", f"run_dir={tmp_path / 'run'}", *small], Machine(gpus=0))
    assert train(config, validate=False) == 0
    lines = metrics(tmp_path / "run")
    learned = {name: [line["loss_of"][name] for line in lines if name in line["loss_of"]] for name in NAMES}
    for name, losses in learned.items():
        assert len(losses) >= 8, name
        assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3]), name
    assert set(losses_by_source(lines)) == set(NAMES)
    assert (tmp_path / "run" / "curve.png").is_file()
