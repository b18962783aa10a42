"""Parquet, Arrow and folders: pictures stay encoded, damage is said with file and row, splits are named."""

import io
import json
import os

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from PIL import Image

from data.record import RecordError
from data.settings import SourceSettings
from data.sources.open import open_sources
from vl2.errors import UserError

ROWS = [{"messages": [{"role": "user", "content": "a"}], "id": i} for i in range(3)]


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()


def open_one(path, cache=None):
    (rows,) = open_sources(SourceSettings(path=str(path)), cache=cache)
    return rows


def all_rows(path, cache=None):
    found = open_sources(SourceSettings(path=str(path)), cache=cache)
    return [rows[i] for rows in found for i in range(len(rows))]


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def with_pictures(shades: list[int]) -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Image(), "images": datasets.Sequence(datasets.Image()), "q": datasets.Value("string")}
    )
    cells = [{"bytes": picture(shade), "path": None} for shade in shades]
    columns = {"image": cells, "images": [[cell, cell] for cell in cells], "q": ["?"] * len(cells)}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_pictures_stay_encoded(tmp_path, monkeypatch, kind):
    """Decoded and encoded again a JPEG would be another picture; the cells give the bytes that were put in."""
    path = tmp_path / kind
    table = with_pictures([1, 2])
    table.to_parquet(path) if kind == "parquet" else table.save_to_disk(path)
    monkeypatch.setattr("datasets.features.Image.decode_example", None)
    rows = open_one(path, tmp_path / "cache")
    cell = {"bytes": picture(2)}
    assert rows[1] == {"image": cell, "images": [cell, cell], "q": "?"}
    assert rows.content(0) != rows.content(1)
    assert rows.content(0) == open_one(path).content(0)
    assert len(rows.content(0)) < 300  # the pictures' hashes, not the pictures


def test_other_pictures_are_other_content(tmp_path):
    for name, shades in (("a", [1]), ("b", [2]), ("c", [1])):
        with_pictures(shades).to_parquet(tmp_path / name)
    a, b, c = (open_one(tmp_path / name) for name in "abc")
    assert a.content(0) == c.content(0) != b.content(0)
    assert a.fingerprint == c.fingerprint != b.fingerprint


def test_keys_that_arrow_added_are_dropped(tmp_path):
    """Arrow gives each message the keys of all: `loss: null` would be a key that nobody wrote."""
    rows = [{"m": [{"a": 1}, {"b": None, "c": [None, 1]}]}, {"o": {"x": {"y": 1}}}, {"o": {"z": False}, "e": ""}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**rows[0], **rows[1], **rows[2]}, *rows]), tmp_path / "a")
    assert all_rows(tmp_path / "a")[1:] == [{"m": [{"a": 1}, {"c": [None, 1]}]}, *rows[1:]]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_classes_are_read_by_their_names(tmp_path, kind):
    """`datasets` stores the number of a class: with data.columns.assistant=kind, "1" was learned instead of "dog"."""
    path = tmp_path / kind
    features = datasets.Features({"kind": datasets.ClassLabel(names=["cat", "dog"]), "n": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"kind": [1, 0, -1, None], "n": [1, 2, 3, 4]}, features=features)
    table.to_parquet(path) if kind == "parquet" else table.save_to_disk(path)
    assert all_rows(path) == [{"kind": "dog", "n": 1}, {"kind": "cat", "n": 2}, {"n": 3}, {"n": 4}]


def test_a_class_without_a_name_is_an_error_of_its_row(tmp_path):
    features = datasets.Features({"kind": datasets.ClassLabel(names=["cat", "dog"])})
    schema = features.arrow_schema
    pyarrow.parquet.write_table(pyarrow.table({"kind": [0, 2]}, schema=schema), tmp_path / "a.parquet")
    rows = open_one(tmp_path / "a.parquet")
    assert rows[0] == {"kind": "cat"}
    with pytest.raises(RecordError, match=r"row 2, kind: expected a cell that can be read, found: class 2 of 2"):
        rows[1]


