"""What somebody should know beside an answer or an export."""

from __future__ import annotations

import sys


def note(text: str) -> None:
    """Print a line on stderr, so that what is printed on stdout stays the answer alone."""
    print(f"note: {text}", file=sys.stderr, flush=True)
