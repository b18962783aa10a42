"""How the service starts, and refuses to; how it ends while requests are under way."""

import contextlib
import http.client
import json
import signal
import socket
import threading
from urllib.parse import urlsplit

import pytest

from tests.train.provenance import provenance
from tests.train.serve.conftest import RAMBLING, ready, start, user
from train.ask.answer import prepare
from train.ask.load import Loaded, load, load_beside
from train.ask.model_memory import cached_numbers
from train.ask.source import Source
from train.config.schema import NANO
from train.machine.memory import FreeMemory
from train.serve.models import Served, warn_of_memory
from train.serve.service import listen, main, read_key
from vl2.batch import Batch, Growing
from vl2.cache import ROOM, SLOTS
from vl2.errors import UserError
from vl2.prompt import Message

KEY = "a-key-of-our-own"


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("train.serve.service.load_models", lambda config: pytest.fail("loaded"))
    with listen("127.0.0.1", 0) as place:
        place.listen()
        port = place.getsockname()[1]
        with pytest.raises(
            UserError, match=f"^cannot listen at host=127.0.0.1 port={port}: Address already in use; give"
        ):
            main([f"model={NANO}", f"port={port}", "device=cpu"])
    with pytest.raises(UserError, match=r"^cannot listen at host=192.0.2.1 port=\d+: Cannot assign requested address"):
        main([f"model={NANO}", "host=192.0.2.1", "device=cpu"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        (b"", "expected one key .*, found 0 characters"),
        (b"two keys\n", "expected one key"),
        (b"one\ntwo\n", "expected one key"),
        ("schlüssel".encode(), "expected a key of ASCII characters"),
        (b"x" * 5000, "expected one key .* found 5000 characters"),
    ],
)
def test_a_file_without_a_key(tmp_path, content, problem):
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^api_key_file={file}: {problem}"):
        main([f"model={NANO}", f"api_key_file={file}", "device=cpu"])
    file.write_text(f" {KEY}\n")
    assert read_key(str(file)) == KEY


@pytest.mark.parametrize("given", ["two keys", "schlüssel", "x" * 5000])
def test_a_key_that_no_header_can_hold(given):
    """A key in a file was looked at, and one that was typed was not: nobody could have given it."""
    with pytest.raises(UserError, match=rf"^api_key: expected one key of 1 to 4096 .*, found {len(given)} characters$"):
        main([f"model={NANO}", f"api_key={given}", "device=cpu"])


def test_more_tokens_than_memory_are_said(capsys):
    served = {"nano": Served(name="nano", loaded=load(NANO), switch=None, adapter=None)}
    warn_of_memory(served, 1000, FreeMemory(num_bytes=10**9, where="RAM"))
    assert not capsys.readouterr().err
    warn_of_memory(served, 10**9, FreeMemory(num_bytes=10**9, where="RAM"))
    said = capsys.readouterr().err
    fits = int(said.rpartition("max_batch_tokens=")[2].split()[0])
    language = served["nano"].loaded.model.config.language
    assert fits == 10**9 // (2 * 4 * cached_numbers(language)) and "1.00 GB are available (RAM)" in said


@pytest.mark.slow
def test_what_is_kept_of_a_token_is_counted(golden_folder):
    for family in ("nano_tiny", "nano_small"):  # MHA, MLA
        loaded = load(golden_folder(family))
        batch = Batch(loaded.model, eos_id=-1, chunk=64)
        prompt = prepare([Message(role="user", content="a " * 60)], [], loaded)
        assert len(prompt["input_ids"]) < ROOM
        batch.add(growing := Growing(prompt, limit=9, temperature=0.0, top_p=1.0, seed=(0, 0)))
        while len(growing.ids) < 2:
            batch.step()
        assert batch.num_bytes == SLOTS * ROOM * 4 * cached_numbers(loaded.model.config.language)


