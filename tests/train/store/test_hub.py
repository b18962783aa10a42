"""Finding and fetching models, against a server on 127.0.0.1 that speaks what huggingface_hub asks of a hub."""

import dataclasses
import errno
import hashlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from train.store import hub, hub_checksums
from train.store.hub import resolve_model
from vl2.errors import UserError

NAME = "someone/some-model"
COMMIT = "c0ffee" + "0" * 34
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CHUNK = 1 << 16


def checkpoint() -> dict[str, bytes]:
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    return {
        "config.json": b'{"model_type": "deepseek_vl_v2"}',
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        SHARDS[0]: bytes(range(256)) * 2000,
        SHARDS[1]: bytes(reversed(range(256))) * 3000,
        "LICENSE": b"as you like",
        "pytorch_model.bin": b"a pickle",
        "modeling.py": b"raise SystemExit",
    }


@dataclass
class Hub:
    """One model, its faults, and what was asked for."""

    files: dict[str, bytes] = field(default_factory=checkpoint)
    sent: dict[str, bytes] = field(default_factory=dict)  # instead of the file's true content
    drops: dict[str, int] = field(default_factory=dict)  # so many answers of that file break off half-way
    refused: str = ""  # that file may not be read
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, file, Range
    url: str = ""

    def checksum(self, name: str) -> str:
        content = self.files[name]
        if name.endswith(".safetensors"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def fetched(self) -> list[tuple[str, str]]:
        """(file, Range) of each download since the last look."""
        found = [(name, span) for method, name, span in self.asked if method == "GET" and name in self.files]
        self.asked.clear()
        return found


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: the connection ends with the answer, so an answer that is too short is a dropped connection."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub: Hub = self.server.hub
        api, file = f"/api/models/{NAME}", f"/{NAME}/resolve/{COMMIT}/"
        path = self.path.partition("?")[0]
        if path in (api, f"{api}/revision/main"):
            siblings = [{"rfilename": name} for name in hub.files]
            body = json.dumps({"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings}).encode()
            return self.reply(200, body, {"Content-Type": "application/json"})
        name, span = path.removeprefix(file), self.headers.get("Range", "")
        hub.asked.append((self.command, name, span))
        if not path.startswith(file) or name not in hub.files:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        if name == hub.refused:
            return self.reply(403, b"", {})
        content = hub.sent.get(name, hub.files[name])
        headers = {"ETag": f'"{hub.checksum(name)}"', "X-Repo-Commit": COMMIT}
        if name.endswith(".safetensors"):
            headers = {"ETag": '"of-the-storage"', "X-Linked-Etag": headers["ETag"], "X-Repo-Commit": COMMIT}
        start = int(span.removeprefix("bytes=").removesuffix("-")) if span else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        drop = self.command == "GET" and hub.drops.get(name, 0) > 0
        if drop:
            hub.drops[name] -= 1
        self.reply(206 if start else 200, content[start:], headers, cut=(len(content) - start) // 2 if drop else None)

    def reply(self, status, body, headers, cut=None):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub that HF_ENDPOINT points to, and empty caches."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PPNLP_HOME", str(tmp_path / "paddlenlp"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(hub, "_PAUSE_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    yield server.hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def unreachable(monkeypatch):
    """Makes HF_ENDPOINT a port that nobody listens on."""

    def cut() -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")

    return cut


def assert_whole(folder: Path, server: Hub) -> None:
    wanted = {name: content for name, content in server.files.items() if not name.endswith((".bin", ".py"))}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert resolve_model(tmp_path) == tmp_path


def test_config_and_tokenizer_come_without_the_weights(server, monkeypatch):
    """A dry run counts the tokens of a model of 55 GB: it neither fetches the weights nor, in the cache, reads them."""
    folder = resolve_model(NAME, weights=False)
    fetched = {name for name, _ in server.fetched()}
    assert {"config.json", "tokenizer.json"} <= fetched and not fetched & set(SHARDS)
    assert resolve_model(NAME, weights=False) == folder
    assert not server.fetched()  # it lies in the cache
    assert resolve_model(NAME) == folder  # what is left
    assert_whole(folder, server)
    (folder.parents[1] / ".verified.json").unlink()
    read, whole = [], hub_checksums._checksum
    monkeypatch.setattr(hub_checksums, "_checksum", lambda blob, bar: read.append(blob.name) or whole(blob, bar))
    assert resolve_model(NAME, weights=False) == folder
    assert read and not set(read) & {server.checksum(name) for name in SHARDS}


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "./some/folder", "../folder", "a/b/c", "a/"])
def test_neither_a_folder_nor_a_name(name, server):
    with pytest.raises(ValueError, match=f"^{name}: no such folder"):
        resolve_model(name)
    assert not server.asked


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("outputs/mien", r" \(did you mean outputs/mine\?\)"),
        ("runs/min", r" \(did you mean runs/mine\?\)"),
        ("outputs/quite-another", ""),
        ("tinny", r" \(did you mean tiny\?\)"),
        ("./outputs/mien", r" \(did you mean outputs/mine\?\)"),
    ],
)
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(name, near, server, tmp_path):
    """It was: for minutes where the hub is out of reach."""
    for folder in ("outputs", "runs"):
        (tmp_path / folder / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"no such folder{near}; expected a folder, a model of conf/model, or a name"):
        resolve_model(name)
    assert not server.asked


def test_the_publishers_folder_here_may_lack_a_model(server):
    """Whoever keeps models in folders named as on the hub has one of them, and may name another."""
    Path("deepseek-ai").mkdir()
    with pytest.raises(ValueError, match=r"the hub http.*RepositoryNotFoundError"):
        resolve_model("deepseek-ai/deepseek-vl2-tiny")


def test_outputs_is_a_folder_wherever_one_stands(server):
    """The command was typed in another folder than the run's."""
    with pytest.raises(ValueError, match=r"^outputs/mine: no such folder;"):
        resolve_model("outputs/mine")
    assert not server.asked


def test_a_silent_hub_is_given_up_in_seconds(server, monkeypatch):
    """It takes the connection and never answers; the limits are shortened here, as both are waited for."""
    monkeypatch.setattr(hub, "_ANSWER_SECONDS", (0.2, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"the hub http://127\.0\.0\.1:\d+: ReadTimeout: .*read timeout=0\.2"):
            resolve_model(NAME)
    assert time.monotonic() - started < 20


def test_a_sharded_checkpoint_is_fetched_without_pickles_and_code(server):
    assert_whole(resolve_model(NAME), server)
    assert sorted(name for name, _ in server.fetched()) == sorted(
        name for name in server.files if not name.endswith((".bin", ".py"))
    )


def test_what_is_there_is_used_without_the_hub(server, unreachable):
    folder = resolve_model(NAME)
    server.asked.clear()
    unreachable()
    assert resolve_model(NAME) == folder
    assert not server.asked


def test_a_dropped_connection_is_survived(server):
    server.drops = {SHARDS[1]: 2}
    assert_whole(resolve_model(NAME), server)
    spans = [span for name, span in server.fetched() if name == SHARDS[1]]
    starts = [int(span.removeprefix("bytes=").removesuffix("-")) for span in spans[1:]]
    assert spans[0] == "" and len(starts) == 2
    assert 0 < starts[0] < starts[1] < len(server.files[SHARDS[1]])  # goes on, does not begin anew


def test_a_restart_goes_on_where_it_stopped(server):
    """Fewer and fewer bytes come, until none do and the call gives up; the next one fetches the rest only."""
    server.drops = {SHARDS[1]: 1000}
    with pytest.raises(ValueError, match="cannot be had"):
        resolve_model(NAME)
    server.drops.clear()
    server.asked.clear()
    assert_whole(resolve_model(NAME), server)
    ((name, span),) = server.fetched()
    assert name == SHARDS[1] and span.startswith("bytes=")


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_a_wrong_checksum_is_rejected_and_fetched_again(name, server):
    """Of the right size, which is all that huggingface_hub looks at."""
    good = server.files[name]
    server.sent = {name: good[:-1] + bytes([good[-1] ^ 1])}
    with pytest.raises(ValueError, match=f"{name}: wrong checksum, expected {server.checksum(name)}"):
        resolve_model(NAME)
    server.sent = {}
    server.asked.clear()
    assert_whole(resolve_model(NAME), server)
    assert server.fetched() == [(name, "")]


def test_checksums_are_computed_once(server, monkeypatch):
    folder, computed = resolve_model(NAME), []
    checksum = hub_checksums._checksum
    monkeypatch.setattr(hub_checksums, "_checksum", lambda blob, bar: computed.append(blob.name) or checksum(blob, bar))
    resolve_model(NAME)
    assert computed == []
    blob = (folder / SHARDS[0]).resolve()
    blob.write_bytes(b"other" + blob.read_bytes()[5:])  # of the same size, but written later
    with pytest.raises(ValueError, match=f"{SHARDS[0]}: wrong checksum"):
        resolve_model(NAME)
    assert computed == [blob.name]


def test_an_unreachable_hub_gives_the_list_of_what_was_tried(server, unreachable, tmp_path):
    unreachable()
    with pytest.raises(UserError) as error:
        resolve_model(NAME)
    lines = str(error.value).splitlines()
    assert lines[0] == f"the model {NAME} cannot be had. Tried:"
    assert lines[1] == f"  the folder {tmp_path / NAME}: not there"
    assert lines[2] == f"  the Hugging Face cache {tmp_path / 'hub'}: not there"
    assert lines[3] == f"  PaddleNLP's store {tmp_path / 'paddlenlp' / 'models' / NAME}: not there"
    assert lines[5].startswith("  the hub http://127.0.0.1:1: ConnectionError: ")
    assert all(word in lines[6] for word in ("folder", "HF_ENDPOINT", f"hf download {NAME}"))


def test_a_half_fetched_model_is_not_used_when_the_hub_is_gone(server, unreachable):
    (resolve_model(NAME) / SHARDS[0]).unlink()
    unreachable()
    with pytest.raises(ValueError, match=f"Hugging Face cache .*: not whole, lacks {SHARDS[0]}\n"):
        resolve_model(NAME)


def test_a_name_the_hub_does_not_know_is_not_asked_for_again(server):
    with pytest.raises(ValueError, match=f"the hub {server.url}: RepositoryNotFoundError"):
        resolve_model("someone/else")
    assert len(server.asked) == 1


def test_a_refused_file_is_not_asked_for_again(server):
    server.refused = SHARDS[0]
    with pytest.raises(ValueError, match=f"the hub {server.url}: HfHubHTTPError: .*403"):
        resolve_model(NAME)
    assert [method for method, name, _ in server.asked if name == SHARDS[0]] == ["HEAD"]


def test_a_full_disk_stops_at_once(server, monkeypatch):
    calls = []

    def fetch(*args, local_files_only=False, **kwargs):
        calls.append(local_files_only)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ValueError, match="No space left on device"):
        resolve_model(NAME)
    assert calls.count(False) == 1


def test_a_hub_without_a_shard(server):
    del server.files[SHARDS[1]]
    with pytest.raises(ValueError, match=f"what it has of {NAME} lacks {SHARDS[1]}"):
        resolve_model(NAME)


def test_paddlenlps_store_is_looked_at(server):
    folder = Path(os.environ["PPNLP_HOME"], "models", NAME)
    folder.mkdir(parents=True)
    for name, content in server.files.items():
        (folder / name).write_bytes(content)
    assert resolve_model(NAME) == folder
    assert not server.asked


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": {"a": 1, "b": "x"}}', '{"a": ' + "[" * 100_000])
def test_an_index_that_is_none_counts_as_missing(index, tmp_path):
    """A number for a file, or a deep one, in a cache ended in a traceback."""
    (tmp_path / "model.safetensors.index.json").write_text(index)
    expected = ["1", "x"] if "weight_map" in index else ["a readable model.safetensors.index.json"]
    assert hub.missing_files(tmp_path) == ["config.json", "tokenizer.json", *expected]


def test_weights_that_paddlenlp_keeps_as_pdparams(server, unreachable):
    folder = Path(os.environ["PPNLP_HOME"], "models", NAME)
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).touch()
    unreachable()
    with pytest.raises(ValueError, match=r"not whole, lacks model\.safetensors or"):
        resolve_model(NAME)
    (folder / "model_state.pdparams").touch()
    assert resolve_model(NAME) == folder


def test_training_and_adapters_take_a_name(server, arguments, model_folder, tmp_path):
    """One name in the configuration and in the adapter's metadata; the folder may lie elsewhere on each machine."""
    from train.ask.source import find_source
    from train.config.load import load_config
    from train.run.build import build_base, open_base
    from train.store.facts import write_fact
    from train.store.names import WEIGHTS_METADATA
    from train.store.provenance import Provenance

    server.files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    config = load_config(arguments(tmp_path / "run", f"model.path={NAME}"))
    model = build_base(config, open_base(config))
    assert config.model.path == NAME and model.parameters()
    assert [name for name, _ in server.fetched()].count("model.safetensors") == 1
    made = Provenance(
        recipe="sft_tiny",
        rehearsal=False,
        base=NAME,
        base_path="",
        base_fingerprint="",
        init="weights",
        seed=0,
        max_tiles=9,
        precision="fp32",
        step=None,
        versions={},
    )
    write_fact(tmp_path / WEIGHTS_METADATA, made)
    assert find_source(tmp_path).base == resolve_model(NAME)
    write_fact(tmp_path / WEIGHTS_METADATA, dataclasses.replace(made, base="someone/else"))
    with pytest.raises(ValueError, match=r"base model someone/else, which is not there now \((.|\n)*Tried:"):
        find_source(tmp_path)
