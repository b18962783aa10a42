"""Which modules the regular expressions of a foreign configuration mean, in bounded time and memory.

Python's `re` backtracks: `(\\w|\\w\\w)*x` on a module's name runs for years, and no setting limits it. It matches in a
process of its own that the operating system ends, by the rules of PEFT and PaddleNLP, which use it too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vl2.adapter.values import shown
from vl2.errors import UserError

# The groups' own expressions take less than a tenth of a second on the 6,600 Linears of the full model.
CPU_SECONDS = 10
MEMORY_BYTES = 1 << 30


class Expression(NamedTuple):
    """A regular expression of a configuration, which must match all of a module's name."""

    key: str  # where it stands
    text: str
    ends: bool = False  # an end of the name after a dot will do, as in PEFT's rank_pattern


def matched(path: Path, expressions: Sequence[Expression], names: Sequence[str]) -> list[frozenset[str]]:
    """The names that each expression matches.

    Args:
        path: of the configuration, for errors.
        expressions: not trusted.
        names: official names of modules.

    Raises:
        UserError: one is no regular expression, or takes too long or too much memory.
    """
    if not expressions:
        return []
    request = {"names": list(names), "expressions": [[text, ends] for _, text, ends in expressions]}
    script = Path(__file__).with_name("match_names.py")
    ended = subprocess.run(
        [sys.executable, "-I", "-S", str(script), str(CPU_SECONDS), str(MEMORY_BYTES)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if ended.returncode > 0 and "MemoryError" not in ended.stderr:
        raise RuntimeError(ended.stderr)
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    for expression, answer in zip(expressions, answers):
        if isinstance(answer, dict):
            raise UserError(
                f"{path}: {expression.key} holds {shown(expression.text)}, which is no regular expression "
                f"({answer['error']})"
            )
    if len(answers) < len(expressions):
        culprit = expressions[len(answers)]
        raise UserError(
            f"{path}: {culprit.key} holds {shown(culprit.text)}, which takes more than {CPU_SECONDS} s or "
            f"{MEMORY_BYTES >> 30} GB to match with the names of the model's modules; write it without repeats inside "
            "repeats"
        )
    return [frozenset(names[index] for index in answer) for answer in answers]
