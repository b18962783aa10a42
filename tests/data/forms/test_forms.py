"""One conversation in every form: the same messages, the same pictures."""

import base64
import json
from pathlib import Path

import pytest

from data.forms.fields import FieldError
from data.forms.table import FORMS, find_form
from data.images.ref import ImageRef
from data.record import Record, RecordError, parse_record
from data.settings import ReadSettings, SourceSettings
from tests.places import NANO_BPE
from vl2.errors import UserError
from vl2.prompt import Message
from vl2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(NANO_BPE)
CAT = ImageRef(kind="file", name="/pictures/cat.jpg")
DOG = ImageRef(kind="file", name="/pictures/dog.jpg")


def parse(row, found="auto", *, settings=None, **of) -> Record:
    return parse_record(
        row,
        source="a.jsonl",
        row_number=1,
        folder=Path("/pictures"),
        form=found,
        tokenizer=TOKENIZER,
        settings=settings or ReadSettings(),
        of=SourceSettings(path="a.jsonl", **of),
    )


def image_url(name):
    return {"type": "image_url", "image_url": {"url": name}}


def text(content):
    return {"type": "text", "text": content}


SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "A cat."}
QUESTION = {"role": "user", "content": "<image>\nWho?"}
LLAVA = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A cat."}]

# Each says: the system "Be brief.", the user shows cat.jpg and asks "Who?", the answer is "A cat."
SAME = {
    "ours": ("messages", {"messages": [SYSTEM, QUESTION, ANSWER], "images": ["cat.jpg"]}),
    "one image": ("messages", {"messages": [SYSTEM, QUESTION, ANSWER], "image": "cat.jpg"}),
    "system beside it": ("messages", {"system": "Be brief.", "messages": [QUESTION, ANSWER], "images": ["cat.jpg"]}),
    "as JSON in a CSV": (
        "messages",
        {"messages": json.dumps([SYSTEM, QUESTION, ANSWER]), "images": json.dumps(["cat.jpg"]), "objects": ""},
    ),
    "image of datasets": (
        "messages",
        {"messages": [SYSTEM, QUESTION, ANSWER], "images": [{"bytes": None, "path": "cat.jpg"}], "tools": None},
    ),
    "OpenAI": (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [image_url("cat.jpg"), text("Who?")]},
                {"role": "assistant", "content": [text("A cat.")]},
            ]
        },
    ),
    "OpenAI responses": (
        "messages",
        {
            "messages": [
                SYSTEM,
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": "file:///pictures/cat.jpg"},
                        {"type": "input_text", "text": "Who?"},
                    ],
                },
                ANSWER,
            ]
        },
    ),
    "Hugging Face, picture in a column": (
        "messages",
        {
            "messages": [
                {"role": "system", "content": [{"index": None, **text("Be brief.")}]},
                {
                    "role": "user",
                    "content": [{"index": 0, "text": None, "type": "image"}, {"index": None, **text("Who?")}],
                },
                ANSWER,
            ],
            "images": ["cat.jpg"],
        },
    ),
    "Hugging Face, picture in the part": (
        "messages",
        {"messages": [SYSTEM, {"role": "user", "content": [{"type": "image", "path": "cat.jpg"}, "Who?"]}, ANSWER]},
    ),
    "Qwen": (
        "messages",
        {"messages": [SYSTEM, {"role": "user", "content": [{"image": "cat.jpg"}, {"text": "Who?"}]}, ANSWER]},
    ),
    "LLaVA": ("conversations", {"system": "Be brief.", "image": "cat.jpg", "conversations": LLAVA}),
    "LLaVA without its <image>": (
        "conversations",
        {"system": "Be brief.", "image": ["cat.jpg"], "conversations": [{"from": "human", "value": "Who?"}, LLAVA[1]]},
    ),
    "ShareGPT": (
        "conversations",
        {"images": ["cat.jpg"], "conversations": [{"from": "system", "value": "Be brief."}, *LLAVA]},
    ),
    "a list for each key, as datasets.Sequence is stored": (
        "conversations",
        {
            "image": "cat.jpg",
            "system": "Be brief.",
            "conversations": {"from": ["human", "gpt"], "value": ["<image>\nWho?", "A cat."]},
        },
    ),
    "conversations of role and content": (
        "conversations",
        {"images": ["cat.jpg"], "conversations": [SYSTEM, QUESTION, ANSWER]},
    ),
    "DeepSeek-VL2": (
        "deepseek_vl2",
        [
            SYSTEM,
            {"role": "<|User|>", "content": "<image>\nWho?", "images": ["cat.jpg"]},
            {"role": "<|Assistant|>", "content": "A cat."},
        ],
    ),
    "DeepSeek-VL2 in an object": (
        "deepseek_vl2",
        {"conversation": [SYSTEM, {**QUESTION, "role": "<|User|>", "images": ["cat.jpg"]}, ANSWER]},
    ),
    "ms-swift": (
        "query",
        {"system": "Be brief.", "query": "<image>\nWho?", "response": "A cat.", "images": ["cat.jpg"], "history": []},
    ),
    "The Cauldron": (
        "texts",
        {"system": "Be brief.", "texts": [{"user": "Who?", "assistant": "A cat."}], "images": ["cat.jpg"]},
    ),
    "alpaca": (
        "alpaca",
        {"system": "Be brief.", "instruction": "<image>", "input": "Who?", "output": "A cat.", "images": ["cat.jpg"]},
    ),
    "alpaca without input": (
        "alpaca",
        {"system": "Be brief.", "instruction": "Who?", "input": "", "output": "A cat.", "image": "cat.jpg"},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_one_conversation_in_every_form(name):
    form, row = SAME[name]
    assert find_form(row, SourceSettings(path="a.jsonl")) == form
    record = parse(row)
    assert record.messages == (
        Message("system", "Be brief."),
        Message("user", "<image>\nWho?"),
        Message("assistant", "A cat."),
    )
    assert (record.images, record.boxes, record.unknown) == ((CAT,), (), ())
    assert parse(row, form) == parse(row, form=form) == record  # found before, or said by the user


def test_every_form_is_tried():
    assert {form for form, _ in SAME.values()} | {"columns"} == set(FORMS)


COLUMNS = {"user": "question", "assistant": "answer", "image": "picture", "system": "style"}


def test_columns_that_the_user_names():
    row = {"id": 7, "question": "Who?", "answer": 42, "picture": "cat.jpg", "style": "Be brief."}
    record = parse(row, columns=COLUMNS)
    assert [message.content for message in record.messages] == ["Be brief.", "<image>\nWho?", "42"]
    assert (record.images, record.unknown) == ((CAT,), ("id",))
    assert find_form(row, SourceSettings(path="", columns=COLUMNS)) == "columns"
    # Only the pictures' column has another name: the rest is found as ever.
    assert parse({"messages": [QUESTION, ANSWER], "photo": "cat.jpg"}, columns={"image": "photo"}).images == (CAT,)


@pytest.mark.parametrize("form", ["query", "alpaca"])
def test_history_comes_first(form):
    keys = {"query": ("query", "response"), "alpaca": ("instruction", "output")}[form]
    row = dict(zip(keys, ("And she?", "A dog."))) | {"history": [["Who is he?", "A cat."]]}
    record = parse(row | {"images": ["cat.jpg"]})
    contents = ["<image>\nWho is he?", "A cat.", "And she?", "A dog."]
    assert [message.content for message in record.messages] == contents


def test_pictures_of_several_turns_keep_their_order():
    """A row's pictures and those within parts and messages meet in one conversation."""
    parts = [text("Is "), {"type": "image"}, text(" the same as "), image_url("dog.jpg"), text("?")]
    messages = [{"role": "user", "content": parts}, ANSWER, QUESTION, ANSWER]
    record = parse({"messages": messages, "images": ["cat.jpg", "cat.jpg"]})
    assert record.images == (CAT, DOG, CAT)
    assert record.messages[0].content == "Is <image> the same as <image>?"
    by_index = [{"type": "image", "index": 1}, {"type": "image", "index": 0}, text("Which?")]
    record = parse({"messages": [{"role": "user", "content": by_index}, ANSWER], "images": ["cat.jpg", "dog.jpg"]})
    assert (record.images, record.messages[0].content) == ((DOG, CAT), "<image>\n<image>\nWhich?")
    twice = [{"type": "image", "index": 0}, text("or"), {"type": "image", "index": 0}]
    record = parse({"messages": [{"role": "user", "content": twice}, ANSWER], "images": ["cat.jpg"]})
    assert (record.images, record.messages[0].content) == ((CAT, CAT), "<image>\nor<image>")
    last = [text("Who?"), {"type": "image", "base64": base64.b64encode(b"JPEG").decode()}]
    record = parse({"messages": [{"role": "user", "content": last}, ANSWER]})
    assert (record.messages[0].content, record.images[0].data) == ("Who?<image>", b"JPEG")


def test_what_is_learned():
    """`"loss": false` on a message was ignored."""
    turns = [QUESTION, {**ANSWER, "loss": False}, {"role": "user", "content": "a"}, {**ANSWER, "weight": 1}]
    row = {"messages": turns, "images": ["cat.jpg"]}
    assert [message.learn for message in parse(row).messages] == [True, False, True, True]
    chat = {"conversations": [LLAVA[0], {**LLAVA[1], "train": 0}, LLAVA[0], LLAVA[1]], "images": ["cat.jpg", "dog.jpg"]}
    assert [message.learn for message in parse(chat).messages] == [True, False, True, True]
    every = {"messages": [QUESTION, ANSWER, {"role": "user", "content": "a"}, ANSWER], "images": ["cat.jpg"]}
    last = ReadSettings(supervise="last")
    assert [message.learn for message in parse(every, settings=last).messages] == [True, False, True, True]
    with pytest.raises(RecordError, match=r"messages\[3\]: expected an answer to learn from, found none: .*=last"):
        parse({"messages": [*turns[:3], {**ANSWER, "loss": 0}], "images": ["cat.jpg"]}, settings=last)


def test_default_system_message():
    row = {"messages": [QUESTION, ANSWER], "images": ["cat.jpg"]}
    assert parse(row, system="Rhyme.").messages[0] == Message("system", "Rhyme.")
    own = {**row, "messages": [SYSTEM, *row["messages"]]}
    assert parse(own, system="Rhyme.").messages[0] == Message("system", "Be brief.")


def test_form_that_cannot_be_told():
    of = SourceSettings(path="a.jsonl")
    both = {"messages": [QUESTION, ANSWER], "conversations": LLAVA, "images": ["cat.jpg"]}
    with pytest.raises(
        FieldError, match=r"row: .*those of messages and conversations among \['conversations', .*data\.form=NAME"
    ):
        find_form(both, of)
    record = parse(both, form="messages")
    assert record.unknown == ("conversations",)
    assert find_form(both, SourceSettings(path="", form="conversations")) == "conversations"
    none = r"those of none among \['a', 'b'\]\. The forms are messages: .*alpaca: .*columns="
    with pytest.raises(FieldError, match=none):
        find_form({"a": 1, "b": 2}, of)
    with pytest.raises(FieldError, match="those of none among"):
        find_form({"instruction": "A row that lacks its answer decides for no other."}, of)
    # A merged table fills the fields of the other form with null.
    assert find_form({**both, "conversations": None}, of) == "messages"


def test_two_forms_in_one_file():
    """The form of a file is that of its first good row; a row of another form is an error that names both."""
    both = r"a\.jsonl, row 1, row: expected the form messages \(messages of .*found conversations \(conversations of "
    with pytest.raises(RecordError, match=both):
        parse({"conversations": LLAVA, "image": "cat.jpg"}, "messages")
    with pytest.raises(RecordError, match=r"messages: expected a list of messages, found no such key among \['talk'\]"):
        parse({"talk": LLAVA}, form="messages")


def test_two_forms_in_one_row():
    """A later row with a conversation of another form too: it was counted among the unknown fields, and not learned."""
    row = {"query": "What is this?", "response": "A cat.", "id": 7}
    assert parse(row, "query").unknown == ("id",)
    match = r"a\.jsonl, row 1, row: expected the fields of one form, found those of conversations and query among .*"
    with pytest.raises(RecordError, match=match):
        parse({**row, "conversations": LLAVA}, "query")
    assert parse({**row, "conversations": LLAVA}, "query", form="query").unknown == ("id", "conversations")


@pytest.mark.parametrize(
    ("of", "error"),
    [
        ({"form": "llava"}, r"data\.form: expected auto, messages, conversations, .*found 'llava'"),
        ({"columns": {"question": "q"}}, r"data\.columns: expected user, assistant, system, image.*found 'question'"),
        ({"columns": {"user": "q"}}, r"data\.columns: expected the names of both columns, .*found {'user': 'q'}"),
        (
            {"columns": {"user": "q", "assistant": "q"}},
            r"data\.columns: expected a column of its own .*found 'q' twice",
        ),
        ({"form": "columns"}, r"data\.columns: expected the names of both columns, .*found {}"),
    ],
)
def test_settings_that_cannot_be(of, error):
    with pytest.raises(UserError, match=error) as raised:
        parse({"messages": [QUESTION, ANSWER]}, **of)
    assert not isinstance(raised.value, RecordError)  # it is no row's fault: to skip rows would not help


def test_answers_that_are_right_too():
    """As DocVQA and TextVQA have them, for metrics; other fields of that name say nothing."""
    row = {"messages": [QUESTION, ANSWER], "images": ["cat.jpg"], "answers": ["A cat.", "cat"]}
    refuses = ReadSettings(unknown="error")
    for form, own in SAME.values():
        if isinstance(own, dict) and form != "columns":
            assert parse({**own, "answers": ["cat"]}, settings=refuses).answers == ("cat",)
    assert parse({**row, "answers": '["cat"]'}, settings=refuses).answers == ("cat",)  # in a CSV
    assert parse(row) == parse({**row, "answers": []})
    for other in ("cat", "[cat", [{"answer": "cat"}], [1], 3):
        found = parse({**row, "answers": other})
        assert (found.answers, found.unknown) == ((), ("answers",))
    columns = {"user": "question", "assistant": "answers"}
    found = parse({"question": "Who?", "answers": ["cat", "a cat"]}, columns=columns, settings=refuses)
    assert (found.messages[-1].content, found.answers) == ("cat", ("cat", "a cat"))
    with pytest.raises(RecordError, match="answers: expected a string, found a list"):
        parse({"question": "Who?", "answers": [1]}, columns=columns)
