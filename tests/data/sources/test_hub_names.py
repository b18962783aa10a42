"""Data sets of the hub, against a server on 127.0.0.1 that speaks what `datasets` asks of a hub."""

import hashlib
import io
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data.settings import SourceSettings
from data.sources.open import open_sources
from vl2.errors import UserError

COMMIT = "c0ffee" + "0" * 34


def parquet(table: pyarrow.Table) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 0, 0)).save(file, "PNG")
    return file.getvalue()


def pictures() -> bytes:
    """As `push_to_hub` writes an Image feature."""
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
    rows = [{"image": {"bytes": picture(), "path": "a.png"}, "question": "?"}]
    return parquet(pyarrow.Table.from_pylist(rows, schema=features.arrow_schema))


REPOSITORIES = {
    "someone/tables": {
        "data/train-00000-of-00002.parquet": parquet(pyarrow.table({"q": ["a", "b"]})),
        "data/train-00001-of-00002.parquet": parquet(pyarrow.table({"q": ["c"]})),
        "data/test-00000-of-00001.parquet": parquet(pyarrow.table({"q": ["d"]})),
    },
    "someone/lines": {"train.jsonl": b'{"a": 1}\n\n{"a": "x", "b": [1]}'},
    "someone/pictures": {"train.parquet": pictures()},
    "someone/configs": {
        "README.md": b"---\nconfigs:\n- {config_name: one, data_files: 1.csv}\n"
        b"- {config_name: two, data_files: 2.csv}\n---",
        "1.csv": b"a\n1\n",
        "2.csv": b"a\n02\n",
    },
    "someone/code": {"code.py": b"raise SystemExit", "README.md": b""},
}


