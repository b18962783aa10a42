"""The official client of OpenAI against a service on nano."""

import random
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.train.serve.conftest import RAMBLING, data_uri, picture, shown, user

pytestmark = pytest.mark.slow
PICTURES = [data_uri(picture(colour)) for colour in ("red", "blue", "green")]


@pytest.fixture(scope="module")
def client(service):
    return openai.OpenAI(base_url=service.api, api_key="none", max_retries=0)


def ask(client, *parts, model="nano", **options):
    options = {"max_tokens": 20, **options}
    return client.chat.completions.create(model=model, messages=[user(*parts)], **options)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["nano", "cats", "dogs"]
    assert client.models.retrieve("dogs").owned_by == "deepseek-vl2-finetune"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("mice")


def test_text_one_picture_and_three_are_answered_as_infer_does(client, infer_says):
    for prompt, pictures in (("What is this?", []), ("What is this?", PICTURES[:1]), ("Which is red?", PICTURES)):
        expected = infer_says("nano", prompt, tuple(pictures), max_new_tokens=20)
        found = ask(client, *map(shown, pictures), prompt)
        (choice,) = found.choices
        assert (choice.message.content, choice.finish_reason) == (
            expected["text"],
            "length" if expected["cut"] else "stop",
        )
        usage = found.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (expected["prompt_tokens"], len(expected["ids"]))
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_file_of_the_folder_is_the_picture(client, infer_says, media):
    expected = infer_says("nano", "What is this?", (str(media / "red.png"),), max_new_tokens=20)
    found = ask(client, shown(f"file://{media}/red.png"), "What is this?")
    assert found.choices[0].message.content == expected["text"]


def test_boxes_come_in_pixels(client, infer_says):
    expected = infer_says("nano", RAMBLING, (PICTURES[0],), max_new_tokens=40)
    assert expected["boxes"] and expected["boxes"][0]["image"] == 1
    message = ask(client, shown(PICTURES[0]), RAMBLING, max_tokens=40).choices[0].message
    assert message.boxes == expected["boxes"]
    *_, last = ask(client, shown(PICTURES[0]), RAMBLING, max_tokens=40, stream=True)
    assert last.choices[0].delta.boxes == expected["boxes"] and last.choices[0].finish_reason == "stop"


def test_an_answer_goes_back_as_it_came(client):
    """Its fields beside the text are those that the client was given."""
    first = ask(client, shown(PICTURES[0]), RAMBLING, max_tokens=40).choices[0].message
    messages = [
        {"role": "system", "content": "Be brief."},
        user(shown(PICTURES[0]), RAMBLING),
        first,
        user("And now?"),
    ]
    found = client.chat.completions.create(model="nano", messages=messages, max_tokens=5, user="me", temperature=None)
    assert found.choices[0].finish_reason in ("stop", "length")


def test_a_stream_is_the_answer_piece_by_piece(client, infer_says):
    expected = infer_says("nano", RAMBLING, max_new_tokens=25)
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 25}
    *chunks, last = ask(client, RAMBLING, **options)
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(texts) == expected["text"] and len(texts) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert last.choices == [] and last.usage.completion_tokens == len(expected["ids"]) == 25
    assert {chunk.id for chunk in chunks} == {last.id}


def test_sampling_is_a_function_of_the_seed(client, infer_says):
    options = {"temperature": 1.8, "top_p": 0.9, "seed": 7}
    expected = infer_says("nano", "What is this?", max_new_tokens=30, **options)
    assert len(expected["ids"]) > 5
    for _ in range(2):
        assert ask(client, "What is this?", max_tokens=30, **options).choices[0].message.content == expected["text"]


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_words_end_an_answer_wherever_tokens_end(client, infer_says, streamed):
    whole = infer_says("nano", RAMBLING, (PICTURES[0],), max_new_tokens=30)["text"]
    for start, length in ((8, 3), (15, 12), (len(whole) - 5, 2)):
        stop = whole[start : start + length]
        found = ask(client, shown(PICTURES[0]), RAMBLING, stop=[stop, "never"], max_tokens=30, stream=streamed)
        if streamed:
            chunks = [chunk.choices[0] for chunk in found]
            text, reason = "".join(choice.delta.content or "" for choice in chunks), chunks[-1].finish_reason
        else:
            text, reason = found.choices[0].message.content, found.choices[0].finish_reason
        assert (text, reason) == (whole[: whole.index(stop)], "stop"), stop


def test_adapters_answer_by_name(client, infer_says):
    said = {}
    for model in ("nano", "cats", "dogs", "nano"):
        expected = infer_says(model, RAMBLING, (), max_new_tokens=12)
        found = ask(client, RAMBLING, model=model, max_tokens=12)
        assert found.choices[0].message.content == expected["text"] and found.model == model
        said[model] = expected["text"]
    assert len(set(said.values())) == 3  # the adapters change the answers at all


def test_mixed_requests_of_many_clients_are_answered_as_infer_does_one_by_one(client, infer_says):
    draw = random.Random(0)
    requests = []
    for i in range(24):
        pictures = [draw.choice(PICTURES) for _ in range((0, 0, 0, 1, 0, 0, 0, 3)[i % 8])]
        options = {"temperature": 1.5, "seed": i} if i % 3 == 0 else {}
        prompt = draw.choice(("What is this?", RAMBLING, "Is there a red circle?"))
        requests.append((draw.choice(("nano", "nano", "cats", "dogs")), prompt, tuple(pictures), options))

    def one(request):
        model, prompt, pictures, options = request
        found = ask(client, *map(shown, pictures), prompt, model=model, max_tokens=24, **options)
        return found.choices[0].message.content, found.usage.completion_tokens

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(one, requests))
    for (model, prompt, pictures, options), answer in zip(requests, answers):
        expected = infer_says(model, prompt, pictures, max_new_tokens=24, **options)
        assert answer == (expected["text"], len(expected["ids"])), (model, prompt, options)


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, "Hi", model="mice")
    assert caught.value.code == "model_not_found" and "'mice'" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "Hi", logit_bias={"5": 100})
    assert caught.value.param == "logit_bias"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "Hi", extra_body={"top_k": 5})
    assert (caught.value.param, caught.value.code) == ("top_k", "unknown_parameter")
