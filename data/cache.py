"""Where what need not be found out twice is kept."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """Return the usual place: a folder in the user's cache folder, which may be removed at any time."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "deepseek-vl2-finetune"
