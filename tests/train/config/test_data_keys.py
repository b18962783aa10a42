"""The keys of the data: one file or several, mixtures of sources, rows held out."""

import shutil

import pytest

from train.ask.data_settings import source_settings
from train.config import conf_files
from train.config.data_schema import COLUMNS, FORMS
from train.config.fields import list_entry_keys, list_keys
from train.config.load import load_config, load_eval_config
from train.config.schema import TrainConfig
from train.door import help
from train.machine.devices import Machine
from vl2.errors import UserError

GPU = Machine(gpus=1, driver="CUDA Version: 12.6", gpu_paddle=True)
MIXTURE = """\
# Photographs, and charts two and a half times.
sources:
  - path: ~/photos.jsonl
    name: photos
  - path: charts.parquet
    form: conversations
    image_root: pictures
    columns: {user: question, assistant: answer}
    system: ""
    repeat: 2.5
    limit: 100
system: You see pictures.
"""


def train(*arguments):
    return load_config(["conf=sft_tiny", *arguments], GPU)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], []),
        (["data.path=null"], []),
        (["data.path=a, (b).jsonl"], ["a, (b).jsonl"]),
        (["data.path=[a b.jsonl, c=d.parquet]"], ["a b.jsonl", "c=d.parquet"]),
        (["data.path=a,b.jsonl", "data.path=[c]", "data.path=shard-[0-9]"], ["a,b.jsonl", "c", "shard-[0-9]"]),
        (["data.path=[ab]*.jsonl"], ["[ab]*.jsonl"]),
    ],
)
def test_one_path_or_several(arguments, expected):
    assert train(*arguments).data.path == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("[a.jsonl, '~/b']", ["a.jsonl", "/home/me/b"]),
        ("null", []),
        ("''", []),
        ("'[a]'", ["[a]"]),
    ],
)
def test_one_path_or_several_in_a_file(written, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"defaults: [sft_tiny, _self_]\ndata: {{path: {written}, eval_path: {written}}}\n")
    data = load_config([f"conf={recipe}"], GPU).data
    assert (data.path, data.eval_path) == (expected, expected)


@pytest.mark.parametrize("written", ["3", "[a, 3]", "{a: b}", "[a, '']"])
def test_a_path_that_is_no_text(written, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"defaults: [sft_tiny, _self_]\ndata: {{path: {written}}}\n")
    with pytest.raises(UserError, match=r"^data\.path=.*: expected a text, or a list of texts"):
        load_config([f"conf={recipe}"], GPU)


def test_an_empty_path_is_no_request_for_drawn_shapes():
    """`data.path=$DATA` with a variable that is not set trained on shapes, exit code 0."""
    with pytest.raises(UserError, match=r"^data\.path=: expected a text, or a list of texts, none of them empty"):
        train("data.path=")


def test_columns_arrive_as_typed():
    typed = train("data.columns.user=问题, (1)", "data.columns.assistant=answer", "data.columns.image=a b")
    assert typed.data.columns == {"user": "问题, (1)", "assistant": "answer", "image": "a b"}
    assert train("data.columns={user: q, assistant: a}").data.columns == {"user": "q", "assistant": "a"}
    with pytest.raises(UserError, match=r"^data\.columns=answer: expected one of user, assistant, system, image"):
        train("data.columns.answer=x")


def test_a_mixture_as_a_group_file_and_in_a_recipe(tmp_path, monkeypatch):
    """`data=NAME` picks conf/data/NAME.yaml; what a source leaves out holds as the keys of `data` say."""
    monkeypatch.setenv("HOME", "/home/me")
    conf = shutil.copytree(conf_files.CONF, tmp_path / "conf")
    (conf / "data" / "mine.yaml").write_text(MIXTURE)
    monkeypatch.setattr(conf_files, "CONF", conf)
    config = train("data=mine", "data.form=messages").data
    photos, charts = source_settings(config)
    assert (photos.path, photos.name, photos.repeat, photos.limit) == ("/home/me/photos.jsonl", "photos", 1.0, None)
    assert (photos.form, photos.system, photos.image_root) == ("messages", "You see pictures.", "")
    assert (charts.form, charts.image_root, charts.system) == ("conversations", "pictures", "")
    assert (charts.repeat, charts.limit, charts.name) == (2.5, 100, "")
    assert charts.columns == {"user": "question", "assistant": "answer"}
    recipe = tmp_path / "mine.yaml"
    indented = MIXTURE.replace("\n", "\n  ")
    recipe.write_text(f"defaults: [sft_tiny, _self_]\ndata:\n  {indented}")
    assert load_config([f"conf={recipe}", "data.form=messages"], GPU).data.sources == config.sources


