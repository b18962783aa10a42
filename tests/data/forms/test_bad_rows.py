"""Rows that cannot be used, in each form, and fields that would change the meaning: refused by name, none dropped."""

from pathlib import Path

import pytest

from data.record import Record, RecordError, parse_record
from data.settings import ReadSettings, SourceSettings
from tests.places import NANO_BPE
from vl2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(NANO_BPE)
COLUMNS = {"user": "q", "assistant": "a", "image": "p"}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}


def parse(row, *, form="auto", unknown="report", columns=None) -> Record:
    return parse_record(
        row,
        source="a.jsonl",
        row_number=3,
        folder=Path("/pictures"),
        form=form,
        tokenizer=TOKENIZER,
        settings=ReadSettings(unknown=unknown),
        of=SourceSettings(path="a.jsonl", columns=columns or {}),
    )


def refused(row, match, **how):
    with pytest.raises(RecordError, match=r"^a\.jsonl, row 3, " + match) as raised:
        parse(row, **how)
    assert len(str(raised.value)) < 2000 and "\n" not in str(raised.value)


MESSAGES = [
    ({"messages": None}, r"messages: expected a list of messages, found nothing \(null\)"),
    ({"messages": {"role": "user"}}, r"messages: expected a list of messages, found an object"),
    ({"messages": '[{"role": "user", '}, r"messages: expected JSON \(Expecting property name.*found '\[\{\"role"),
    ({"messages": "[" * 9999}, r"messages: expected JSON \(nested too deeply.*found '\[+\.\.\.\[+'$"),
    ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\]\.content: expected a string .*found nothing"),
    ({"messages": [USER, {**ANSWER, "role": "tool"}]}, r"messages\[1\]\.role: expected system, user or assistant, fo"),
    ({"messages": [{**USER, "content": []}, ANSWER]}, r"messages\[0\]\.content: .*found an empty list"),
    ({"messages": [USER]}, r"messages: expected an assistant message, found none"),
    ({"messages": [USER], "system": "Be brief."}, r"messages: expected an assistant message, found none"),
    ({"messages": [USER, ANSWER], "system": 3.5}, r"system: expected a string, found the number 3\.5"),
    (
        {"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"},
        r"system: found a second system message",
    ),
    ({"messages": [USER, ANSWER], "images": "[1"}, r"images: expected JSON"),
    ({"messages": [{**USER, "images": ["a.png"]}, ANSWER]}, r"messages\[0\]\.images: .*1 picture for 0 <image>; write"),
]
PARTS = [
    ([3], r"messages\[0\]\.content\[0\]: expected a part with its type, text or image, found the number 3"),
    ([{"type": "video", "video": "a.mp4"}], r"messages\[0\]\.content\[0\]\.type: expected text, image .*found 'video'"),
    ([{"type": "text"}], r"messages\[0\]\.content\[0\]\.text: expected a string, found nothing"),
    (
        [{"type": "text", "text": "a", "audio": "a.wav"}],
        r"messages\[0\]\.content\[0\]\.audio: found 'a.wav', .*no picture",
    ),
    (
        [{"type": "image_url", "image_url": {"detail": "low"}}],
        r"messages\[0\]\.content\[0\]\.image_url\.url: expected an",
    ),
    ([{"type": "image", "index": "x"}], r"messages\[0\]\.content\[0\]\.index: expected the number of a picture"),
    (
        [{"type": "image", "url": "a", "path": "b"}],
        r"messages\[0\]\.content\[0\]\.url: expected one of .*found path too",
    ),
    ([{"type": "image"}, "Who?"], r"images: expected one picture for each <image> .*found 0 pictures for 1 <image>"),
    ([{"type": "image", "base64": "&&&"}], r"messages\[0\]\.content\[0\]\.base64: expected the base64 of a data URI"),
]
CONVERSATIONS = [
    ({"conversations": "Hi"}, r"conversations: expected a list of turns, found a string"),
    ({"conversations": []}, r"conversations: expected a list of turns, found an empty list"),
    ({"conversations": ["Hi"]}, r"conversations\[0\]: expected an object with from and value, found a string"),
    ({"conversations": [{"value": "Hi"}, GPT]}, r"conversations\[0\]\.from: expected system, human or gpt, found None"),
    ({"conversations": [{**HUMAN, "from": "observation"}, GPT]}, r"conversations\[0\]\.from: .*found 'observation'"),
    ({"conversations": [HUMAN, {"from": "gpt"}]}, r"conversations\[1\]\.value: expected a string, found nothing"),
    (
        {"conversations": [{**HUMAN, "value": 3}, GPT]},
        r"conversations\[0\]\.value: expected a string, found the number",
    ),
    ({"conversations": [HUMAN]}, r"conversations: expected an assistant message, found none"),
    ({"conversations": [HUMAN, GPT, HUMAN]}, r"conversations\[2\]\.role: expected the last message to be an answer"),
    ({"conversations": [HUMAN, GPT], "image": 3}, r"image: expected a picture's path, .*found the int 3"),
    ({"conversations": [{**HUMAN, "value": "<image><image>"}, GPT], "image": "a"}, r"image: .*1 picture for 2 <image>"),
    (
        {"conversations": [HUMAN, {**GPT, "value": "<image>"}], "image": "a"},
        r"conversations\[1\]\.value: found <image>",
    ),
]
OTHERS = [
    ([], r"row: expected a JSON object with messages and images, found an empty list"),
    ([{"content": "Hi"}], r"row\[0\]\.role: expected system, user or assistant, found None"),
    ([{"role": "<|User|>", "content": "Hi"}], r"row: expected an assistant message, found none"),
    ([{"role": "<|User|>", "content": "<image>"}, ANSWER], r"images: .*found 0 pictures for 1 <image>$"),
    ({"conversation": "Hi"}, r"conversation: expected a list of messages, found a string"),
    ({"query": "Hi"}, r"response: expected a string, found no such field among \['query'\]"),
    ({"query": "", "response": "Hello"}, r"query: expected a string, found an empty string"),
    ({"query": "Hi", "response": ["a", "b"]}, r"response: expected a string, found a list"),
    ({"query": "Hi", "response": "a", "history": [["a"]]}, r"history\[0\]: expected a pair of texts.*found \['a'\]"),
    ({"query": "Hi", "response": "a", "history": {"a": 1}}, r"history: expected a list of pairs .*found an object"),
    ({"query": "Hi", "response": " "}, r"response: expected an answer, found an empty text"),
    ({"instruction": "Hi"}, r"output: expected a string, found no such field among \['instruction'\]"),
    ({"instruction": "Hi", "output": True}, r"output: expected a string, found a boolean"),
    ({"instruction": "Hi", "input": ["a"], "output": "b"}, r"input: expected a string, found a list"),
]
TEXTS = [
    ({"texts": []}, r"texts: expected a list of pairs, found an empty list"),
    ({"texts": "Hi"}, r"texts: expected a list of pairs, found a string"),
    ({"texts": ["Hi"]}, r"texts\[0\]: expected an object with user and assistant, found a string"),
    ({"texts": [{"user": "Hi"}]}, r"texts\[0\]\.assistant: expected a string, found no such field among \['user'\]"),
    ({"texts": [{"user": "Hi", "assistant": "a", "tools": 1}]}, r"texts\[0\]\.tools: found 1, which is not read"),
]
NAMED = [
    ({"q": "Hi"}, r"a: expected a string, found no such field among \['q'\]"),
    ({"q": None, "a": "b"}, r"q: expected a string, found nothing \(null\)"),
    ({"q": "Hi", "a": 0.5}, r"a: expected a string, found the number 0\.5"),
    ({"q": "Hi", "a": "b", "images": ["c.png"]}, r"images: found \['c\.png'\], which is not read: it seems to name"),
]


