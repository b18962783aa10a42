"""Room for numbers that nobody needs for long: the same memory every time.

New memory costs a CPU as much as a pass over it, and pieces that come and go between others that stay leave holes.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import paddle

from vl2.arrays import written

_CPU = paddle.CPUPlace()
MOST = 1 << 24  # numbers of a room that is kept: one that was needed once, by a crowded expert, would stay for ever
_kept = threading.local()


def scratch(name: str, *shape: int) -> tuple[paddle.Tensor, np.ndarray]:
    """Float32 room on the CPU, as a tensor and as the array that fills it, until its name is asked for again.

    Args:
        name: of what it is for, among all that is computed at the same time on a thread.
        shape: of the room.
    """
    size = math.prod(shape)
    if size > MOST:
        tensor = paddle.empty(shape, "float32", device=_CPU)
        return tensor, written(tensor)
    room = getattr(_kept, name, None)
    if room is None or room.size < size:
        room = paddle.empty([size], "float32", device=_CPU)
        setattr(_kept, name, room)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    tensor = room.as_strided(list(shape), strides)
    return tensor, written(tensor)
