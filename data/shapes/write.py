"""Rows and PNG files of the shapes data, written once and reused."""

import fcntl
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from data.shapes.draw import draw
from data.shapes.lessons import repeat_lesson, translate_lesson
from data.shapes.questions import Question, chinese_questions, preamble, questions
from data.shapes.scene import KINDS, Scene, sample_scene
from vl2.errors import UserError

TASKS = ("pretrain", "chinese")
SPLITS = ("train", "test")

# Raise it with every change of what a seed draws or asks: folders written before are then made anew.
_VERSION = 5

# Of the pictures of the pre-training task, how many of each kind; "images" are two or three of "one".
# "turns" are two or three of "one" too, but each is shown in its own turn. What 2 million weights learn in half an hour
# decides the shares: several shapes in a picture, and asking back for an image by its number, take far longer.
_PRETRAIN_LAYOUTS = {"one": 6, "turns": 6, "four": 0.4, "nine": 0.1, "images": 0.4}
# So many rows come first that show one shape each: colours and forms are learned there in a few hundred rows, of
# which the whole mix needs several thousand.
_PRETRAIN_WARM_UP = 1000
_PRETRAIN_KINDS = {"what": 4, "place": 5, "place_zh": 2, "image": 5, "exists": 0.7, "list": 1.5, "which": 2}
_CHINESE_LAYOUTS = {"one": 1, "turns": 1}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation: its turns, and its pictures in the order of their places in the text."""

    scenes: tuple[Scene, ...]
    preamble: str
    turns: tuple[Question, ...]


def write_shapes(
    folder: str | Path,
    *,
    task: str,
    split: str,
    count: int,
    seed: int,
    text_share: float = 0.1,
    wide_share: float = 0.05,
) -> Path:
    """Write `count` conversations about pictures of shapes and return the path of their JSONL.

    Everything goes to `folder/split`. What an earlier call with the same arguments wrote is used again; what one with
    other arguments wrote is replaced.

    Args:
        folder: Where to write.
        task: "pretrain" (English, many kinds of questions, text-only lessons) or "chinese" (Chinese answers).
        split: "train" (several turns a row) or "test" (one turn a row); no picture is in both.
        count: Number of conversations.
        seed: Row i depends on (task, split, seed, i) and the shares only.
        text_share: Part of the "pretrain" rows that are text only.
        wide_share: Part of the "pretrain" rows with pictures whose picture is 768 x 384 or 384 x 768: two local tiles.

    Raises:
        UserError: `task` or `split` is unknown, or `folder/split` holds files that did not come from here.
    """
    arguments = {
        "task": task,
        "split": split,
        "count": count,
        "seed": seed,
        "text_share": text_share,
        "wide_share": wide_share,
        "version": _VERSION,
    }
    source = rows(task=task, split=split, count=count, seed=seed, text_share=text_share, wide_share=wide_share)
    target = Path(folder) / split
    jsonl = target / f"{task}.jsonl"
    if _manifest(target) == arguments:
        return jsonl
    if target.exists() and _manifest(target) is None:
        raise UserError(
            f"{target}: expected an absent folder or one with generated shapes (shapes.json), found other "
            "files; choose another folder or remove it"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed when whole, so that an interrupted run or a second process never leaves half a folder.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=target.parent))
    try:
        _write_rows(unfinished, task, source)
        (unfinished / "shapes.json").write_text(json.dumps(arguments, indent=2) + "\n", "utf-8")
        unfinished.chmod(0o755)
        _put(unfinished, target, arguments)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return jsonl


def rows(
    *, task: str, split: str, count: int, seed: int, text_share: float = 0.1, wide_share: float = 0.05
) -> Iterator[Row]:
    """The conversations that write_shapes writes, with the same arguments."""
    for name, value, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in known:
            raise UserError(f"shapes.{name}: expected one of {', '.join(known)}, found {value!r}")
    if task == "chinese":
        return (_chinese_row(index, split, seed) for index in range(count))
    return (
        _pretrain_row(
            random.Random(f"pretrain/{split}/{seed}/{index}"),
            split,
            text_share,
            wide_share,
            warm_up=split == "train" and index < _PRETRAIN_WARM_UP,
        )
        for index in range(count)
    )


def _pretrain_row(rng: random.Random, split: str, text_share: float, wide_share: float, *, warm_up: bool) -> Row:
    one_turn = split == "test"
    # A lesson is no question about a picture, so none is asked in the test.
    if not (warm_up or one_turn) and rng.random() < text_share:
        lessons = [repeat_lesson, repeat_lesson, translate_lesson]
        turns = tuple(rng.choice(lessons)(rng) for _ in range(1 if one_turn else rng.randint(1, 3)))
        return Row(scenes=(), preamble="", turns=turns)
    if warm_up:
        layout = "one"
    elif rng.random() < wide_share:
        layout = rng.choice(("wide", "tall"))
    else:
        layout = _choose(rng, _PRETRAIN_LAYOUTS)
    if layout == "turns":
        return _row_of_turns(rng, _different(rng, split, rng.choice(KINDS)), questions, 1 if one_turn else 3)
    scenes = _scenes(rng, layout, split)
    num_turns = 1 if one_turn else rng.randint(4, 6) if layout == "one" else rng.randint(8, 12)
    turns = _pick_turns(rng, questions(scenes), num_turns)
    return Row(scenes=scenes, preamble=preamble(len(scenes)), turns=turns)


def _chinese_row(index: int, split: str, seed: int) -> Row:
    rng = random.Random(f"chinese/{split}/{seed}/{index}")
    # In each run of 30 rows each of the 30 answers is once the last, so that none is worth guessing.
    block, place = divmod(index, len(KINDS))
    last = random.Random(f"chinese/answers/{split}/{seed}/{block}").sample(KINDS, len(KINDS))[place]
    if _choose(rng, _CHINESE_LAYOUTS) == "turns":
        scenes = _different(rng, split, last)
    else:
        scenes = (sample_scene(rng, "one", split=split, kinds=[last]),)
    if split == "test":
        return _row_of_turns(rng, scenes, _what_in_chinese, 1)
    return _row_of_turns(rng, scenes, chinese_questions, 3)


def _what_in_chinese(scenes: Sequence[Scene]) -> list[Question]:
    return [question for question in chinese_questions(scenes) if question.kind == "what"]


def _scenes(rng: random.Random, layout: str, split: str) -> tuple[Scene, ...]:
    if layout != "images":
        return (sample_scene(rng, layout, split=split),)
    return _different(rng, split, rng.choice(KINDS))


def _different(rng: random.Random, split: str, last: tuple[str, str]) -> tuple[Scene, ...]:
    """Two or three pictures of one shape each, all different; the last one shows `last`."""
    others = rng.sample([kind for kind in KINDS if kind != last], rng.randint(1, 2))
    return tuple(sample_scene(rng, "one", split=split, kinds=[shown]) for shown in [*others, last])


def _row_of_turns(
    rng: random.Random, scenes: Sequence[Scene], ask: Callable[[Sequence[Scene]], list[Question]], most: int
) -> Row:
    """Each picture in a turn of its own, asked about at once, up to `most` times."""
    turns: list[Question] = []
    for scene in scenes:
        first, *more = _pick_turns(rng, ask([scene]), rng.randint(1, most))
        turns += [replace(first, text=f"<image>\n{first.text}"), *more]
    return Row(scenes=tuple(scenes), preamble="", turns=tuple(turns))


def _pick_turns(rng: random.Random, asked: Sequence[Question], count: int) -> tuple[Question, ...]:
    """Different questions, a kind first: no kind repeats an answer, so neither "no" nor "nothing" can prevail."""
    left = list(asked)
    picked: list[Question] = []
    while left and len(picked) < count:
        kinds = dict.fromkeys(question.kind for question in left)
        kind = _choose(rng, {kind: _PRETRAIN_KINDS.get(kind, 1) for kind in kinds})
        answer = rng.choice(list(dict.fromkeys(question.answer for question in left if question.kind == kind)))
        turn = rng.choice([question for question in left if (question.kind, question.answer) == (kind, answer)])
        left = [question for question in left if (question.kind, question.answer) != (kind, answer)]
        picked.append(turn)
    return tuple(picked)


def _choose(rng: random.Random, weights: Mapping[str, float]) -> str:
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def _write_rows(folder: Path, task: str, source: Iterator[Row]) -> None:
    (folder / "images").mkdir()
    with open(folder / f"{task}.jsonl", "w", encoding="utf-8") as file:
        for index, row in enumerate(source):
            images = [f"images/{index:06d}-{number}.png" for number in range(1, len(row.scenes) + 1)]
            for name, scene in zip(images, row.scenes, strict=True):
                draw(scene).save(folder / name, compress_level=1)
            messages = []
            for number, turn in enumerate(row.turns):
                content = turn.text if number else row.preamble + turn.text
                messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
            file.write(json.dumps({"messages": messages, "images": images}, ensure_ascii=False) + "\n")


def _manifest(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "shapes.json").read_text("utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def _put(unfinished: Path, target: Path, arguments: dict) -> None:
    """Give the finished folder its name; if another process was faster with the same arguments, its folder stays."""
    with _locked(target.parent):
        if _manifest(target) == arguments:
            return
        if target.exists():
            outdated = Path(tempfile.mkdtemp(prefix=".outdated-", dir=target.parent))
            os.rename(target, outdated)
            shutil.rmtree(outdated)
        os.rename(unfinished, target)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, a file in it that is removed at the end; nothing where there are no locks."""
    path, held = folder / ".lock", False
    while not held:
        with open(path, "ab") as lock:  # for appending: NFS locks only what is open for writing
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed
            with suppress(FileNotFoundError):  # its last holder removed it between our two calls
                held = os.path.samestat(os.fstat(lock.fileno()), path.stat())
            if held:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
