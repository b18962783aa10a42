"""Configurations of adapters that are broken, of wrong types, or written to hang: one line with file and key."""

import json
import random
import re
from pathlib import Path

import pytest

from tests.vl2.adapter.handmade import check, linears, make, make_paddle, new_model, skeleton
from vl2.adapter import module_patterns, paddle_format, peft_format
from vl2.adapter.folder import check_base, open_adapter, save_adapter
from vl2.adapter.formats import OWN_FILE, PADDLE_CONFIG, PADDLE_INDEX, PEFT_CONFIG, PEFT_FILE, adapter_metadata
from vl2.checkpoint.tensor_files import read_header, write_safetensors
from vl2.errors import UserError
from vl2.lora import apply_lora
from vl2.lora_settings import LoRASettings

EXPLODES = r"(\w|\w\w|\.)*x"


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """An adapter as a run writes it."""
    folder = tmp_path_factory.mktemp("own")
    settings = LoRASettings(groups=("attention", "experts"), rank=2, ranks={"experts": 1}, alphas={"experts": 3.0})
    save_adapter(apply_lora(new_model(), settings), folder, {"base": "x", "base_fingerprint": "abc"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "config", "key"),
    [
        (make, {"target_modules": EXPLODES}, "target_modules"),
        (make, {"rank_pattern": {"o_proj": 2, r"(a?){1000000000}b": 2}}, "rank_pattern"),
        (make_paddle, {"target_modules": ["q_proj", EXPLODES]}, "target_modules"),
    ],
)
def test_a_regular_expression_that_explodes_is_ended(tmp_path, monkeypatch, write, config, key):
    """It ran unbounded in this process, for years; the second one takes all memory within seconds, too."""
    write(tmp_path, *([r".*\.q_proj"] if write is make else []), **config)
    monkeypatch.setattr(module_patterns, "CPU_SECONDS", 1)
    with pytest.raises(UserError, match=rf"config\.json: {key} holds .*, which takes more than 1 s or 1 GB to match"):
        open_adapter(tmp_path, skeleton())


def test_a_fault_of_the_matching_process_is_not_blamed_on_the_expression(tmp_path, monkeypatch):
    monkeypatch.setattr(module_patterns, "MEMORY_BYTES", "much")
    with pytest.raises(RuntimeError, match="invalid literal"):
        module_patterns.matched(tmp_path, [module_patterns.Expression("r", ".*")], ["a"])


def test_a_rank_for_every_module_by_its_name_needs_no_matching(tmp_path, monkeypatch):
    """Some tools write one key a module: as regular expressions they were n * n matches, hours for the full model."""
    given = []

    def matched(path, expressions, names):
        given.extend(expressions)
        return module_patterns.matched(path, expressions, names)

    monkeypatch.setattr(peft_format, "matched", matched)
    names = list(linears())
    ranks = {name: 1 + number % 5 for number, name in enumerate(names)}
    modules = r".*\.(q_proj|up_proj)"
    factors = make(tmp_path, modules, rank=ranks.get, rank_pattern=ranks)
    check(tmp_path, factors, lambda module: 8 / ranks[module])
    assert {expression.text for expression in given} == {modules}


