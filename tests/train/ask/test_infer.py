"""One answer: what is asked, pictures that cannot be used, how long the answer may be."""

import base64
import dataclasses
import io
import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

import train.ask.infer as entry
from data.images.reader import DEFAULT_READER
from tests.places import NANO_BPE
from train.ask.answer import answer_limit
from train.ask.infer import check_images, conversation, infer, notes, references
from train.ask.load import Loaded, load
from train.config.schema import InferConfig
from vl2.errors import UserError
from vl2.tokenizer import Tokenizer


@pytest.fixture
def loaded(model_folder) -> Loaded:
    return load(model_folder)


def shorten_context(loaded: Loaded, tokens: int) -> None:
    config = loaded.model.config
    language = dataclasses.replace(config.language, max_position_embeddings=tokens)
    loaded.model.config = dataclasses.replace(config, language=language)


def test_prompt_with_images_puts_them_first_or_where_marked():
    tokenizer = Tokenizer.from_folder(NANO_BPE)
    (message,) = conversation(InferConfig(prompt="What is this?", image=["a", "b"]), tokenizer)
    assert message.content == "<image>\n<image>\nWhat is this?"
    (message,) = conversation(InferConfig(prompt="Here <image>?", image=["a"]), tokenizer)
    assert message.content == "Here <image>?"
    with pytest.raises(ValueError, match="1 <image> for 2 images"):
        conversation(InferConfig(prompt="Here <image>?", image=["a", "b"]), tokenizer)


def test_messages_file(tmp_path):
    tokenizer = Tokenizer.from_folder(NANO_BPE)
    file = tmp_path / "m.json"
    file.write_text(json.dumps([{"role": "system", "content": "短"}, {"role": "user", "content": "<image> 是什么？"}]))
    config = InferConfig(messages=str(file), image=["a.png"])
    assert [m.content for m in conversation(config, tokenizer)] == ["短", "<image> 是什么？"]
    with pytest.raises(ValueError, match="no such file"):
        conversation(InferConfig(messages=str(tmp_path / "absent.json")), tokenizer)
    file.write_text("[{")
    with pytest.raises(ValueError, match="not JSON"):
        conversation(config, tokenizer)
    file.write_text(json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
    with pytest.raises(ValueError, match="last message must be a user's"):
        conversation(config, tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply to be read"),
        ('[{"role": "user", "content": "a", "id": ' + "1" * 5000 + "}]", "not JSON .*Exceeds the limit"),
        ('[{"role": "user", "content": "\\ud800"}]', r"messages\[0\]\.content: expected Unicode text"),
        ('[{"role": "user", "content": NaN}]', r"messages\[0\]\.content: expected a string .*, found the number nan"),
    ],
)
def test_messages_file_that_cannot_be_used(tmp_path, content, message):
    file = tmp_path / "m.json"
    file.write_text(content)
    with pytest.raises(UserError, match=rf"m\.json: {message}"):
        conversation(InferConfig(messages=str(file)), Tokenizer.from_folder(NANO_BPE))


