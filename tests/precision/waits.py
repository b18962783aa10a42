"""Where the host waits for a GPU in a run, counted without one: `waits()`.

It waits where a number comes to the host, where host data is sent (Paddle's copies from pageable memory block), and in
operators whose result's size is found on the device. Each place counts as often as it is passed.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import paddle
from paddle import _C_ops

from tests.places import ROOT

READS = ("numpy", "tolist", "item", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
# Their kernels for GPUs copy a size to the host before they can make room for the result.
SIZED = ("bincount", "histogram", "nonzero", "masked_select", "unique", "unique_consecutive", "memcpy_d2h")
SIZED += ("repeat_interleave_with_tensor_index", "index_put", "index_put_", "memcpy_h2d")


@contextlib.contextmanager
def waits() -> Iterator[Counter[str]]:
    """Count within, by what and where: `tolist vl2/expert_rows.py:86`."""
    found: Counter[str] = Counter()
    inside = [False]

    def watched(name: str, function, counts=lambda *args: True):
        def call(*args, **kwargs):
            if inside[0] or not counts(*args):
                return function(*args, **kwargs)
            inside[0] = True
            try:
                found[f"{name.strip('_')} {_place()}"] += 1
                return function(*args, **kwargs)
            finally:
                inside[0] = False

        return call

    with contextlib.ExitStack() as stack:
        for name in READS:
            method = watched(name, getattr(paddle.Tensor, name))
            stack.enter_context(mock.patch.object(paddle.Tensor, name, method))
        for name in ("__getitem__", "__setitem__"):
            method = watched(name, getattr(paddle.Tensor, name), _sends)
            stack.enter_context(mock.patch.object(paddle.Tensor, name, method))
        setter = watched("set_value", paddle.Tensor.set_value, lambda _, value: not isinstance(value, paddle.Tensor))
        stack.enter_context(mock.patch.object(paddle.Tensor, "set_value", setter))
        to_tensor = watched("to_tensor", paddle.to_tensor, lambda data, *_: not isinstance(data, paddle.Tensor))
        stack.enter_context(mock.patch.object(paddle, "to_tensor", to_tensor))
        for name in SIZED:
            if function := getattr(_C_ops, name, None):
                stack.enter_context(mock.patch.object(_C_ops, name, watched(name, function)))
        yield found


def _sends(tensor, index, *value) -> bool:
    """Whether an index or what is written is host data: a list or an array; numbers and slices are not."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list | np.ndarray) for part in (*parts, *value))


def _place() -> str:
    """The innermost line of the product: `vl2/expert_rows.py:86`."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("vl2", "train", "data"):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "?"