def test_the_first_pattern_that_matches_counts(tmp_path):
    """Whether it is a name, the end of one, or an expression."""
    patterns = {"layers.1.self_attn.q_proj": 2, r"layers\.[12]\.self_attn\.q_proj": 3, "q_proj": 5}

    def rank(module):
        return 2 if ".1.self_attn.q_proj" in module else 3 if ".2.self_attn.q_proj" in module else 5

    factors = make(tmp_path, r".*\.q_proj", rank=rank, rank_pattern=patterns)
    assert {a.shape[0] for a, _ in factors.values()} == {2, 3, 5}
    check(tmp_path, factors, lambda module: 8 / rank(module))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 8.0}, r"r is 8\.0; expected a positive integer up to 65536"),
        ({"r": True}, r"r is True; expected a positive integer"),
        ({"r": 10**30}, r"r is 10{30}; expected a positive integer"),
        ({"r": [4]}, r"r is \[4\]; expected a positive integer"),
        ({"lora_alpha": None}, r"lora_alpha is None; expected a positive number up to 1e\+09"),
        ({"lora_alpha": float("nan")}, r"lora_alpha is nan; expected a positive number"),
        ({"lora_alpha": float("inf")}, r"lora_alpha is inf; expected a positive number"),
        ({"lora_alpha": 10**400}, r"lora_alpha is 10+\.\.\.0+; expected a positive number"),
        ({"lora_alpha": False}, r"lora_alpha is False; expected a positive number"),
        ({"lora_dropout": float("nan")}, r"lora_dropout is nan; expected a probability"),
        ({"lora_dropout": False}, r"lora_dropout is False; expected a probability"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r"alpha_pattern\['q_proj'\] is nan; expected a positive number"),
        ({"target_modules": ["q_proj", 3]}, r"target_modules is \['q_proj', 3\]; expected a regular expression or"),
        ({"target_modules": {"q_proj": 1}}, r"target_modules is \{'q_proj': 1\}; expected a regular expression or"),
        ({"exclude_modules": 7}, r"exclude_modules is 7; expected a regular expression or a list of names"),
        ({"base_model_name_or_path": ["a"]}, r"base_model_name_or_path is \['a'\]; expected a text"),
        ({"peft_type": ["LORA"]}, r"peft_type is \['LORA'\]; expected LORA"),
        ({"bias": ["none"]}, r"bias is \['none'\]; expected none"),
        ({"use_dora": "y" * 10**6}, r"use_dora is 'y+\.\.\.y+'; only plain LoRA"),
    ],
)
def test_values_of_wrong_types(tmp_path, config, message):
    """Several were taken (alpha NaN, r true), others ended in a traceback."""
    make(tmp_path, r".*\.q_proj", **config)
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/adapter_config\.json: {message}") as error:
        open_adapter(tmp_path, skeleton())
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", "not JSON \\('utf-8' codec can't decode"),
        (b'{"a": ' * 100_000, "not JSON \\(maximum recursion depth"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"", "not JSON"),
        (b"3", "expected a JSON object, found a int"),
    ],
)
@pytest.mark.parametrize("name", [PEFT_CONFIG, PADDLE_CONFIG])
def test_files_that_are_no_json_object(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: {message}"):
        adapter_metadata(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, r"weight_map is None; expected a table of tensors to files"),
        (["a"], r"weight_map is \['a'\]; expected a table"),
        ({"a": 3}, r"weight_map is \[3\]; expected a table"),
        (
            {"a": "../peft_model.safetensors"},
            r"weight_map names '\.\./peft_model\.safetensors'; expected files of this",
        ),
        ({"a": "/etc/passwd"}, r"weight_map names '/etc/passwd'; expected files of this folder"),
        ({}, r"no shard in peft_model\.safetensors\.index\.json there"),
    ],
)
def test_an_index_that_names_no_files_of_its_folder(tmp_path, weight_map, message):
    make_paddle(tmp_path)
    (tmp_path / PADDLE_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        open_adapter(tmp_path, skeleton())


@pytest.mark.parametrize("degree", [2, "2", [1], 1.5])
def test_a_degree_of_splitting_that_is_no_number(tmp_path, degree):
    make_paddle(tmp_path)
    path = tmp_path / PADDLE_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "tensor_parallel_degree": degree}))
    with pytest.raises(UserError, match=r"tensor_parallel_degree is .*; merge its parts first"):
        open_adapter(tmp_path, skeleton())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": "attention"}, r"vl2\.settings\.groups is 'attention'; expected a list of groups"),
        ({"groups": ["attn"]}, r"lora\.groups: 'attn' is not a group"),
        ({"rank": 2.0}, r"vl2\.settings\.rank is 2\.0; expected a positive integer"),
        ({"alpha": float("nan")}, r"vl2\.settings\.alpha is nan; expected a positive number"),
        ({"ranks": [1]}, r"vl2\.settings\.ranks is \[1\]; expected a table of groups"),
        ({"alphas": {"experts": None}}, r"vl2\.settings\.alphas\.experts is None; expected a positive number"),
        ({"dropout": "0"}, r"vl2\.settings\.dropout is '0'; expected a probability"),
    ],
)
def test_settings_of_ours_of_wrong_types(own, tmp_path, settings, message):
    document = json.loads((own / PADDLE_CONFIG).read_text())
    document["vl2"]["settings"].update(settings)
    (tmp_path / PADDLE_CONFIG).write_text(json.dumps(document))
    (tmp_path / OWN_FILE).write_bytes((own / OWN_FILE).read_bytes())
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/lora_config\.json: {message}"):
        open_adapter(tmp_path, skeleton())


