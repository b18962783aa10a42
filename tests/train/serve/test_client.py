"""The official client of OpenAI against a service on nano."""

import openai
import pytest


@pytest.fixture(scope="module")
def client(service):
    return openai.OpenAI(base_url=service.api, api_key="none", max_retries=0)


@pytest.mark.slow
def test_a_question(client):
    assert [model.id for model in client.models.list()] == ["nano"]
    messages = [{"role": "user", "content": "What is a red circle?"}]
    found = client.chat.completions.create(model="nano", messages=messages, max_tokens=20)
    (choice,) = found.choices
    assert choice.message.content and choice.finish_reason == "stop"
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    streamed = client.chat.completions.create(model="nano", messages=messages, max_tokens=20, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == choice.message.content
