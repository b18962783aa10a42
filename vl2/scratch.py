"""Room for numbers that nobody needs for long: the same memory every time.

New memory costs a CPU as much as a pass over it, and pieces that come and go between others that stay leave holes.
"""

from __future__ import annotations

import math
import threading

import numpy as np

from vl2.arrays import empty

MOST = 1 << 24  # numbers of a room that is kept: one that was needed once, by a crowded expert, would stay for ever
_kept = threading.local()


def scratch(name: str, *shape: int) -> np.ndarray:
    """Room for float32 numbers, until its name is asked for again.

    Args:
        name: of what it is for, among all that is computed at the same time on a thread.
        shape: of the room.
    """
    size = math.prod(shape)
    if size > MOST:
        return empty(shape)[1]
    room = getattr(_kept, name, None)
    if room is None or room.size < size:
        room = empty([size])[1]
        setattr(_kept, name, room)
    return room[:size].reshape(shape)
