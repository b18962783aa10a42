"""What to type after a run: commands that can be pasted, with a picture and a question of the run's own."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from data.record import Record
from vl2.prompt import IMAGE_PLACEHOLDER

_TRIED = 200  # records
_LONGEST_PROMPT = 200  # characters; a longer one is no example


def next_commands(run_dir: str, records: Sequence[Record]) -> str:
    """The lines that merge the weights and ask the model what one of the records asks.

    Args:
        run_dir: as the user knows it.
        records: conversations, the held-out ones where there are any; the first with a short question about one
            picture that can be named is taken, and without such a one nothing is asked.
    """
    lines = [["export", f"run={run_dir}"]]
    for record in itertools.islice(records, _TRIED):  # each is read and parsed for it
        first = record.messages[0]
        prompt = first.content.removeprefix(IMAGE_PLACEHOLDER).strip()  # without a mark, the picture comes first
        if first.role != "user" or first.content.count(IMAGE_PLACEHOLDER) != 1 or "\n" in prompt:
            continue
        image = record.images[0]
        if 0 < len(prompt) <= _LONGEST_PROMPT and image.kind != "bytes":
            picture = image.name if image.kind == "url" else _as_typed(Path(image.name))
            lines.append(["infer", f"model={run_dir}", f"image={picture}", f"prompt={prompt}"])
            break
    return "\n".join(f"  bash launch.sh {shlex.join(line)}" for line in lines)


def _as_typed(path: Path) -> str:
    """A path below this folder, relative as the user would type it; any other as it is."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
