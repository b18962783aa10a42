"""Questions of conversations, their answers counted, and what an evaluation writes."""

import json
import os
import shutil

import pytest

import train.ask.answer as answer
import train.ask.evaluate as entry
from data.dataset import open_dataset
from data.images.reader import DEFAULT_READER
from data.images.ref import ImageRef
from data.record import Record, RecordError
from data.records import Records
from data.settings import ReadSettings, SourceSettings
from train.ask.answer import Answer, answer_all
from train.ask.load import Loaded, load
from train.ask.predictions import check_predictions
from train.ask.questions import Question, permuted, questions_of, score
from train.ask.scores.boxes import BoxScore
from train.config.load import load_config
from train.config.schema import EvaluateConfig, InferConfig
from train.machine.devices import Machine
from train.run.build_data import build_data
from vl2.checkpoint.model_folder import open_folder
from vl2.prompt import Message


@pytest.fixture(scope="module")
def loaded(model_folder) -> Loaded:
    return load(model_folder)


@pytest.fixture(scope="module")
def records(loaded, data_file) -> Records:
    source = SourceSettings(path=str(data_file))
    return open_dataset(
        [source], settings=ReadSettings(), tokenizer=loaded.tokenizer, candidates=loaded.candidates
    ).records


def test_predictions_replace_only_predictions(tmp_path):
    path = tmp_path / "predictions.jsonl"
    check_predictions(path)
    path.write_text('{"expected": "a", "answer": "b", "correct": false}\n')
    check_predictions(path)
    for other in ("mine\n", "[1]\n", '{"messages": []}\n'):
        path.write_text(other)
        with pytest.raises(ValueError, match="no evaluation wrote"):
            check_predictions(path)


def test_a_place_that_may_not_be_written_to_is_said_first(tmp_path, monkeypatch):
    """It was said by the system, after the last answer."""
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    for path in (tmp_path / "predictions.jsonl", tmp_path / "new" / "predictions.jsonl"):
        with pytest.raises(ValueError, match=rf"^out={path}: {tmp_path} may not be written to; give another out="):
            check_predictions(path)


def test_predictions_do_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no evaluation wrote"):
        check_predictions(tmp_path / "pipe")


def test_questions_of_a_conversation_and_their_permutation():
    def record(name: str) -> Record:
        turns = [("user", "<image> A"), ("assistant", " b "), ("user", "<image> C"), ("assistant", "d")]
        messages = tuple(Message(role, text) for role, text in turns)
        images = tuple(ImageRef(kind="file", name=f"{name}{i}") for i in (1, 2))
        return Record(messages=messages, images=images, source="f", row=1)

    asked = [q for name in "xyz" for q in questions_of(record(name), DEFAULT_READER)]
    assert [(len(q.messages), len(q.images), q.expected) for q in asked[:2]] == [(1, 1, "b"), (3, 2, "d")]
    shown = permuted(asked)
    assert [q.images[0].name for q in shown] == ["y1", "y1", "z1", "z1", "x1", "x1"]
    assert [q.expected for q in shown] == [q.expected for q in asked]
    answers = [Answer(text=text, cut=False) for text in ("b", "x", " b\n", "d", "", "d")]
    nothing = [BoxScore(expected=(), found=(), malformed=0, ious=())] * 6
    assert score(["exact_match"], asked, answers, nothing).means == {"exact_match": pytest.approx(4 / 6)}
    assert isinstance(asked[0], Question)


def test_the_best_of_several_right_answers_counts():
    """They belong to the last question of a row."""
    turns = [("user", "A"), ("assistant", "b"), ("user", "C"), ("assistant", "d ")]
    messages = tuple(Message(role, text) for role, text in turns)
    record = Record(messages=messages, images=(), answers=("d", " x"), source="f", row=1)
    first, last = questions_of(record, DEFAULT_READER)
    assert (first.references, last.references) == (("b",), ("d", "x"))
    nothing = [BoxScore(expected=(), found=(), malformed=0, ious=())] * 2
    answers = [Answer(text=text, cut=False) for text in ("x", "x")]
    assert score(["exact_match"], [first, last], answers, nothing).marks == {"exact_match": ((0.0,), (1.0,))}


def test_infer_and_eval_have_one_default_for_the_longest_answer():
    """A finished run said 37.5 % of a model that eval gave 100 %: answers were cut at 8, 32, 128 and 512 tokens."""
    rehearsal = load_config(["conf=sft_tiny"], Machine(gpus=0))
    real = load_config(["conf=sft_tiny", "rehearse=false", "precision=fp32"], Machine(gpus=0))
    assert (rehearsal.rehearsal, real.rehearsal) == (True, False)
    assert EvaluateConfig().max_new_tokens == InferConfig().max_new_tokens
    assert rehearsal.eval.max_new_tokens is real.eval.max_new_tokens is None  # by the answers that are expected


def test_eval_says_how_many_answers_were_cut(model_folder, data_file, tmp_path, capsys):
    out = tmp_path / "predictions.jsonl"
    arguments = [f"model={model_folder}", f"data.path={data_file}", f"out={out}", "limit=2", "max_new_tokens=2"]
    assert entry.main([*arguments, "device=cpu"]) == 0
    printed, said = capsys.readouterr()
    assert json.loads(printed)["cut"] == 2
    assert "note: 2 of 2 answers were cut at max_new_tokens=2" in said
    assert [json.loads(line)["cut"] for line in out.read_text().splitlines()] == [True, True]


def test_conversation_beyond_the_context_is_refused(model_folder, data_file, arguments, tmp_path):
    """The model knows no such positions; the row is named before anything is asked, by eval and by a run."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["language_config"]["max_position_embeddings"] = 400
    (folder / "config.json").write_text(json.dumps(config))
    expected = r"data\.jsonl, row \d+, messages: conversation of \d+ tokens .* at most the 400 that the"
    with pytest.raises(RecordError, match=expected):
        entry.main([f"model={folder}", f"data.path={data_file}", f"out={tmp_path / 'out'}", "device=cpu"])
    settings = arguments(tmp_path / "run", f"model.path={folder}")
    data = build_data(load_config(settings), open_folder(folder))
    assert len(data.dataset.records) == 20  # training may go beyond them
    with pytest.raises(RecordError, match=expected):
        build_data(load_config([*settings, f"data.eval_path={data_file}"]), open_folder(folder))


def test_prompts_answered_together_leave_room_for_their_answers(loaded, monkeypatch):
    """A longer answer needs a larger cache: of 4,096 tokens of short prompts, each with 512 to come, it had 4 GB."""
    batches = []

    def generate(model, prompts, *, max_new_tokens, **options):
        batches.append((sum(len(p["input_ids"]) for p in prompts), sum(max_new_tokens)))
        return [[1]] * len(prompts)

    monkeypatch.setattr(answer, "generate", generate)
    prompts = [{"input_ids": [0] * length} for length in [20] * 100 + [600] * 20]
    assert len(list(answer_all(loaded, prompts, max_new_tokens=512))) == 120
    assert all(a <= answer.BATCH_TOKENS and a + b <= answer.CACHE_TOKENS for a, b in batches)
    assert len(batches) == 7
    groups = answer.answered_together([20] * 100 + [600] * 20, [512] * 120)
    assert [20 * sum(i < 100 for i in g) + 600 * sum(i >= 100 for i in g) for g in groups] == [a for a, _ in batches]