class Hub(BaseHTTPRequestHandler):
    """HTTP/1.0: the connection ends with the answer."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.server.asked.append(path)
        for name, files in REPOSITORIES.items():
            api = f"/api/datasets/{name}"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                siblings = [{"rfilename": file} for file in files]
                return self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            if path.startswith(f"{api}/tree/{COMMIT}"):
                folder = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
                listed = self.listed(files, f"{folder}/" if folder else "", "recursive=True" in query)
                return self.answer(200, json.dumps(listed).encode()) if listed else self.absent("EntryNotFound")
            if path.startswith(f"/datasets/{name}/resolve/"):
                content = files.get(path.split("/resolve/")[1].partition("/")[2])
                return self.absent("EntryNotFound") if content is None else self.answer(200, content)
        return self.absent("RepoNotFound")

    def listed(self, files, folder, recursive):
        inside = {name.removeprefix(folder): name for name in files if name.startswith(folder)}
        folders = set() if recursive else {short.split("/")[0] for short in inside if "/" in short}
        found = [{"type": "directory", "path": folder + name, "oid": "0" * 40} for name in folders]
        return found + [
            {"type": "file", "path": name, "size": len(files[name]), "oid": hashlib.sha1(files[name]).hexdigest()}
            for short, name in inside.items()
            if recursive or "/" not in short
        ]

    def absent(self, code):
        self.answer(404, b'{"error": "not found"}', {"X-Error-Code": code})

    def answer(self, status, body, headers=None):
        self.send_response(status)
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        for key, value in {
            "Content-Length": len(body),
            "X-Repo-Commit": COMMIT,
            "ETag": etag,
            **(headers or {}),
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub as HF_ENDPOINT names one, and empty caches as HF_HOME does."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    for module, name in ((datasets.config, "HF_ENDPOINT"), (huggingface_hub.constants, "ENDPOINT")):
        monkeypatch.setattr(module, name, url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path / "hf" / "hub"))
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "hf" / name.lower())
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def read(path, cache):
    found = open_sources(SourceSettings(path=path), cache=cache)
    return [rows[i] for rows in found for i in range(len(rows))]


def test_a_split_of_tables(hub, tmp_path):
    assert read("someone/tables@train", tmp_path / "cache") == [{"q": "a"}, {"q": "b"}, {"q": "c"}]
    assert read("someone/tables@test", tmp_path / "cache") == [{"q": "d"}]
    with pytest.raises(
        UserError, match="someone/tables: expected the name of one split, found several splits: train, tes"
    ):
        read("someone/tables", tmp_path / "cache")
    with pytest.raises(UserError, match="found no 'dev' among train, test; write someone/tables@train"):
        read("someone/tables@dev", tmp_path / "cache")


def test_json_lines_are_read_by_our_own_reader(hub, tmp_path, monkeypatch):
    """That of `datasets` fails on a column that is a number in one row and a text in another."""
    monkeypatch.chdir(tmp_path)
    (rows,) = open_sources(SourceSettings(path="someone/lines"), cache=tmp_path / "cache")
    assert [rows[i] for i in range(len(rows))] == [{"a": 1}, {"a": "x", "b": [1]}]
    assert (rows.name, rows.number(1), rows.folder) == ("someone/lines/train.jsonl", 3, tmp_path)


def test_pictures_come_as_they_were_encoded(hub, tmp_path):
    assert read("someone/pictures", None) == [{"image": {"bytes": picture(), "path": "a.png"}, "question": "?"}]


def test_a_config_is_named(hub, tmp_path):
    assert read("someone/configs:two@train", tmp_path / "cache") == [{"a": "02"}]
    with pytest.raises(UserError, match=r"someone/configs: .*pick one among the available configs: \['one', 'two'\]"):
        read("someone/configs", tmp_path / "cache")
    with pytest.raises(UserError, match=r"someone/configs:three: .*'three' not found"):
        read("someone/configs:three", tmp_path / "cache")


@pytest.mark.parametrize("name", ["someone/tables@train", "someone/lines"])
def test_what_was_opened_before_asks_no_network(hub, tmp_path, name):
    first = read(name, tmp_path / "cache")
    assert hub.asked
    hub.asked.clear()
    assert read(name, tmp_path / "cache") == first
    assert hub.asked == []


def test_offline_finds_what_datasets_has_in_its_cache(hub, tmp_path, monkeypatch):
    first = read("someone/tables@train", None)
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert read("someone/tables@train", None) == first
    with pytest.raises(UserError, match=r"someone/lines: .* cannot open that name: Couldn't reach 'someone/lines'"):
        read("someone/lines", None)
    assert hub.asked == []


def test_a_name_that_is_not_there(hub, tmp_path):
    with pytest.raises(
        UserError,
        match=r"^someone/none: expected a file, a folder or the name of a data set on the hub, found nothing there and "
        r"cannot open that name: Dataset 'someone/none' doesn't exist on the Hub or cannot be accessed",
    ):
        read("someone/none", tmp_path / "cache")


def test_the_tries_to_reach_the_hub_are_not_printed(tmp_path, monkeypatch, caplog):
    """A mistyped path looks like a name: twelve lines of a library stood before the one that said what was wrong."""
    tries = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(tries, "handlers", [caplog.handler])
    monkeypatch.setattr(tries, "propagate", False)

    def unreachable(*_, **__):
        tries.warning("thrown while requesting HEAD ...")
        raise OSError("no network")

    monkeypatch.setattr("data.sources.repository._builder", unreachable)
    with pytest.raises(UserError, match=r"^someone/mine: .*cannot open that name: no network$"):
        read("someone/mine", tmp_path / "cache")
    assert [record.getMessage() for record in caplog.records] == [
        "someone/mine: no file lies there; looking for a data set of that name on the hub"
    ]
    tries.warning("said again afterwards")
    assert caplog.records[-1].getMessage() == "said again afterwards"


def test_code_beside_the_data_is_not_run(hub, tmp_path):
    with pytest.raises(UserError, match=r"someone/code: .* cannot open that name: .*code"):
        read("someone/code", tmp_path / "cache")
