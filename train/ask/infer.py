"""`bash launch.sh infer model=FOLDER image=... prompt=...`: one answer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.forms.fields import FieldError
from data.images.files import ImageError
from data.images.reader import DEFAULT_READER
from data.images.ref import ImageRef
from data.turns import parse_messages
from train.ask.answer import answer_limit, check_text, prepare
from train.ask.load import Loaded, load
from train.config.load import load_infer_config
from train.config.schema import InferConfig
from train.machine.devices import use_device
from vl2.errors import UserError
from vl2.generate import generate
from vl2.prompt import IMAGE_PLACEHOLDER, Message
from vl2.tokenizer import Tokenizer


def main(arguments: list[str]) -> int:
    """Entry script."""
    config = load_infer_config(arguments)
    use_device(config.device)
    check_images(config.image)
    started = time.perf_counter()
    loaded = load(config.model, config.precision, config.base, config.check)
    loading = time.perf_counter() - started
    if loaded.source.rehearsal:
        print("note: this model comes from a rehearsal on nano", file=sys.stderr)
    result = {**infer(loaded, config), "load_seconds": round(loading, 3), "rehearsal": loaded.source.rehearsal}
    for note in notes(result, config):
        print(f"note: {note}", file=sys.stderr)
    print(json.dumps(result, ensure_ascii=False) if config.json else result["text"])
    return 0


def infer(loaded: Loaded, config: InferConfig) -> dict[str, Any]:
    """The answer to a prompt or a conversation.

    Returns:
        ids, text, prompt_tokens, max_new_tokens (fewer than asked for where the context has less room), cut (whether
        the answer reached them before its end), prepare_seconds (images and text) and generate_seconds.
    """
    started = time.perf_counter()
    messages = conversation(config, loaded.tokenizer)
    context = loaded.model.config.language.max_position_embeddings
    check_text(messages, loaded.tokenizer, context)
    prompt = prepare(messages, references(config.image), loaded)
    prompt_tokens = len(prompt["input_ids"])
    limit = answer_limit(prompt_tokens, config.max_new_tokens, context)
    prepared = time.perf_counter()
    (ids,) = generate(
        loaded.model,
        [prompt],
        eos_id=loaded.tokenizer.eos_id,
        max_new_tokens=limit,
        temperature=config.temperature,
        top_p=config.top_p,
        chunk=config.chunk or None,
        seed=config.seed,
    )
    return {
        "ids": ids,
        "text": loaded.tokenizer.decode(ids),
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": limit,
        "cut": len(ids) == limit,
        "prepare_seconds": round(prepared - started, 3),
        "generate_seconds": round(time.perf_counter() - prepared, 3),
    }


def notes(result: Mapping[str, Any], config: InferConfig) -> list[str]:
    """What somebody who reads the answer should know of its length."""
    limit, found = result["max_new_tokens"], []
    if limit < config.max_new_tokens:
        found.append(
            f"max_new_tokens={config.max_new_tokens} was taken as {limit}: the prompt of {result['prompt_tokens']} "
            "tokens leaves no more room in the model's context"
        )
    if result["cut"]:
        found.append(
            f"the answer was cut after {limit} tokens, before it had ended"
            + ("" if found else "; raise max_new_tokens")
        )
    return found


def references(paths: Sequence[str]) -> list[ImageRef]:
    """The pictures that were typed."""
    return [ImageRef(kind="file", name=path) for path in paths]


def check_images(paths: Sequence[str]) -> None:
    """Find an image that cannot be used before the model is loaded, which takes longer.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    for image in references(paths):
        try:
            DEFAULT_READER.size(image)
        except ImageError as error:
            raise UserError(f"image: {error}") from error


def conversation(config: InferConfig, tokenizer: Tokenizer) -> tuple[Message, ...]:
    """The messages of `messages=FILE`, or of `prompt=`, whose images come first where no <image> says otherwise.

    Raises:
        UserError: a file that is not a JSON list of messages, special tokens typed into a text, a last message that
            is not a user's, or a number of <image> that is not the number of images.
    """
    if config.messages:
        return read_messages(config.messages, len(config.image), tokenizer)
    text = config.prompt
    if IMAGE_PLACEHOLDER not in text:
        text = f"{IMAGE_PLACEHOLDER}\n" * len(config.image) + text
    return _checked([{"role": "user", "content": text}], len(config.image), tokenizer, "prompt")


def read_messages(path: str, num_images: int, tokenizer: Tokenizer) -> tuple[Message, ...]:
    """A conversation from a JSON file: a list of {"role": ..., "content": ...} that ends with a user's message."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"messages={path}: no such file")
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise UserError(f"messages={path}: nested too deeply to be read") from None
    except ValueError as error:
        raise UserError(f"messages={path}: not JSON ({error})") from error
    return _checked(value, num_images, tokenizer, path)


def _checked(value: Any, num_images: int, tokenizer: Tokenizer, where: str) -> tuple[Message, ...]:
    try:
        messages: Sequence[Message] = parse_messages(value, tokenizer=tokenizer)
    except FieldError as error:
        raise UserError(f"{where}: {error.where}: {error.problem}") from error
    if not messages or messages[-1].role != "user":
        raise UserError(f"{where}: the last message must be a user's, so that there is something to answer")
    placeholders = sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages)
    if placeholders != num_images:
        raise UserError(f"{where}: {placeholders} {IMAGE_PLACEHOLDER} for {num_images} images; give image= for each")
    return tuple(messages)