@pytest.mark.parametrize(("row", "match"), MESSAGES + CONVERSATIONS + OTHERS + TEXTS)
def test_bad_row(row, match):
    refused(row, match)


@pytest.mark.parametrize(("parts", "match"), PARTS)
def test_bad_part(parts, match):
    refused({"messages": [{"role": "user", "content": parts}, ANSWER]}, match)


@pytest.mark.parametrize(("row", "match"), NAMED)
def test_bad_row_of_named_columns(row, match):
    refused(row, match, columns=COLUMNS)


MEANINGFUL = [
    *("chosen", "rejected", "rejected_response", "rejected_images", "rejected_messages", "kto_tag", "margin", "label"),
    *("tools", "functions", "tool_calls", "videos", "video", "audios", "audio", "channel", "history", "weight", "loss"),
    *("image_path", "picture", "thinking", "loss_scale", "bbox", "boxes"),
]


@pytest.mark.parametrize("key", MEANINGFUL)
def test_field_that_would_change_the_meaning(key):
    """`rejected_response` was ignored, and the row trained all the same."""
    row = {"messages": [USER, ANSWER]}
    refused({**row, key: "x" * 100_000}, rf"{key}: found 'x{{40,60}}\.\.\.x{{40,60}}', which is not read: it ")
    refused({**row, key: 0}, rf"{key}: found 0, which is not read: it ")
    for nothing in (None, "", [], {}):  # a table has the column, this row has nothing in it
        assert parse({**row, key: nothing}).unknown == ()


