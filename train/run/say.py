"""What a run says to people: by rank 0 alone."""

from __future__ import annotations

import sys
from typing import TextIO

import paddle.distributed as dist


def say(text: str, file: TextIO | None = None) -> None:
    """Print a text at once, if there is one and this is rank 0.

    Args:
        file: where to; None: standard output.
    """
    if text and dist.get_rank() == 0:
        print(text, file=file or sys.stdout, flush=True)
