"""`bash launch.sh infer model=FOLDER image=... prompt=...`: one answer."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.answer_boxes import read_boxes
from data.forms.fields import FieldError
from data.images.files import ImageError
from data.images.reader import MOST_PIXELS, ImageReader
from data.images.ref import ImageRef, image_ref
from data.images.web_cache import default_folder
from data.turns import parse_messages
from train.ask.answer import answer_limit, check_text, prepare
from train.ask.drawing import box_row, check_drawing, write_drawings
from train.ask.load import Loaded, load
from train.config.load import load_infer_config
from train.config.schema import InferConfig
from train.machine.devices import use_device
from train.store.checkpoints import chosen_checkpoint
from vl2.errors import UserError
from vl2.generate import generate
from vl2.prompt import IMAGE_PLACEHOLDER, Message
from vl2.tokenizer import Tokenizer


def main(arguments: list[str]) -> int:
    """Entry script."""
    config = load_infer_config(arguments)
    use_device(config.device, tf32=config.tf32)
    if config.draw:
        check_drawing(Path(config.draw), len(config.image))
    check_images(config.image)
    started = time.perf_counter()
    folder = chosen_checkpoint(config.model, config.checkpoint)
    loaded = load(folder, config.precision, config.base, config.check, config.frozen)
    loading = time.perf_counter() - started
    if loaded.source.rehearsal:
        print("note: this model comes from a rehearsal on nano", file=sys.stderr)
    result = {**infer(loaded, config), "load_seconds": round(loading, 3), "rehearsal": loaded.source.rehearsal}
    for note in notes(result, config):
        print(f"note: {note}", file=sys.stderr)
    if config.json:
        print(json.dumps(result, ensure_ascii=False))
        return 0
    print(result["text"], flush=True)
    for row in result["boxes"]:
        print(f"box: {json.dumps(row, ensure_ascii=False)}", file=sys.stderr)
    return 0


def infer(loaded: Loaded, config: InferConfig) -> dict[str, Any]:
    """The answer to a prompt or a conversation.

    Returns:
        ids, text, boxes (`box_row` of each, in pixels), malformed_boxes (how many could not be read), prompt_tokens,
        max_new_tokens (fewer than asked for where the context has less room), cut (whether the answer reached them
        before its end), prepare_seconds (images and text), generate_seconds, and with `draw` drawn (the files).
    """
    started = time.perf_counter()
    loaded = dataclasses.replace(loaded, images=_trusting(loaded.images))
    images = references(config.image)
    messages = conversation(config, loaded.tokenizer)
    context = loaded.model.config.language.max_position_embeddings
    check_text(messages, loaded.tokenizer, context)
    prompt = prepare(messages, images, loaded)
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
    text = loaded.tokenizer.decode(ids)
    seconds = time.perf_counter() - prepared
    read = read_boxes(text, [loaded.images.size(image) for image in images])
    drawn = {}
    if config.draw:
        shown = [loaded.images.decode(image) for image in images]
        drawn["drawn"] = [str(path) for path in write_drawings(Path(config.draw), shown, read.boxes)]
    return {
        "ids": ids,
        "text": text,
        "boxes": [box_row(each) for each in read.boxes],
        "malformed_boxes": read.malformed,
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": limit,
        "cut": len(ids) == limit,
        "prepare_seconds": round(prepared - started, 3),
        "generate_seconds": round(seconds, 3),
        **drawn,
    }


def notes(result: Mapping[str, Any], config: InferConfig) -> list[str]:
    """What somebody who reads the answer should know of its length and its boxes."""
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
    if result["malformed_boxes"]:
        found.append(f"{result['malformed_boxes']} boxes of the answer cannot be read, and are left out")
    if config.draw and not result["boxes"]:
        found.append(f"the answer has no boxes, so {config.draw} shows none")
    return found


def references(names: Sequence[str]) -> list[ImageRef]:
    """The pictures that were typed: files, addresses, data URIs.

    Raises:
        UserError: what names no picture.
    """
    try:
        return [image_ref(name, Path.cwd()) for name in names]
    except UserError as error:
        raise UserError(f"image: {error}") from error


def _trusting(images: ImageReader) -> ImageReader:
    """A reader for what the user typed, who may well mean a machine nearby, or a picture larger than a data set's."""
    return dataclasses.replace(images, allow_private_urls=True, max_pixels=MOST_PIXELS)


def check_images(paths: Sequence[str]) -> None:
    """Find an image that cannot be used before the model is loaded, which takes longer.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    reader = _trusting(ImageReader(cache=default_folder()))
    for image in references(paths):
        try:
            reader.size(image)
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