def test_what_cannot_be_served(tmp_path, adapters):
    with pytest.raises(UserError, match=r"^media_root=.*none: no such folder"):
        main([f"model={NANO}", f"media_root={tmp_path}/none", "device=cpu"])
    with pytest.raises(UserError, match=r"^adapters\.nano: nano is what the model is called"):
        main([f"model={NANO}", f"adapters.nano={adapters['cats']}", "port=0", "device=cpu"])
    with pytest.raises(UserError, match=r"^adapters\.x: .*none: no such folder"):
        main([f"model={NANO}", f"adapters.x={tmp_path}/none", "port=0", "device=cpu"])


def test_an_adapter_of_another_base(tmp_path):
    from vl2.adapter.folder import save_adapter
    from vl2.lora import apply_lora
    from vl2.lora_settings import LoRASettings

    lora = apply_lora(load(NANO).model, LoRASettings(groups=("attention",), rank=2))
    save_adapter(lora, tmp_path, provenance(NANO, base_fingerprint="0" * 64))
    with pytest.raises(UserError, match=r"^adapters\.cats: .*this adapter was trained on another base model"):
        main([f"model={NANO}", f"adapters.cats={tmp_path}", "port=0", "device=cpu"])


def test_an_adapter_beside_trained_weights():
    """Their base is in its folder, and would let the adapter pass; what is in memory is another model."""
    trained = Source(kind="weights", base=NANO, trained=NANO)
    with pytest.raises(UserError, match=r"^cats: an adapter goes on the model that it was trained on, found the tr"):
        load_beside(Loaded(source=trained, model=None, tokenizer=None, candidates=()), "cats")


@pytest.mark.slow
def test_the_end_lets_running_answers_end_and_takes_no_new_ones(tmp_path):
    file = tmp_path / "key"
    file.write_text(KEY)
    service = ready(start(f"model={NANO}", f"api_key_file={file}", "deadline=120"))
    place = urlsplit(service.url).netloc
    ask = {"model": "nano", "messages": [user(RAMBLING)], "max_tokens": 1500, "stream": True}

    def post(key=KEY):
        connection = http.client.HTTPConnection(place, timeout=120)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request("POST", "/v1/chat/completions", json.dumps(ask), headers)
        return connection.getresponse()

    for wrong in ("", "a-key", KEY + "x", "\u00e9"):
        refused = post(wrong)
        assert refused.status == 401 and json.loads(refused.read())["error"]["type"] == "authentication_error"
    running = post()
    assert running.status == 200 and running.read(6) == b"data: "
    service.process.send_signal(signal.SIGTERM)
    assert "ending: 1 requests are under way" in service.process.stderr.readline()
    late = post()
    assert late.status == 503 and late.headers["Retry-After"]
    assert json.loads(late.read())["error"]["code"] == "ending"
    *_, last, done, empty = running.read().decode().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
    assert (done, empty) == ("data: [DONE]", "")
    assert service.process.wait(60) == 0
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((place.split(":")[0], int(place.split(":")[1])), timeout=5)


@pytest.mark.slow
def test_more_than_may_wait_are_told_when_to_come_again():
    service = ready(start(f"model={NANO}", "max_waiting=1", "max_batch_tokens=64"))
    place, found = urlsplit(service.url).netloc, []

    def post():
        connection = http.client.HTTPConnection(place, timeout=120)
        body = json.dumps({"model": "nano", "messages": [user(RAMBLING)], "max_tokens": 200})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found.append((answer.status, answer.headers["Retry-After"]))
        answer.read()

    threads = [threading.Thread(target=post) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _ in found} == {200, 429}
    assert all(retry for status, retry in found if status == 429)
    # It ends beside a client that reads nothing of thousands of answers; their sending held it open for ever.
    unread = socket.create_connection((place.split(":")[0], int(place.split(":")[1])), timeout=60)
    unread.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        unread.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20_000)
    service.process.terminate()
    assert service.process.wait(60) == 0