def test_what_is_typed_goes_before_a_mixture_of_the_recipe(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [sft_tiny, _self_]\ndata: {sources: [{path: a}]}\n")
    data = load_config([f"conf={recipe}", "data.path=b"], GPU).data
    assert [source.path for source in source_settings(data)] == ["b"]
    recipe.write_text("defaults: [sft_tiny, _self_]\ndata: {path: a}\n")
    data = load_config([f"conf={recipe}", "data.sources=[{path: b, repeat: 3}]"], GPU).data
    assert [(source.path, source.repeat) for source in source_settings(data)] == [("b", 3.0)]
    assert [source.path for source in source_settings(data, ["held.jsonl"])] == ["held.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.sources=[{path:a},{path:b,repeat:0}]"], r"^data\.sources\[1\]\.repeat=0\.0: expected at least 0\.001"),
        (["data.sources=[{path:a,repeat:-1}]"], r"^data\.sources\[0\]\.repeat=-1\.0: expected at least 0\.001"),
        (["data.sources=[{path:a,limit:0}]"], r"^data\.sources\[0\]\.limit=0: expected at least 1 rows"),
        (
            ["data.sources=[{path:a},{path:b,repeat:often}]"],
            r"^data\.sources\[1\]\.repeat=often: expected a number \(times an epoch\), found str",
        ),
        (
            ["data.sources=[{path:a,weight:2}]"],
            r"^unknown key 'data\.sources\[0\]\.weight'.*\(expected path, name, .*, repeat, limit\)$",
        ),
        (
            ["data.sources=[{path:a,repeats:2}]"],
            r"^unknown key 'data\.sources\[0\]\.repeats'; did you mean repeat\?",
        ),
        (["data.sources=[{path:a,columns:{q:b}}]"], r"^data\.sources\[0\]\.columns=q: expected one of user"),
        (["data.sources=[{repeat:2}]"], r"^data\.sources\[0\]\.path: expected a file, a folder"),
        (["data.sources=[a.jsonl]"], r"^data\.sources\[0\]=a\.jsonl: expected \{key: value\}, found str"),
        (["data.sources=[{path:3}]"], r"^data\.sources\[0\]\.path=3: expected a text, found int"),
        (
            ["data.sources=[{path:a,limit:true}]"],
            r"^data\.sources\[0\]\.limit=True: expected a whole number \(rows\) or",
        ),
        (
            ["data.sources=[{path:a,columns:3}]"],
            r"^data\.sources\[0\]\.columns=3: expected a table \{name:text\} or null",
        ),
        (["data.sources=a.jsonl"], r"^data\.sources=a\.jsonl: expected a list \[\{key:value\},\.\.\.\]; "),
        (
            ["data.sources=[{path:a},{path:a,form:alpaca}]"],
            r"^data\.sources\[1\]\.name: data\.sources\[0\]\.name is called a",
        ),
        (
            ["data.sources=[{path:a},{path:b,name:a}]"],
            r"^data\.sources\[1\]\.name: data\.sources\[0\]\.name is called a",
        ),
        (["data.path=[a,a]"], r"^data\.path names a twice"),
        (["data.path=x", "data.sources=[{path:a}]"], r"^data\.path and data\.sources are both given"),
        (["data.eval_path=x", "data.eval_fraction=0.1"], r"^data\.eval_fraction=0\.1 with data\.eval_path: "),
        (["data.eval_path=x", "data.eval_rows=5"], r"^data\.eval_rows=5 with data\.eval_path: "),
        (["data.eval_fraction=0"], r"^data\.eval_fraction=0\.0: expected at least 0\.0001 part of the rows"),
        (["data.eval_fraction=1"], r"^data\.eval_fraction=1\.0: expected at most 0\.9 part of the rows"),
        (["data.form=llava"], r"^data\.form=llava: expected one of auto, messages, conversations"),
        (["data.sources=[{path:a,form:llava}]"], r"^data\.sources\[0\]\.form=llava: expected one of auto, messages"),
        (["data.exif=turn"], r"^data\.exif=turn: expected one of ignore, rotate"),
        (["data.supervise=first"], r"^data\.supervise=first: expected one of all, last"),
        (["data.max_pixels=0"], r"^data\.max_pixels=0: expected at least 1 pixels"),
    ],
)
def test_mistakes_name_the_key_and_its_place(arguments, message):
    with pytest.raises(UserError, match=message) as refused:
        train(*arguments)
    assert "\n" not in str(refused.value)


def test_a_long_value_is_cut():
    with pytest.raises(UserError, match=r"^data\.sources\[0\]\.repeat=x{100}\.\.\.: expected a number") as refused:
        train(f"data.sources=[{{path:a,repeat:{'x' * 10_000}}}]")
    assert len(str(refused.value)) < 300


def test_eval_shares_the_keys_of_rows():
    data = load_eval_config(["model=m", "data.path=[a,b]", "data.form=conversations", "data.columns.user=q"]).data
    assert [source.path for source in source_settings(data)] == ["a", "b"]
    assert {(source.form, source.columns["user"]) for source in source_settings(data)} == {("conversations", "q")}


def test_keys_of_a_list_entry_are_explained():
    """`help train` lists them under data.sources[]."""
    (sources,) = [spec for spec in list_keys(TrainConfig) if spec.name == "data.sources"]
    entries = list_entry_keys(sources)
    words = help.verb_help("train").split()
    assert len(entries) == 8
    assert all(spec.name in words and spec.doc.endswith(".") for spec in entries)


def test_names_are_those_of_the_rooms_below():
    """The schema spells them out because it must load without the packages that read rows."""
    from data.forms import table
    from data.held_out import DEFAULT_FRACTION
    from data.images.reader import MAX_PIXELS, MOST_PIXELS

    specs = {spec.name: spec for spec in list_keys(TrainConfig)}
    assert f" {DEFAULT_FRACTION} of all rows are held out" in specs["data.eval_rows"].doc
    assert (specs["data.max_pixels"].default, specs["data.max_pixels"].high) == (MAX_PIXELS, MOST_PIXELS)
    assert ("auto", *table.FORMS) == FORMS
    assert table.COLUMNS == COLUMNS
