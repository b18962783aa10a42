"""What is kept between starts: found again without reading, never believed after a change."""

import io
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data.settings import SourceSettings
from data.sources import array, content, lines
from data.sources.array import find_elements
from data.sources.content import content_hash, kept_array
from data.sources.lines import find_lines
from data.sources.open import open_sources


@pytest.fixture
def read(monkeypatch):
    """Bytes read through files that were opened by their path."""
    counted = [0]

    class Counting(io.FileIO):
        def readinto(self, buffer):
            count = super().readinto(buffer)
            counted[0] += count
            return count

        def read(self, size=-1):
            block = super().read(size)
            counted[0] += len(block)
            return block

    true_open = Path.open

    def counting_open(path, mode="r", buffering=-1, *args, **kwargs):
        if mode != "rb":
            return true_open(path, mode, buffering, *args, **kwargs)
        raw = Counting(path)
        return raw if buffering == 0 else io.BufferedReader(raw)

    monkeypatch.setattr(Path, "open", counting_open)
    return counted


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_the_second_open_reads_nothing_again(tmp_path, monkeypatch, read, name):
    path = tmp_path / name
    line = '{"a": "' + "x" * 100 + '"}'
    path.write_text("\n".join([line] * 2000) if name.endswith("l") else "[" + ",".join([line] * 2000) + "]")
    monkeypatch.setattr(content, "_TICK", 0)
    monkeypatch.setattr(content, "_MAPPED", 0)
    time.sleep(0.02)  # longer than a tick of the file system's clock
    settings = SourceSettings(path=str(path))
    (first,) = open_sources(settings, cache=tmp_path / "cache")
    assert read[0] > 2 * path.stat().st_size  # hashed and searched
    read[0] = 0
    (second,) = open_sources(settings, cache=tmp_path / "cache")
    assert read[0] <= io.DEFAULT_BUFFER_SIZE  # a look at what kind of file it is
    assert second[1999] == first[1999] == {"a": "x" * 100}
    assert second.fingerprint == first.fingerprint
    assert isinstance(second._spans, np.memmap)  # numbers on disk, not a Python object a row


def test_a_file_changed_in_place_is_read_again(tmp_path, monkeypatch):
    """Its size and time were given back: the kernel's own change time cannot be."""
    monkeypatch.setattr(content, "_TICK", 0)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    time.sleep(0.02)
    before, stat = content_hash(path, tmp_path / "cache"), path.stat()
    with path.open("r+") as file:
        file.write('{"b": 1}')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert content_hash(path, tmp_path / "cache") != before
    (rows,) = open_sources(SourceSettings(path=str(path)), cache=tmp_path / "cache")
    assert rows[0] == {"b": 1}


def test_a_file_written_this_moment_is_not_remembered(tmp_path):
    """A second write within the same tick of the clock would leave all its times as they are."""
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    content_hash(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_content_alone_makes_the_fingerprint(tmp_path):
    for name in ("a.jsonl", "b.json"):
        (tmp_path / name).write_text("{}\n{}")
    (tmp_path / "c.jsonl").write_text("{}\n{} ")
    first, second, other = (content_hash(tmp_path / name, None) for name in ("a.jsonl", "b.json", "c.jsonl"))
    assert first == second != other


def test_a_damaged_cache_costs_time_only(tmp_path):
    path = tmp_path / "kept" / "a.npy"
    assert kept_array(path, lambda: np.arange(3)).tolist() == [0, 1, 2]
    assert kept_array(path, lambda: np.arange(9)).tolist() == [0, 1, 2]
    for damage in (path.read_bytes()[:-4], b"", b"nonsense"):
        path.write_bytes(damage)
        assert kept_array(path, lambda: np.arange(4)).tolist() == [0, 1, 2, 3]


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    (tmp_path / "a.jsonl").write_text('{"a": 1}')
    (rows,) = open_sources(SourceSettings(path=str(tmp_path / "a.jsonl")), cache=tmp_path / "cache")
    assert rows[0] == {"a": 1}
    assert "cannot be kept, the next start does this work again" in caplog.text


def test_a_file_that_shrinks_while_it_is_used(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    (rows,) = open_sources(SourceSettings(path=str(path)), cache=None)
    os.truncate(path, 12)
    assert rows[0] == {"a": 1}
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2, row: found the file cut short since it was opened"):
        rows[1]


@pytest.mark.parametrize("find", [find_lines, find_elements])
def test_a_file_is_searched_in_bounded_memory(monkeypatch, find):
    """A view of a block's first byte, kept until the end, kept all blocks: the whole file lay in memory."""
    for module in (lines, array):
        monkeypatch.setattr(module, "BLOCK", 1 << 14)
    row = b'{"a": "' + b"x" * 5000 + b'"}'
    text = b"\n".join([row] * 2000) if find is find_lines else b"[" + b",".join([row] * 2000) + b"]"
    file = io.BytesIO(text)
    tracemalloc.start()
    try:
        assert len(find(file)) == 2000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(text) / 5


@pytest.mark.slow
def test_a_line_of_50_megabytes(tmp_path):
    """It must neither be copied again for each block of it, nor stand in an error."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * 50_000_000 + b'"}\n{"a": ' + b"y" * 50_000_000 + b"}\n{}")
    (rows,) = open_sources(SourceSettings(path=str(path)), cache=None)
    assert len(rows[0]["a"]) == 50_000_000
    with pytest.raises(ValueError, match="row 2, row: expected a JSON object") as caught:
        rows[1]
    assert len(str(caught.value)) < 300
    assert rows[2] == {}


def test_forked_processes_read_different_rows_of_one_file(tmp_path):
    """They share one open file: a common position would move under each other's reads."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(f'{{"a": {i}}}' for i in range(2000)))
    (rows,) = open_sources(SourceSettings(path=str(path)), cache=None)
    child = os.fork()
    right = all(rows[i] == {"a": i} for i in (range(1999, -1, -1) if child else range(2000)))
    if not child:
        os._exit(0 if right else 1)
    assert right
    assert os.waitpid(child, 0)[1] == 0
    assert os.lseek(rows._descriptor, 0, os.SEEK_CUR) == 0  # nobody moved it, or the two would have needed luck