def test_a_fingerprint_that_is_no_text(own, tmp_path):
    document = json.loads((own / PADDLE_CONFIG).read_text())
    document["vl2"]["metadata"]["base_fingerprint"] = 7
    (tmp_path / PADDLE_CONFIG).write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"base_fingerprint of its metadata is 7; expected a text"):
        check_base(tmp_path, "abc")


NASTY = (None, True, -1, 0, 1.5, 10**400, float("nan"), "", "x", "[", [], [1], ["x"], [[]], {}, {"x": 1}, {"": None})


def mutated(value, draw: random.Random):
    """A JSON value with one nasty one somewhere in it."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        return {**value, key: mutated(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.5:
        return [*value[:-1], mutated(value[-1], draw)]
    return draw.choice(NASTY)


def test_mutated_configurations_are_read_or_refused(own, tmp_path, monkeypatch):
    """Seeded: nothing but a UserError of a few lines that names the folder comes out, whatever stands there."""

    def in_this_process(path, expressions, names):
        """Without the process of its own, for speed: none of NASTY explodes."""
        found = []
        for expression in expressions:
            try:
                pattern = re.compile(f"(.*[.])?({expression.text})" if expression.ends else expression.text)
            except re.error as error:
                raise UserError(f"{path}: {expression.key}: {error}") from error
            found.append(frozenset(name for name in names if pattern.fullmatch(name)))
        return found

    monkeypatch.setattr(peft_format, "matched", in_this_process)
    monkeypatch.setattr(paddle_format, "matched", in_this_process)
    peft, paddle = tmp_path / "peft", tmp_path / "paddle"
    make(peft, r".*\.q_proj", rank_pattern={"o_proj": 2}, alpha_pattern={}, exclude_modules=["v_proj"])
    make_paddle(paddle)
    stored = read_header(paddle / OWN_FILE)[0]
    (paddle / PADDLE_INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(stored, OWN_FILE)}))
    draw, model, outcomes = random.Random(5), skeleton(), {"read": 0, "refused": 0}
    files = (peft / PEFT_CONFIG, paddle / PADDLE_CONFIG, paddle / PADDLE_INDEX, own / PADDLE_CONFIG)
    for file in files:
        text = file.read_text()
        for _ in range(60):
            if draw.random() < 0.2:
                changed = bytearray(text.encode())
                changed[draw.randrange(len(changed))] = draw.randrange(256)
                file.write_bytes(bytes(changed))
            else:
                file.write_text(json.dumps(mutated(json.loads(text), draw)))
            try:
                open_adapter(file.parent, model)
                outcomes["read"] += 1
            except UserError as error:
                assert str(file.parent) in str(error), error
                assert len(str(error)) < 4000
                outcomes["refused"] += 1
        file.write_text(text)
    assert min(outcomes.values()) > 20, outcomes


def test_a_header_of_ours_that_is_no_json(tmp_path):
    make(tmp_path, r".*\.q_proj")
    stored = {name: tensor.read() for name, tensor in read_header(tmp_path / PEFT_FILE)[0].items()}
    for text in ("{", "[" * 100_000, "3"):
        write_safetensors(tmp_path / PEFT_FILE, stored, dict.fromkeys(stored, "float32"), {"format": "pt", "vl2": text})
        with pytest.raises(UserError, match=r"adapter_model\.safetensors: the entry 'vl2' of its header: "):
            open_adapter(tmp_path, skeleton())