@pytest.mark.parametrize("key", ["Label", "Images", "Rejected_Response"])
def test_field_is_refused_however_it_is_written(key):
    """Tables of the hub have columns such as Image and Label: the pictures were left out, and the text learned."""
    refused({"messages": [USER, ANSWER], key: ["a.png"]}, rf"{key}: found \['a\.png'\], which is not read: it ")


def test_weight_of_one_says_what_is_done_anyway():
    assert parse({"messages": [USER, ANSWER], "weight": 1.0, "loss": True}).unknown == ()


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "audio", "reasoning_content", "train_detail"])
def test_field_of_a_message_that_would_change_the_meaning(key):
    refused({"messages": [USER, {**ANSWER, key: [1]}]}, rf"messages\[1\]\.{key}: found \[1\], which is not read: it ")
    refused({"conversations": [HUMAN, {**GPT, key: [1]}]}, rf"conversations\[1\]\.{key}: found \[1\], which is not ")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"loss": 0.5}, r"messages\[1\]\.loss: expected true or false \(1 or 0\), found 0\.5"),
        ({"weight": 2}, r"messages\[1\]\.weight: expected true or false \(1 or 0\), found 2"),
        ({"train": "no"}, r"messages\[1\]\.train: expected true or false \(1 or 0\), found 'no'"),
        ({"loss": float("nan")}, r"messages\[1\]\.loss: expected true or false \(1 or 0\), found nan"),
        ({"loss": True, "weight": 0}, r"messages\[1\]\.weight: found 0, and another field .* says the contrary"),
        ({"loss": False}, r"messages\[1\]: expected an answer to learn from, found none"),
    ],
)
def test_whether_an_answer_is_learned_must_be_clear(fields, match):
    refused({"messages": [USER, {**ANSWER, **fields}]}, match)


def test_questions_are_not_learned():
    refused(
        {"messages": [{**USER, "loss": True}, ANSWER]}, r"messages\[0\]\.loss: found True in a message of user, exp"
    )
    assert parse({"messages": [{**USER, "loss": False}, ANSWER]}).messages[0].content == "Hi"


def test_unknown_fields_are_named():
    """They change nothing, are counted and reported, or refused if the user wishes."""
    parts = [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]
    row = {
        "id": 0,
        "source": "web",
        "empty": None,
        "messages": [{**USER, "content": parts}, {**ANSWER, "name": "bot", "id": 1}],
    }
    names = ("messages[].content[].cache_control", "messages[].name", "messages[].id", "id", "source")
    assert parse(row).unknown == names
    refused(
        row,
        r"messages\[\]\.content\[\]\.cache_control: found a field that is not read \(data\.unknown=error\)",
        unknown="error",
    )
    assert parse({"messages": [USER, ANSWER], "id": ""}, unknown="error").unknown == ()
    assert len(parse({"messages": [USER, ANSWER], "k" * 100_000: 1}).unknown[0]) == 100
