"""What a source's path may name, and that each kind of file gives the same rows."""

import contextlib
import gzip
import json
import os
import resource
import socket
import time

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from data.record import RecordError
from data.settings import SourceSettings
from data.sources import files
from data.sources.open import open_sources
from vl2.errors import UserError

ROWS = [
    {
        "messages": [{"role": "user", "content": 'a\n"é[],'}, {"role": "assistant", "content": "b", "loss": True}],
        "id": 0,
    },
    {
        "messages": [{"role": "user", "content": "c"}],
        "id": 1,
        "images": ["p.png"],
        "objects": {"bbox": [[1, 2.5, 3, 4]]},
    },
    {"messages": [], "id": 2},
]


def table():
    # Arrow gives every row and message all keys; the second row is written first so that their types are known.
    return pyarrow.Table.from_pylist([ROWS[1], *ROWS]).slice(1)


def write(folder, kind: str):
    """Write the rows; the name says the kind, or the opposite of it."""
    lines = "\n".join(map(json.dumps, ROWS)).encode()
    array = json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
    texts = {
        **{"lines.jsonl": lines, "lines.json": lines, "lines.txt": lines, "lines": lines},
        **{"array.json": array, "array.jsonl": array},
        **{"lines.json.gz": gzip.compress(lines), "array.json.gz": gzip.compress(array)},
        **{"lines.zst": zstandard.compress(lines), "array.json.zst": zstandard.compress(array)},
        "several_members.gz": gzip.compress(lines[:50]) + gzip.compress(lines[50:]),
        "several_frames.zst": zstandard.compress(lines[:50]) + zstandard.compress(lines[50:]),
        "lines.csv": lines,
    }
    path = folder / kind
    if kind in texts:
        path.write_bytes(texts[kind])
    elif "parquet" in kind:
        pyarrow.parquet.write_table(table(), path, row_group_size=2)
    else:
        new = pyarrow.ipc.new_stream if kind == "stream.arrow" else pyarrow.ipc.new_file
        with new(str(path), table().schema) as writer:
            writer.write_table(table())
    return path


KINDS = [
    *("lines.jsonl", "lines.json", "lines.txt", "lines", "array.json", "array.jsonl"),
    *("lines.json.gz", "array.json.gz", "lines.zst", "array.json.zst", "several_members.gz", "several_frames.zst"),
    *("lines.csv", "a.parquet", "parquet.json", "stream.arrow", "file.arrow"),
]


def all_rows(path, cache=None, **settings):
    found = open_sources(SourceSettings(path=str(path), **settings), cache=cache)
    return [rows[i] for rows in found for i in range(len(rows))]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_the_same_rows(tmp_path, kind):
    """Told apart by what they hold: a .json may hold JSON lines and a .jsonl an array."""
    path = write(tmp_path, kind)
    for cache in (tmp_path / "cache", tmp_path / "cache", None):  # first, kept, never kept
        (rows,) = open_sources(SourceSettings(path=str(path)), cache=cache)
        assert [rows[i] for i in range(len(rows))] == ROWS
        assert [rows.number(i) for i in range(len(rows))] == [1, 2, 3]
        assert len({rows.content(i) for i in range(len(rows))}) == 3
        assert (rows.name, rows.folder) == (str(path), tmp_path)
        with pytest.raises(IndexError):
            rows[3]


@pytest.mark.parametrize("kind", ["lines.json.gz", "a.parquet", "array.json.zst"])
def test_what_was_unpacked_is_not_unpacked_again(tmp_path, monkeypatch, kind):
    """Under another name too: what is kept is named after the content."""
    path = write(tmp_path, kind)
    assert all_rows(path, tmp_path / "cache") == ROWS
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "sources-1" / "tables").rglob("*.arrow")}
    assert len(kept) == 1
    path.rename(tmp_path / "renamed")
    monkeypatch.setattr(files, "write_spool", None)
    monkeypatch.setattr("datasets.Dataset.from_parquet", None)
    assert all_rows(tmp_path / "renamed", tmp_path / "cache") == ROWS
    assert kept == {
        file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "sources-1" / "tables").rglob("*.arrow")
    }


