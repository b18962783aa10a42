"""The chat template against the official processor on 14 conversations, and its refusals."""

import json

import numpy as np
import pytest

from tests.places import GOLDENS, NANO_BPE
from vl2.prompt import IGNORE, Message, render
from vl2.tiles import num_image_tokens, num_tiles, tile_grid
from vl2.tokenizer import Tokenizer

CONVERSATIONS = json.loads((GOLDENS / "processor" / "conversations.json").read_text())
CANDIDATES = [(w, h) for w, h in json.loads((GOLDENS / "processor" / "images.json").read_text())["candidates"]]
ROLES = {"<|User|>": "user", "<|Assistant|>": "assistant"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(NANO_BPE)


def expand(runs: list) -> list[int]:
    """[0, [976, 3], 5] is [0, 976, 976, 976, 5]."""
    return [number for run in runs for number in ([run[0]] * run[1] if isinstance(run, list) else [run])]


def read(name: str) -> tuple[list[Message], list[tuple[int, int]]]:
    golden = CONVERSATIONS[name]
    messages = [Message(ROLES.get(m["role"], m["role"]), m["content"]) for m in golden["conversation"]]
    sizes = golden["image_sizes"]
    return messages, [tile_grid((w, h), len(sizes), CANDIDATES) for w, h in sizes]


def test_there_are_14_conversations():
    assert len(CONVERSATIONS) == 14


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("inference_mode", [False, True])
def test_conversation_equals_official(tokenizer, name, inference_mode):
    golden = CONVERSATIONS[name][f"inference_mode={inference_mode}"]
    messages, grids = read(name)
    rendered = render(messages, grids, tokenizer)
    num_ids = len(rendered.input_ids) - (1 if inference_mode else 0)  # the official inference mode drops the last EOS
    input_ids = rendered.input_ids[:num_ids]
    assert input_ids.tolist() == expand(golden["input_ids"])
    assert (input_ids == tokenizer.image_id).astype(int).tolist() == expand(golden["images_seq_mask"])
    # Ours are shifted, and the BOS, which the official code leaves a target, has no position that predicts it.
    assert rendered.labels[: num_ids - 1].tolist() == expand(golden["target_ids"])[1:]
    assert rendered.labels[-1] == IGNORE

    assert [list(grid) for grid in grids or [(0, 0)]] == golden["spatial_crop"]
    assert [num_image_tokens(grid) for grid in grids] == golden["num_image_tokens"]
    if grids:  # without images the official code makes one black tile; we make none
        assert sum(num_tiles(grid) for grid in grids) == golden["num_tiles"]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_generation_prompt_is_the_training_prefix(tokenizer, name):
    """What inference feeds is what training fed before the answer, to the id."""
    messages, grids = read(name)
    whole = render(messages, grids, tokenizer)
    prompt = render(messages[:-1], grids, tokenizer, for_generation=True)
    length = len(prompt.input_ids)
    assert prompt.input_ids.tolist() == whole.input_ids[:length].tolist()
    answer = tokenizer.encode(messages[-1].content.strip())
    assert whole.input_ids[length:].tolist() == [*answer, tokenizer.eos_id]
    assert whole.labels[length - 1 :].tolist() == [*answer, tokenizer.eos_id, IGNORE]


def test_generation_prompt_equals_official_empty_answer(tokenizer):
    """In the official code a prompt is a conversation whose last answer is empty."""
    messages, grids = read("empty_assistant")
    prompt = render(messages[:1], grids, tokenizer, for_generation=True)
    assert prompt.input_ids.tolist() == expand(CONVERSATIONS["empty_assistant"]["inference_mode=True"]["input_ids"])
    assert (prompt.labels == IGNORE).all()


def test_shapes_and_shift(tokenizer):
    rendered = render([Message("user", "One"), Message("assistant", "1")], [], tokenizer)
    assert rendered.input_ids.dtype == rendered.labels.dtype == np.int64
    assert rendered.input_ids.tolist() == [0, 982, 28, 522, 80, 71, 201, 201, 983, 28, 19, 1]
    assert rendered.labels.tolist() == [-100] * 9 + [19, 1, -100]


def test_empty_user_turn_drops_space_and_blank_lines(tokenizer):
    rendered = render([Message("user", " \n"), Message("assistant", "1")], [], tokenizer)
    assert rendered.input_ids.tolist() == [0, 982, 28, 983, 28, 19, 1]


def test_plain_message_makes_no_special_token(tokenizer):
    text = "Say <|Assistant|> and <｜end▁of▁sentence｜> please, <|ref|>x<|/ref|>"
    answer = Message("assistant", "ok <|User|>", plain=True)
    ids = render([Message("user", text, plain=True), answer], [], tokenizer).input_ids.tolist()
    counts = {token: ids.count(index) for token, index in tokenizer.special_ids.items() if index in ids}
    assert counts == {
        "<｜begin▁of▁sentence｜>": 1,
        "<｜end▁of▁sentence｜>": 1,
        "<|ref|>": 1,
        "<|/ref|>": 1,
        "<|User|>": 1,
        "<|Assistant|>": 1,
    }
    assert text in tokenizer.decode(ids)


def test_plain_message_still_shows_its_images(tokenizer):
    messages = [Message("user", "<image> <|User|>", plain=True), Message("assistant", "d")]
    ids = render(messages, [(1, 1)], tokenizer).input_ids.tolist()
    assert ids.count(tokenizer.image_id) == 421


@pytest.mark.parametrize("grids", [[], [(1, 1), (1, 1)]])
def test_number_of_placeholders(tokenizer, grids):
    messages = [Message("user", "<image>"), Message("assistant", "d")]
    with pytest.raises(ValueError, match=f"found 1 <image> in the messages for {len(grids)} images"):
        render(messages, grids, tokenizer)


def test_placeholder_in_an_answer(tokenizer):
    messages = [Message("user", "draw"), Message("assistant", "<image>")]
    with pytest.raises(ValueError, match=r"messages\[1\]: <image> in a turn of role 'assistant'"):
        render(messages, [(1, 1)], tokenizer)


def test_system_must_be_first(tokenizer):
    messages = [Message("user", "a"), Message("system", "b"), Message("assistant", "c")]
    with pytest.raises(ValueError, match=r"messages\[1\]: a system message must be the first"):
        render(messages, [], tokenizer)


def test_generation_needs_a_question(tokenizer):
    with pytest.raises(ValueError, match="the last message must be a user's, found: assistant"):
        render([Message("user", "a"), Message("assistant", "b")], [], tokenizer, for_generation=True)


def test_an_answer_that_is_not_learned_is_read_all_the_same(tokenizer):
    """`"loss": false` on a message was ignored: the answer was trained."""
    questions = [Message("user", "One"), Message("user", "Two")]
    learned = [questions[0], Message("assistant", "1"), questions[1], Message("assistant", "2")]
    once = [questions[0], Message("assistant", "1", learn=False), questions[1], Message("assistant", "2")]
    both, last = render(learned, [], tokenizer), render(once, [], tokenizer)
    assert (both.input_ids == last.input_ids).all()
    answer = [*tokenizer.encode("2"), tokenizer.eos_id]
    assert last.labels[last.labels != IGNORE].tolist() == answer
    assert both.labels[both.labels != IGNORE].tolist() == [*tokenizer.encode("1"), tokenizer.eos_id, *answer]
    assert (last.labels[-len(answer) - 1 :] == both.labels[-len(answer) - 1 :]).all()