def test_a_cell_that_is_no_text_names_row_and_column(tmp_path):
    """Whoever wrote bytes into a column of text; only that row is bad."""
    texts = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "q": texts}), tmp_path / "a.parquet")
    rows = open_one(tmp_path / "a.parquet")
    assert (rows[0], rows[2]) == ({"id": 1, "q": "a"}, {"id": 3, "q": "c"})
    with pytest.raises(RecordError, match=r"a\.parquet, row 2, q: expected a cell that can be read, found: 'utf-8'"):
        rows[1]
    assert len({rows.content(i) for i in range(3)}) == 3  # keys of all rows are made before the bad ones are looked at


def test_a_corrupt_page_names_the_row_reached(tmp_path):
    """The error of `datasets` says neither file nor row."""
    path = tmp_path / "a.parquet"
    texts = [f"{i:08}" * 50 for i in range(3000)]
    table = pyarrow.table({"q": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=1000, compression="zstd", use_dictionary=False)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0)
    with path.open("r+b") as file:
        file.seek(column.data_page_offset + column.total_compressed_size // 2)
        file.write(b"\xff" * 64)
    with pytest.raises(UserError, match=r"a\.parquet: cannot read the Parquet file after row 2000: .*; fetch or write"):
        open_one(path, tmp_path / "cache")
    assert not any((tmp_path / "cache" / "sources-1" / "tables").iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1 and nothing after it", r"a: cannot read the Parquet file: .*magic bytes not found"),
        (b"ARROW1 and nothing after it", r"a: cannot read the Arrow file: .*"),
        (b"\xff\xff\xff\xff\x10\0\0\0nothing after it", r"a: cannot read the Arrow file: .*"),
    ],
)
def test_what_only_begins_like_a_table(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_one(tmp_path / "a")


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_a_corrupt_arrow_file_is_found_when_it_is_opened(tmp_path, new):
    """An offset that points outside, followed when a pack is built, would end the process without a word."""
    table = pyarrow.table({"q": ["first", "second", "third"]})
    with new(str(tmp_path / "a"), table.schema) as writer:
        writer.write_table(table)
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 5, 11, 16))
    content = (tmp_path / "a").read_bytes()
    assert content.count(offsets) == 1
    (tmp_path / "a").write_bytes(content.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f" + offsets[12:]))
    with pytest.raises(UserError, match=r"a: cannot read the Arrow file: .*offset"):
        open_one(tmp_path / "a", tmp_path / "cache")


def test_a_table_is_checked_once(tmp_path, monkeypatch):
    """To look at every offset is to read the whole file: not at the second start."""
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    checks = []
    monkeypatch.setattr("data.sources.tables.np.array", lambda value: checks.append(value) or np.asarray(value))
    for _ in range(2):
        assert all_rows(tmp_path / "saved", tmp_path / "cache") == ROWS
    assert checks == [[3]]


def test_forked_processes_read_different_rows_of_one_table(tmp_path):
    table = pyarrow.table({"a": list(range(3000))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    rows = open_one(tmp_path / "a.parquet", tmp_path / "cache")
    child = os.fork()
    right = all(rows[i] == {"a": i} for i in (range(2999, -1, -1) if child else range(3000)))
    if not child:
        os._exit(0 if right else 1)
    assert right
    assert os.waitpid(child, 0)[1] == 0


def test_a_saved_folder(tmp_path):
    datasets.Dataset.from_list(ROWS).shuffle(seed=1).save_to_disk(tmp_path / "saved")
    rows = open_one(tmp_path / "saved", tmp_path / "cache")
    assert sorted((rows[i] for i in range(3)), key=lambda row: row["id"]) == ROWS
    assert (rows.number(0), rows.folder) == (1, tmp_path / "saved")
    with pytest.raises(
        UserError, match="saved@train: expected a data set of several splits, found one; leave @train out"
    ):
        open_one(f"{tmp_path}/saved@train")


def test_equal_content_saved_twice_has_one_fingerprint(tmp_path):
    """`datasets` writes down a fingerprint of how a table was made, which differs."""
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "a")
    datasets.Dataset.from_list(ROWS).rename_column("id", "n").rename_column("n", "id").save_to_disk(tmp_path / "b")
    a, b = (json.loads((tmp_path / name / "state.json").read_text())["_fingerprint"] for name in "ab")
    assert a != b
    assert open_one(tmp_path / "a").fingerprint == open_one(tmp_path / "b").fingerprint


def test_splits_of_a_saved_folder(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "several")
    datasets.DatasetDict(dev=table.select([2])).save_to_disk(tmp_path / "one")
    assert all_rows(f"{tmp_path}/several@test") == ROWS[1:2]
    assert all_rows(tmp_path / "one") == ROWS[2:]
    with pytest.raises(UserError, match=r"several: .*, found several splits: train, test; write .*several@train"):
        all_rows(tmp_path / "several")
    with pytest.raises(UserError, match=r"several@dev: .*, found no 'dev' among train, test"):
        all_rows(f"{tmp_path}/several@dev")


@pytest.mark.parametrize("lost", ["data-00000-of-00001.arrow", "dataset_info.json"])
def test_a_saved_folder_that_misses_a_file(tmp_path, lost):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / lost).unlink()
    with pytest.raises(UserError, match="saved: cannot read the saved data set: "):
        all_rows(tmp_path / "saved")
    (tmp_path / "saved" / lost).write_text("{")
    with pytest.raises(UserError, match="saved: cannot read the saved data set: "):
        all_rows(tmp_path / "saved")


def test_a_folder_of_parquet_and_its_splits(tmp_path):
    (tmp_path / "a").mkdir()
    for name, rows in (("train-0", ROWS[:2]), ("train-1", ROWS[2:]), ("test", ROWS[:1])):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a" / f"{name}.parquet")
    for _ in range(2):
        assert all_rows(f"{tmp_path}/a@train", tmp_path / "cache") == ROWS
        assert all_rows(f"{tmp_path}/a@test", tmp_path / "cache") == ROWS[:1]
    with pytest.raises(UserError, match="a: expected the name of one split, found several splits: train, test; write"):
        all_rows(tmp_path / "a")
    with pytest.raises(UserError, match=r"a:b: cannot read the folder: BuilderConfig 'b' not found"):
        all_rows(f"{tmp_path}/a:b")


def test_a_folder_changes_with_its_files(tmp_path):
    """`datasets` goes by the times of files: a changed one with its old time gave the old rows."""
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "train.parquet"
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(path)
    stat = path.stat()
    assert all_rows(tmp_path / "a", tmp_path / "cache") == ROWS[:1]
    datasets.Dataset.from_list(ROWS[1:2]).to_parquet(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert all_rows(tmp_path / "a", tmp_path / "cache") == ROWS[1:2]


def test_a_folder_of_json_keeps_mixed_content_and_row_numbers(tmp_path):
    """`datasets` cannot read a column that is a text here and a list there."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.jsonl").write_text('{"content": "x"}\n\n{"content": [{"type": "image"}]}')
    rows = open_one(tmp_path / "a")
    assert [rows[0], rows[1]] == [{"content": "x"}, {"content": [{"type": "image"}]}]
    assert (rows.name, rows.number(1), rows.folder) == (str(tmp_path / "a" / "train.jsonl"), 3, tmp_path / "a")


def test_a_folder_of_pictures_with_metadata(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(picture(i))
    lines = [json.dumps({"file_name": f"{i}.png", **row}) for i, row in enumerate(ROWS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    before = [open_one(folder, tmp_path / "cache") for _ in range(2)]
    for rows in before:
        found = [rows[i] for i in range(3)]
        assert [row.pop("image") for row in found] == [{"path": str(folder / f"{i}.png")} for i in range(3)]
        assert found == ROWS
    moved = tmp_path / "moved"
    folder.rename(moved)
    rows = open_one(moved, tmp_path / "cache")
    assert rows[0]["image"] == {"path": str(moved / "0.png")}
    assert rows.fingerprint == before[0].fingerprint  # the path takes no part


def test_a_pipe_in_a_folder(tmp_path):
    """To open it would wait for its writer for ever."""
    os.mkfifo(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"cannot read the folder: .* doesn't contain any data files"):
        all_rows(tmp_path)


def test_a_folder_without_data(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"a: cannot read the folder: .*doesn't contain any data files$"):
        all_rows(tmp_path / "a")