@pytest.mark.parametrize("kind", ["lines.json.gz", "a.parquet"])
def test_a_damaged_or_unwritable_cache_costs_time_only(tmp_path, kind):
    path = write(tmp_path, kind)
    assert all_rows(path, tmp_path / "cache") == ROWS
    (kept,) = (tmp_path / "cache" / "sources-1" / "tables").rglob("*.arrow")
    os.truncate(kept, kept.stat().st_size // 2)
    assert all_rows(path, tmp_path / "cache") == ROWS
    (kept,) = (tmp_path / "cache" / "sources-1" / "tables").rglob("*.arrow")
    kept.unlink()
    assert all_rows(path, tmp_path / "cache") == ROWS
    (tmp_path / "a file").write_text("where the folder should be")
    assert all_rows(path, tmp_path / "a file") == ROWS


def test_a_kept_table_that_lost_its_last_rows_is_made_again(tmp_path, monkeypatch):
    """Cut between two batches an Arrow stream is whole to Arrow: rows would be missing without a word."""
    monkeypatch.setattr("data.sources.spool._BATCH_ROWS", 1)
    path = write(tmp_path, "lines.json.gz")
    assert all_rows(path, tmp_path / "cache") == ROWS
    (kept,) = (tmp_path / "cache" / "sources-1" / "tables").rglob("*.arrow")
    left = 3
    while left == 3:
        os.truncate(kept, kept.stat().st_size - 8)
        with contextlib.suppress(pyarrow.ArrowInvalid, OSError), pyarrow.OSFile(str(kept)) as file:
            left = pyarrow.ipc.open_stream(file).read_all().num_rows
    assert left == 2
    assert all_rows(path, tmp_path / "cache") == ROWS


def test_two_processes_unpack_one_file(tmp_path, monkeypatch):
    """The second finds the place taken when it is done."""
    path, true = write(tmp_path, "lines.json.gz"), files.write_spool

    def while_another_does(*args, **kwargs):
        monkeypatch.setattr(files, "write_spool", true)
        assert all_rows(path, tmp_path / "cache") == ROWS
        return true(*args, **kwargs)

    monkeypatch.setattr(files, "write_spool", while_another_does)
    assert all_rows(path, tmp_path / "cache") == ROWS
    assert all_rows(path, tmp_path / "cache") == ROWS
    assert len(list((tmp_path / "cache" / "sources-1" / "tables").iterdir())) == 1


def test_unpacking_what_is_large_is_said(tmp_path, monkeypatch, caplog):
    """Minutes without a word look like a hang."""
    path = write(tmp_path, "lines.json.gz")
    assert all_rows(path) == ROWS
    assert not caplog.text
    monkeypatch.setattr("data.sources.kept_tables._LARGE", 10)
    for _ in range(2):
        assert all_rows(path, tmp_path / "cache") == ROWS
    assert caplog.text.count("lines.json.gz: unpacking 0.0 GB into") == 1


def test_what_a_killed_process_left_half_made_is_removed(tmp_path):
    tables = tmp_path / "cache" / "sources-1" / "tables"
    for name, age in ((".building-old", 10**6), (".building-now", 10)):
        (tables / name).mkdir(parents=True)
        os.utime(tables / name, (time.time() - age,) * 2)
    assert all_rows(write(tmp_path, "lines.json.gz"), tmp_path / "cache") == ROWS
    assert not (tables / ".building-old").exists()
    assert (tables / ".building-now").exists()


def test_content_follows_the_row(tmp_path):
    """Of JSON the row's own text, alike in an array, a compressed file and a plain one."""
    contents = {}
    for kind in ("lines.jsonl", "lines.json.gz", "lines.zst"):
        (rows,) = open_sources(SourceSettings(path=str(write(tmp_path, kind))), cache=None)
        contents[kind] = [rows.content(i) for i in range(3)]
    assert contents["lines.jsonl"] == contents["lines.json.gz"] == contents["lines.zst"]
    assert contents["lines.jsonl"] == [json.dumps(row).encode() for row in ROWS]


@pytest.mark.parametrize("kind", ["lines.jsonl", "array.json", "lines.json.gz", "a.parquet"])
def test_limit_takes_the_first_rows(tmp_path, kind):
    path = write(tmp_path, kind)
    assert all_rows(path, limit=2) == ROWS[:2]
    assert all_rows(path, limit=9) == ROWS
    (all_of_them,) = open_sources(SourceSettings(path=str(path)), cache=None)
    (first,) = open_sources(SourceSettings(path=str(path), limit=2), cache=None)
    assert first.fingerprint != all_of_them.fingerprint
    assert (first.number(1), first.content(1)) == (2, all_of_them.content(1))
    with pytest.raises(IndexError):
        first[2]


def test_limit_is_of_the_whole_source(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text('{"a": 1}\n{"a": 2}')
    assert all_rows(tmp_path / "*.jsonl", limit=3) == [{"a": 1}, {"a": 2}, {"a": 1}]


def test_a_glob_goes_by_the_names(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    for name in ("2.jsonl", "b/1.jsonl", "1.json", "other.csv"):
        (tmp_path / name).write_text(json.dumps({"name": name}))
    assert all_rows(tmp_path / "**" / "*.json*") == [{"name": name} for name in ("1.json", "2.jsonl", "b/1.jsonl")]
    monkeypatch.chdir(tmp_path)
    names = [rows.name for rows in open_sources(SourceSettings(path="*.json*"), cache=None)]
    assert names == ["1.json", "2.jsonl"]
    with pytest.raises(UserError, match=r"\*\.parquet: expected data files, found none that this pattern matches"):
        all_rows(tmp_path / "*.parquet")


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    (tmp_path / "a[1].jsonl").write_text('{"a": 1}')
    assert all_rows(tmp_path / "a[1].jsonl") == [{"a": 1}]


def test_where_relative_image_paths_start(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (beside,) = open_sources(SourceSettings(path="sub/a.jsonl"), cache=None)
    (root,) = open_sources(SourceSettings(path="~/sub/a.jsonl", image_root="pictures"), cache=None)
    assert (beside.name, beside.folder) == ("sub/a.jsonl", tmp_path / "sub")
    assert (root.name, root.folder) == ("~/sub/a.jsonl", tmp_path / "pictures")


def test_what_is_no_file(tmp_path):
    """To open a pipe would wait for a writer for ever; nothing with the name of a file is looked for on the hub."""
    os.mkfifo(tmp_path / "pipe")
    socket.socket(socket.AF_UNIX).bind(str(tmp_path / "socket"))
    (tmp_path / "a.jsonl").write_text("{}")
    for path, found in [
        (tmp_path / "pipe", "a pipe"),
        (tmp_path / "socket", "a socket"),
        ("/dev/zero", "a device"),
        (tmp_path / "none.jsonl", "nothing"),
        ("none.jsonl", "nothing"),
        (tmp_path / "a.jsonl" / "b.jsonl", "nothing"),
        ("tests/none", "nothing"),
    ]:
        with pytest.raises(UserError, match=f"{path}: expected a data file .*, found {found} there"):
            all_rows(path)
    with pytest.raises(UserError, match="expected a data file, found: File name too long"):
        all_rows("x" * 5000 + ".jsonl")
    with pytest.raises(UserError, match="expected a data file, found: embedded null byte"):
        all_rows("a\0b.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_rows(tmp_path, content):
    for name in ("a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_bytes(content)
        assert all_rows(tmp_path / name) == []


def test_a_table_without_rows(tmp_path):
    """`datasets` makes none of it, and fails."""
    (tmp_path / "a.csv").write_text("question,answer\n")
    pyarrow.parquet.write_table(table().slice(0, 0), tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table().schema):
        pass
    for name in ("a.csv", "a.parquet", "a.arrow"):
        assert all_rows(tmp_path / name, tmp_path / "cache") == []


def test_too_many_files_at_once_is_said_in_one_line(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.jsonl").write_text("{}")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limits[1]))
    try:
        with pytest.raises(
            UserError, match="jsonl: more files than a process may hold open; raise `ulimit -n`, or join"
        ):
            all_rows(tmp_path / "*.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(all_rows(tmp_path / "*.jsonl")) == 60


@pytest.mark.parametrize("kind", ["lines.json.gz", "array.json.gz", "lines.zst", "array.json.zst"])
def test_a_compressed_file_that_is_cut_short(tmp_path, kind):
    """The stream reader of zstandard takes one for whole: rows would be lost in silence."""
    path = write(tmp_path, kind)
    os.truncate(path, path.stat().st_size - 9)
    with pytest.raises(UserError, match=rf"{kind}: expected a whole (gzip|zstd) file, found it .*(row); fetch or"):
        all_rows(path, tmp_path / "cache")
    assert not any((tmp_path / "cache" / "sources-1" / "tables").iterdir())


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_compressed_file_that_is_damaged(tmp_path, kind):
    lines = "\n".join(f'{{"a": "{i * i}"}}' for i in range(250_000)).encode()
    checksummed = zstandard.ZstdCompressor(write_checksum=True)  # as the command does
    content = bytearray(gzip.compress(lines, 1) if kind == "gzip" else checksummed.compress(lines))
    content[len(content) * 3 // 4] ^= 0xFF
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(
        UserError, match=rf"a: expected a whole {kind} file, found it damaged .*, after row \d\d+; fetch"
    ):
        all_rows(tmp_path / "a")


def test_bad_rows_of_a_compressed_file_are_bad_when_they_are_read(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \xff}\n{"a"\n{"a": 2}'))
    (rows,) = open_sources(SourceSettings(path=str(tmp_path / "a.gz")), cache=None)
    assert (rows[0], rows[3]) == ({"a": 1}, {"a": 2})
    for index, message in [
        (1, "row 3, row: expected UTF-8 text, found byte 6"),
        (2, "row 4, row: expected a JSON obj"),
    ]:
        with pytest.raises(RecordError, match=message):
            rows[index]


def test_an_array_that_breaks_off_in_a_compressed_file(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b'[{"a": 1}, {"a": 2}, {"a"'))
    with pytest.raises(UserError, match=r"a\.gz: expected the array to end with \], .*, after row 2; write"):
        all_rows(tmp_path / "a.gz")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"[ ]"))
    assert all_rows(tmp_path / "b.gz") == []


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_batch", full)
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", full)
    for kind in ("lines.json.gz", "a.parquet"):
        with pytest.raises(UserError, match=f"{kind}: the disk is full: its rows are unpacked into .*/tables; free"):
            all_rows(write(tmp_path, kind), tmp_path / "cache")
        assert not any((tmp_path / "cache" / "sources-1" / "tables").iterdir())


def test_lines_that_are_lists_of_messages(tmp_path):
    """DeepSeek-VL2's own conversations are bare lists: a file of them was taken for one array."""
    talk = [{"role": "<|User|>", "content": "Hi"}, {"role": "<|Assistant|>", "content": "Hello"}]
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(talk)}\n{json.dumps(talk)}\n")
    (tmp_path / "a.json").write_text(json.dumps([talk, talk]))
    for name in ("a.jsonl", "a.json"):
        (rows,) = open_sources(SourceSettings(path=str(tmp_path / name)), cache=None)
        assert [rows[i] for i in range(len(rows))] == [talk, talk]
