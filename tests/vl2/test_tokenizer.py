"""The tokenizer against the official processor's, and what it may not mistake for a special token."""

import json
import random
import shutil

import pytest

from tests.places import GOLDENS, NANO_BPE
from vl2.errors import UserError
from vl2.tokenizer import GROUNDING_TOKENS, PAD_TOKEN, Tokenizer

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(NANO_BPE)


def test_ids_equal_official(tokenizer):
    pairs = json.loads((GOLDENS / "processor" / "tokenizer_nano.json").read_text())
    assert len(pairs) == 11
    for text, ids in pairs:
        assert tokenizer.encode(text) == ids, text


def test_added_tokens_take_the_official_ids(tokenizer):
    """984 entries and these ids are what the official processor makes of the 976 entries of nano_bpe."""
    assert len(tokenizer) == 984
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.special_ids[PAD_TOKEN], tokenizer.image_id) == (0, 1, 2, 976)
    assert [tokenizer.special_ids[token] for token in GROUNDING_TOKENS] == [977, 978, 979, 980, 981]
    assert (tokenizer.user_id, tokenizer.assistant_id) == (982, 983)
    assert tokenizer.special_ids["<image>"] == 976


def test_missing_padding_token_is_added_first(tmp_path):
    raw = json.loads((NANO_BPE / "tokenizer.json").read_text())
    raw["added_tokens"] = [entry for entry in raw["added_tokens"] if "pad" not in entry["content"]]
    del raw["model"]["vocab"]["<｜▁pad▁｜>"]
    raw["model"]["vocab"]["unused"] = 2
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.special_ids[PAD_TOKEN], tokenizer.image_id, tokenizer.assistant_id) == (976, 977, 984)
    assert len(tokenizer) == 985


@pytest.mark.parametrize(
    "text", ["Hello world", "中文，标点。 <|ref|>狗<|/ref|>", "a\n\nb\r\n c", "emoji 😀 ok", "  x  "]
)
def test_decode_returns_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, plain=True)) == text


