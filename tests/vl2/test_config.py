"""config.json: every published one is read, and whatever else stands in one is a line that names file and key."""

import json
import random
from pathlib import Path

import pytest

from tests.places import GOLDENS, ROOT
from vl2.checkpoint.published import PUBLISHED
from vl2.config import VL2Config
from vl2.errors import UserError

KNOWN = [
    *(entry.config for entry in PUBLISHED.values()),
    *sorted(GOLDENS.glob("nano_*/config.json")),
    ROOT / "vl2" / "nano" / "config.json",
]


@pytest.fixture
def raw() -> dict:
    return json.loads((GOLDENS / "nano_small" / "config.json").read_text())


def read(folder: Path, content: str | bytes) -> VL2Config:
    (folder / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)
    return VL2Config.from_folder(folder)


@pytest.mark.parametrize("path", KNOWN, ids=lambda path: path.parent.name)
def test_known_configs_are_read_and_kept(path):
    assert len(KNOWN) == 7
    config = VL2Config.from_folder(path.parent)
    assert config.to_dict() == json.loads(path.read_text())
    assert len(config.candidate_resolutions) == 23


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        ('{"language_config": {"hidden_act": "\xe9"}}'.encode("latin-1"), "not JSON .*utf-8"),
        ("[" * 100_000, "not JSON"),
        ('{"language_config": {"vocab_size": ' + "9" * 5000 + "}}", "not JSON"),
        ("[]", "expected a JSON object, found a list"),
        ("3", "expected a JSON object, found a int"),
        ('{"model_type": "llama"}', "no language_config in it"),
        ('{"language_config": []}', r"language_config: expected an object, found \[\]"),
        ('{"language_config": {}, "vision_config": "x"}', "vision_config: expected an object, found 'x'"),
    ],
)
def test_file_that_is_no_config(content, message, tmp_path):
    """A file in another encoding, a list, or a deep one ended in a traceback."""
    with pytest.raises(UserError, match=rf"config\.json: {message}") as error:
        read(tmp_path, content)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        # A million layers were built for hours before anything was said.
        ("language_config", "num_hidden_layers", 10**6, "expected a whole number from 1 to 256, found 1000000"),
        ("language_config", "n_routed_experts", 10**9, "expected a whole number from 0 to 1024, found 1000000000"),
        ("language_config", "num_hidden_layers", 0, "expected a whole number from 1 to 256, found 0"),
        ("language_config", "num_attention_heads", 0, "expected a whole number from 1 to 1024, found 0"),
        ("language_config", "num_attention_heads", "4", "expected a whole number from 1 to 1024, found '4'"),
        ("language_config", "hidden_size", -64, "expected a whole number from 1 to 65536, found -64"),
        ("language_config", "hidden_size", 64.0, r"expected a whole number from 1 to 65536, found 64\.0"),
        ("language_config", "hidden_size", None, "expected a whole number from 1 to 65536, found None"),
        ("language_config", "vocab_size", True, "expected a whole number from 1 to 1000000, found True"),
        ("language_config", "vocab_size", [1] * 99, r"expected a whole number .*, found \[1, 1, 1, 1, 1, 1, \.\.\.\]"),
        ("language_config", "rms_norm_eps", float("nan"), "expected a number from 0 to 1, found nan"),
        ("language_config", "rope_theta", float("inf"), "expected a number from 1 to .*, found inf"),
        ("language_config", "use_mla", 1, "expected true or false, found 1"),
        ("language_config", "hidden_act", ["silu"], r"expected a text, found \['silu'\]"),
        ("language_config", "kv_lora_rank", None, "expected a number of at least 1 with use_mla, found None"),
        ("language_config", "qk_rope_head_dim", 7, "expected an even number of at least 1 with use_mla, found 7"),
        ("language_config", "num_experts_per_tok", 9, "expected 1 to n_routed_experts=8, found 9"),
        ("language_config", "num_experts_per_tok", 0, "expected 1 to n_routed_experts=8, found 0"),
        ("language_config", "max_position_embeddings", 10**9, "expected a whole number from 1 to 100000000, found .*"),
        ("language_config", "max_position_embeddings", 0, "expected a whole number from 1 to 100000000, found 0"),
        ("vision_config", "layers", 10**6, "expected a whole number from 1 to 256, found 1000000"),
        ("vision_config", "heads", 5, "expected a divisor of width=48, found 5"),
        ("vision_config", "patch_size", 0, r"expected a whole number, 14 \(no other is supported\), found 0"),
        ("vision_config", "image_size", 224, r"expected a whole number, 384 \(no other is supported\), found 224"),
        ("projector_config", "mlp_ratio", 10**9, "expected a whole number from 1 to 64, found 1000000000"),
    ],
)
def test_value_that_no_model_has(part, key, value, message, raw, tmp_path):
    raw[part][key] = value
    with pytest.raises(UserError, match=rf"config\.json: {part}\.{key}: {message}$"):
        read(tmp_path, json.dumps(raw))


def test_heads_that_do_not_divide(raw, tmp_path):
    raw["language_config"].update(use_mla=False, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(UserError, match=r"num_attention_heads: expected a divisor of hidden_size=64 .*, found 3"):
        read(tmp_path, json.dumps(raw))


@pytest.mark.parametrize(
    "value",
    [
        *([], 384, "x", {}, [None], [384, 384], [[384]], [[384, 384, 384]]),
        *([[384, 0]], [[384, 400]], [[-384, -384]], [[384.0, 384]], [["384", 384]]),
        *([[384 * 65, 384]], [[384 * 9, 384 * 9]], [[384, 384]] * 1001),
    ],
)
def test_resolutions_that_are_not_made_of_tiles(value, raw, tmp_path):
    """Sides that are no multiple of a tile passed, and failed when the first picture was cut."""
    raw["candidate_resolutions"] = value
    with pytest.raises(UserError, match=r"candidate_resolutions: expected a list of at most 1000 \[width, height\]"):
        read(tmp_path, json.dumps(raw))


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("language_config", "rope_scaling", {"type": "yarn"}, r"rope_scaling is .*; only None is supported"),
        (
            "language_config",
            "topk_method",
            "group",
            r"topk_method is 'group'; only 'greedy' or 'noaux_tc' is",
        ),
        ("language_config", "n_group", 8, r"n_group is 8; only 1 is supported"),
        ("language_config", "q_lora_rank", 64, r"q_lora_rank is 64; only None is supported"),
        ("language_config", "num_key_value_heads", 2, r"num_key_value_heads is 2; only 4 is supported"),
        ("projector_config", "depth", 3, r"depth is 3; only 2 is supported"),
    ],
)
def test_switch_that_no_published_model_uses(part, key, value, message, raw, tmp_path):
    raw[part][key] = value
    with pytest.raises(UserError, match=message):
        read(tmp_path, json.dumps(raw))


def test_any_value_gives_a_config_or_a_users_error(raw):
    """Each key of each part with a few hundred foreign values: never another exception."""
    draw, refused = random.Random(3), 0
    foreign = [None, True, -1, 0, 1, 2, 7, 10**30, 0.5, -1e300, float("nan"), "", "x", [], [[]], {}, {"a": [1]}]
    for _ in range(600):
        changed = json.loads(json.dumps(raw))
        part = changed
        for _ in range(draw.choice((1, 2))):
            key = draw.choice(sorted(part))
            if not isinstance(part[key], dict):
                break
            part = part[key]
        part[draw.choice(sorted(part))] = draw.choice(foreign)
        try:
            VL2Config.from_dict(changed)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 100 < refused < 600