@pytest.mark.slow
def test_images_and_chunks_through_infer(loaded, tmp_path):
    """Two images, whole prefill = chunked prefill; sampling is a function of the seed."""
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (500, 300), colour).save(tmp_path / f"{i}.png")
    images = [str(tmp_path / f"{i}.png") for i in range(2)]
    whole = infer(loaded, InferConfig(prompt="Which?", image=images, max_new_tokens=5))
    assert whole["prompt_tokens"] > 2 * 421
    assert whole["ids"] == infer(loaded, InferConfig(prompt="Which?", image=images, max_new_tokens=5, chunk=200))["ids"]
    sampled = [
        infer(loaded, InferConfig(prompt="Which?", max_new_tokens=8, temperature=2.0, top_p=0.9, seed=seed))["ids"]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def damaged_png(path: Path) -> None:
    Image.new("RGB", (60, 40)).save(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 1
    path.write_bytes(content)


def truncated_jpeg(path: Path) -> None:
    Image.effect_noise((60, 40), 50).save(path, "jpeg")
    path.write_bytes(path.read_bytes()[:-100])


def bomb(path: Path) -> None:
    """A picture that says it has 20,000 x 20,000 pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0), b"IDAT", b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: path.write_text("<!DOCTYPE html>"),
            r"expected an image file \(JPEG, .*\), found something else at",
        ),
        (truncated_jpeg, "truncated image"),
        (damaged_png, "damaged image, the checksum of its 'IDAT' chunk is wrong"),
        (bomb, r"expected a picture of at most data.max_pixels=178956970 pixels, found 400000000 pixels: "),
        (os.mkfifo, "expected an image file, found a pipe at"),
        (Path.mkdir, "expected an image file, found a folder at"),
        (lambda path: None, "expected an image file, found none at"),
    ],
    ids=["html", "truncated", "checksum", "bomb", "pipe", "folder", "none"],
)
def test_image_that_cannot_be_used_is_said_before_the_model_is_loaded(tmp_path, monkeypatch, make, message):
    """infer opened pictures with other code than training: these were tracebacks, and the pipe waited for ever."""
    monkeypatch.setattr(entry, "load", lambda *arguments: pytest.fail("loaded"))
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(UserError, match=rf"^image: {message}.*a\.png"):
        entry.main(["model=nano", f"image={path}", "prompt=What?", "device=cpu"])


def test_image_given_as_data_uri():
    stream = io.BytesIO()
    Image.new("RGB", (9, 6)).save(stream, "png")
    whole = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    check_images([whole])
    assert DEFAULT_READER.size(*references([whole])) == (9, 6)
    for wrong, problem in ((whole[:60], "truncated image"), (whole[:40] + "*" * 10_000, "cannot be decoded")):
        with pytest.raises(UserError, match=rf"^image: .*{problem}") as caught:
            check_images([wrong])
        assert len(str(caught.value)) < 400


def test_cut_answer_is_said(loaded):
    """An answer of a model of random numbers has no end, unless one of its tokens is taken for the end."""
    config = InferConfig(prompt="What?", max_new_tokens=4)
    answer = infer(loaded, config)
    assert (len(answer["ids"]), answer["cut"], answer["max_new_tokens"]) == (4, True, 4)
    assert notes(answer, config) == ["the answer was cut after 4 tokens, before it had ended; raise max_new_tokens"]
    last = answer["ids"][-1]
    loaded.tokenizer.eos_id = last
    answer = infer(loaded, config)
    assert len(answer["ids"]) < 4
    assert (answer["cut"], notes(answer, config)) == (False, [])


def test_answer_ends_where_the_context_ends(loaded):
    """max_new_tokens=512 after a prompt of 4,000 tokens went on beyond the positions that the model knows."""
    config = InferConfig(prompt="What is this?", max_new_tokens=9)
    tokens = infer(loaded, config)["prompt_tokens"]
    shorten_context(loaded, tokens + 3)
    answer = infer(loaded, config)
    assert (len(answer["ids"]), answer["max_new_tokens"], answer["cut"]) == (3, 3, True)
    assert notes(answer, config) == [
        f"max_new_tokens=9 was taken as 3: the prompt of {tokens} tokens leaves no more room in the model's context",
        "the answer was cut after 3 tokens, before it had ended",
    ]
    shorten_context(loaded, tokens)
    with pytest.raises(
        UserError, match=rf"prompt of {tokens} tokens: expected fewer than the {tokens} that the model was"
    ):
        infer(loaded, config)
    assert [answer_limit(4000, asked, 4096) for asked in (10, 96, 512)] == [10, 96, 96]


def test_prompt_that_is_far_too_long_is_not_encoded(loaded, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode", lambda *arguments, **options: pytest.fail("encoded"))
    with pytest.raises(
        UserError, match=r"prompt of at least \d+ tokens: expected fewer than the 4096 that the model was"
    ):
        infer(loaded, InferConfig(prompt="word " * 100_000))


def test_notes_go_to_stderr_and_the_answer_to_stdout(model_folder, capsys):
    arguments = [f"model={model_folder}", "prompt=What?", "device=cpu", "max_new_tokens=2"]
    assert entry.main([*arguments, "json=true"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["cut"], "note: the answer was cut after 2 tokens" in err) == (True, True)