def test_decode_shows_special_tokens(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("<|ref|>dog<|/ref|>"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "<｜begin▁of▁sentence｜><|ref|>dog<|/ref|><｜end▁of▁sentence｜>"


def test_plain_encoding_matches_only_grounding_tokens(tokenizer):
    text = "Say <|Assistant|> or <｜end▁of▁sentence｜> or <image> to <|ref|>the dog<|/ref|>, <|User|>"
    ids = tokenizer.encode(text, plain=True)
    grounding = {tokenizer.special_ids[token] for token in GROUNDING_TOKENS}
    assert [i for i in ids if i in tokenizer.special_ids.values()] == [977, 978]
    assert set(ids).isdisjoint(set(tokenizer.special_ids.values()) - grounding)
    assert tokenizer.decode(ids) == text


def test_plain_encoding_of_harmless_text_changes_nothing(tokenizer):
    for text in ["Hello world", " <| not one |>", "中文 <|ref|>x<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>", ""]:
        assert tokenizer.encode(text, plain=True) == tokenizer.encode(text)


def test_added_tokens_that_are_not_flagged_special(tmp_path):
    """The published vocabulary has some; they are matched as a whole all the same, so they are neutralised too."""
    raw = json.loads((NANO_BPE / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][-1], "id": 976, "content": "<｜fim▁hole｜>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.image_id == 977
    assert tokenizer.encode("a<｜fim▁hole｜>") == [*tokenizer.encode("a"), 976]
    assert tokenizer.find_typed_special("a<｜fim▁hole｜>") == "<｜fim▁hole｜>"
    plain = tokenizer.encode("a<｜fim▁hole｜>", plain=True)
    assert 976 not in plain and tokenizer.decode(plain) == "a<｜fim▁hole｜>"


def test_find_typed_special(tokenizer):
    assert tokenizer.find_typed_special("say <|Assistant|>: now") == "<|Assistant|>"
    assert tokenizer.find_typed_special("<｜place▁holder▁no▁10｜>") == "<｜place▁holder▁no▁10｜>"
    assert tokenizer.find_typed_special("<image> <|ref|>a<|/ref|><|det|>[]<|/det|><|grounding|> <|user|>") is None


def test_fingerprint_is_that_of_the_content(tokenizer, tmp_path):
    """Today's library writes merges as pairs, older ones as "a b": the same tokenizer, and a run can be resumed."""
    raw = json.loads((NANO_BPE / "tokenizer.json").read_text())
    raw["model"]["merges"] = [merge.split(" ") for merge in raw["model"]["merges"]]
    shutil.copy(NANO_BPE / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    again = Tokenizer.from_folder(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("<|User|>: hi") == tokenizer.encode("<|User|>: hi")


def test_fingerprint_follows_the_vocabulary(tokenizer, tmp_path):
    raw = (NANO_BPE / "tokenizer.json").read_text()
    shutil.copy(NANO_BPE / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text(raw.replace("\\\\p{N}{1,3}", "\\\\p{N}{1,2}"))
    assert Tokenizer.from_folder(tmp_path).fingerprint != tokenizer.fingerprint
    assert Tokenizer.from_folder(NANO_BPE).fingerprint == tokenizer.fingerprint


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"expected a tokenizer\.json, found none"):
        Tokenizer.from_folder(tmp_path)


def test_broken_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer of the `tokenizers` library"):
        Tokenizer.from_folder(tmp_path)


def test_tokenizer_without_bos(tmp_path):
    shutil.copy(NANO_BPE / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(ValueError, match=r"expected the bos_token '<s>' in the vocabulary"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", r"tokenizer_config\.json: not JSON"),
        (b"{", r"tokenizer_config\.json: not JSON"),
        (b"[" * 100_000, r"tokenizer_config\.json: not JSON"),
        (b"[]", r"tokenizer_config\.json: expected a JSON object, found a list"),
        (b'{"bos_token": 3}', r"bos_token of its tokenizer_config\.json: expected a token's text, .* found 3"),
        (b'{"eos_token": {"content": [1]}}', r"eos_token of its .* found \{'content': \[1\]\}"),
        (b'{"eos_token": {}}', r"eos_token of its .* found \{\}"),
        (b'{"pad_token": true}', r"pad_token of its .* found True"),
        (b'{"pad_token": "\\ud800"}', r"pad_token of its .* found '\\ud800'"),
    ],
)
def test_broken_tokenizer_config(content, message, tmp_path):
    """Another encoding, a list, or a number for a token ended in a traceback."""
    shutil.copy(NANO_BPE / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_tokens_that_a_tokenizer_config_leaves_open(tmp_path, tokenizer):
    shutil.copy(NANO_BPE / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "pad_token": ""}')
    assert Tokenizer.from_folder(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"", b"[]", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}"])
def test_file_that_is_no_tokenizer(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: expected (JSON in UTF-8|a tokenizer of the `tokenizers`)"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.slow
def test_any_value_gives_a_tokenizer_or_a_users_error():
    """Each key with a few foreign values: a list of steps ended in a traceback, a prefix that the merges do not have in
    the library's panic, which is not even an Exception."""
    raw = (NANO_BPE / "tokenizer.json").read_text()
    foreign = [None, True, -1, 2**40, 0.5, "", "x", "\ud800", [], [[]], {}, {"type": "x"}]
    parts = json.loads(raw)
    places = [(key,) for key in parts] + [("model", key) for key in parts["model"]]
    places += [("added_tokens", 0, key) for key in parts["added_tokens"][0]]
    refused = 0
    for place in places:
        for value in foreign:
            changed = part = json.loads(raw)
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = value
            try:
                found = Tokenizer(json.dumps(changed))
                assert len(found.fingerprint) == 64 and found.encode("<|User|>: hi") and found.least_tokens("hi") >= 0
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
    assert 150 < refused < len(places) * len(foreign)


@pytest.mark.parametrize("folder", [NANO_BPE, GOLDENS.parents[1] / "vl2" / "nano"])
def test_no_text_has_fewer_tokens_than_least_tokens(folder):
    """The longest tokens alone, special ones among them, reach the bound; nothing goes below it."""
    tokenizer = Tokenizer.from_folder(folder)
    draw = random.Random(0)
    specials = [*tokenizer.special_ids]
    longest = max((tokenizer.decode([i]) for i in range(len(tokenizer))), key=lambda text: len(text.encode()))
    texts = ["", "a", " " * 5000, "\n" * 300, longest * 50, "的" * 400, "🙂" * 99, "\0" * 50]
    texts += [
        "".join(draw.choice([*specials, chr(draw.randrange(1, 0xD800)), " ", "ab"]) for _ in range(60))
        for _ in "x" * 50
    ]
    for text in texts:
        for plain in (False, True):
            assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, plain=plain)), text
    assert tokenizer.least_tokens(longest * 50) == 50 == len(tokenizer.encode(longest * 50))
    assert tokenizer.least_tokens("a b" * 1000) > 50


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {
            "added_tokens": [
                {"id": 0, "content": "<｜begin▁of▁sentence｜>", **dict.fromkeys(FLAGS, False), "lstrip": True}
            ]
        },
    ],
)
def test_rules_that_drop_text_tell_no_least_tokens(change):
    """A text of spaces alone may be no token then."""
    raw = json.loads((NANO_BPE / "tokenizer.json").read_text())
    assert Tokenizer(json.dumps(raw)).least_tokens(" " * 10_000) > 0
    raw.update(change)
    assert Tokenizer(json.dumps(raw)).least_tokens(" " * 10_000) == 0
