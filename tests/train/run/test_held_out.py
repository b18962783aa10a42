"""The held-out rows of a run: their losses and answers, alone and shared over ranks."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import train.ask.answer as answer
import train.ask.losses as losses
import train.run.held_out as held_out
from data.images.ref import ImageRef
from data.record import BadRecords, RecordError
from train.ask.losses import RowLosses
from train.config.load import load_config
from train.run.build import open_base
from train.run.build_data import build_data
from train.run.held_out import LONGEST_ANSWER, HeldOut, deal, room_for
from train.run.samples import SampleTable, spread
from train.run.validation import evaluating
from vl2.checkpoint.load import load_model
from vl2.errors import UserError


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def rows(arguments, data_file, model_folder, tmp_path_factory):
    """20 held-out rows in several packs, 8 of which are asked, and a model of random numbers."""
    more = (f"data.eval_path={data_file}", "eval.questions=8", "eval.max_new_tokens=3", "eval.metrics=[anls,box_iou]")
    config = load_config(arguments(tmp_path_factory.mktemp("runs") / "run", *more))
    data = build_data(config, open_base(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "BATCH_TOKENS", 500)
        return HeldOut(config, data, load_model(model_folder))


def test_packs_are_dealt_by_cost():
    assert deal([5, 3, 2, 2], 2) == [[0, 3], [1, 2]]
    assert deal([7], 4) == [[0], [], [], []]
    dealt = deal(np.random.default_rng(0).integers(1, 100, 50).tolist(), 4)
    assert sorted(index for own in dealt for index in own) == list(range(50))


def test_shares_of_ranks_put_together_are_what_one_process_finds(rows, monkeypatch):
    """Bit for bit, three ranks one after the other in this process; each row is computed once."""
    monkeypatch.setattr(answer, "BATCH_TOKENS", 500)
    alone, answers = rows.losses(never), rows.answers(never)
    assert len(alone.sums) == 20 and alone.supervised.sum() == rows.rows.sizes.supervised.sum()
    monkeypatch.setattr(held_out.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(held_out, "gather_rows", lambda rows: rows)
    shares, said = [], []
    for rank in range(3):
        monkeypatch.setattr(held_out.dist, "get_rank", lambda rank=rank: rank)
        shares.append(rows.losses(never))
        monkeypatch.setattr(held_out, "gather_objects", lambda share: said.append(share) or said)
        monkeypatch.setattr(held_out, "score", lambda *_: None)
        monkeypatch.setattr(held_out, "box_scores", lambda *_: None)
        found = rows.answers(never)
    assert np.array_equal(sum(share.sums for share in shares), alone.sums)
    assert all(np.count_nonzero(share.sums) < 20 for share in shares)
    assert found.answers == answers.answers and sum(bool(share["answers"]) for share in said) > 1


def test_answers_are_scored_and_those_that_were_cut_are_counted(rows, monkeypatch):
    """Of a model of random numbers no answer ends, unless one of its tokens is taken for the end."""
    answered = rows.answers(never)
    assert (len(answered.answers), answered.num_cut) == (8, 8)
    assert answered.scores.means.keys() == {"exact_match", "anls"}  # no box is expected
    exchanged = rows.answers(never, exchanged=True)
    assert [q.expected for q in exchanged.questions] == [q.expected for q in answered.questions]
    original = answer.generate

    def generate(*arguments, **options):
        ids = original(*arguments, **options)
        return [ids[0][:-1], *ids[1:]]

    monkeypatch.setattr(answer, "generate", generate)
    assert rows.answers(never).num_cut < 8


def test_whoever_is_asked_to_stop_ends_at_once(rows):
    asked = iter([False, True, True, True])  # after the first pack
    assert rows.losses(lambda: next(asked)) is None
    assert rows.answers(lambda: True) is None


def test_loss_is_the_tokens_mean_in_whatever_order_rows_are_summed():
    found = RowLosses(sums=np.array([1e16, 1.0, -1e16, 3.0]), supervised=np.array([1.0, 2.0, 1.0, 4.0]))
    assert found.mean() == 0.5
    assert found.mean(np.array([False, True, False, True])) == 4 / 6


def test_room_for_answers_is_that_of_the_longest_expected_one(rows):
    """A quarter more, at least 16 tokens, so that a model that is right comes to its end."""
    tokenizer, question = rows.loaded.tokenizer, rows.questions[0]
    short, long, longest = (dataclasses.replace(question, expected="red circle " * n) for n in (1, 100, 5000))
    tokens = [len(tokenizer.encode(each.expected)) for each in (short, long)]
    assert room_for([short], tokenizer) == tokens[0] + 16
    assert room_for([long, short], tokenizer) == tokens[1] + tokens[1] // 4
    assert (room_for([longest], tokenizer), room_for([], tokenizer)) == (LONGEST_ANSWER, 16)


def test_image_that_breaks_after_it_was_measured_names_its_row(rows, tmp_path, monkeypatch):
    (pictured, *_) = [question for question in rows.questions if question.images]
    gone = dataclasses.replace(pictured, images=(ImageRef(kind="file", name=str(tmp_path / "gone.png")),))
    table = SampleTable([gone], rows.loaded.images)
    monkeypatch.setattr(rows, "questions", [gone])
    with pytest.raises(RecordError, match=r"data\.jsonl, row \d+, images: expected an image file, found none at"):
        rows.answers(never)
    assert table._picture(gone) is None


def test_image_that_breaks_is_left_out_where_the_data_says_so(rows, tmp_path, monkeypatch, capsys):
    """It ended the run whatever data.on_bad_record said. One has no header any more, one no pixels; said once."""
    (pictured, *_) = [question for question in rows.questions if question.images]
    whole, half = rows.questions[0], tmp_path / "half.png"
    half.write_bytes(Path(pictured.images[0].name).read_bytes()[:60])
    gone, torn = (
        dataclasses.replace(pictured, images=(ImageRef(kind="file", name=str(place)),) * len(pictured.images))
        for place in (tmp_path / "gone.png", half)
    )
    monkeypatch.setattr(rows, "_bad", BadRecords(on_bad_record="skip", max_bad=2))
    monkeypatch.setattr(rows, "questions", [gone, whole, torn])
    table = SampleTable(rows.questions, rows.loaded.images)
    for _ in range(2):
        answered = rows.answers(never)
        assert answered.questions == [whole] and len(answered.answers) == 1
        assert [row.expected for row in table.rows(answered)] == [whole.expected]
    assert capsys.readouterr().err.count("left out: ") == 2
    monkeypatch.setattr(rows, "_bad", BadRecords(on_bad_record="skip", max_bad=1))
    rows._broken.clear()
    with pytest.raises(UserError, match=r"more than data\.max_bad=1 bad rows"):
        rows.answers(never)


def test_samples_are_spread_and_stay_the_same(rows):
    assert spread(10, 4) == [0, 3, 6, 9] and spread(3, 8) == [0, 1, 2] and spread(0, 8) == []
    table = SampleTable(rows.questions, rows.loaded.images)
    (first, *_), again = table.rows(rows.answers(never)), table.rows(rows.answers(never))
    assert [row.question for row in again] == [question.messages[-1].content for question in rows.questions]
    assert sum(row.picture is not None for row in again) == sum(bool(q.images) for q in rows.questions) > 0
    assert first.picture is again[0].picture  # opened once
    assert first.scores.keys() == {"exact_match", "anls"}


def test_modes_of_the_model_and_random_numbers_stay(rows):
    import random

    import paddle

    model = rows.loaded.model
    model.train()
    paddle.seed(3)
    random.seed(3)
    np.random.seed(3)
    with evaluating(model):
        assert not any(layer.training for layer in model.sublayers())
        rows.losses(never)
        rows.answers(never)
    assert all(layer.training for layer in model.sublayers(include_self=True))
    drawn = float(paddle.rand([1])), random.random(), float(np.random.rand())
    paddle.seed(3)
    random.seed(3)
    np.random.seed(3)
    assert drawn == (float(paddle.rand([1])), random.random(), float(np.random.rand()))
    model.eval()
