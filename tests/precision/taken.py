"""Which of Paddle's operators a run takes, with the types of their operands: what a GPU must have kernels for.

To be used within the emulation of 16-bit arithmetic, whose own casts are left out. Gradients run outside Python: a call
that has operands with gradients is marked, and its operator's gradient is taken as well.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import paddle
from paddle import _C_ops

BINARY = {"add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "matmul": "matmul"}
BINARY |= {"pow": "elementwise_pow", "mod": "remainder", "floordiv": "floor_divide"}
BINARY |= {"lt": "less_than", "le": "less_equal", "gt": "greater_than", "ge": "greater_equal"}
BINARY |= {"eq": "equal", "ne": "not_equal", "and": "bitwise_and", "or": "bitwise_or"}
REFLECTED = {f"r{name}": BINARY[name] for name in ("add", "sub", "mul", "truediv", "pow")}
# A floating tensor and a number.
SCALING = dict.fromkeys(("add", "radd", "sub", "rsub", "mul", "rmul"), "scale") | {"truediv": "div_scale"}
UNARY = {"neg": "scale", "abs": "abs", "invert": "bitwise_not"}


class Call(NamedTuple):
    """An operator as it was called."""

    operator: str
    arguments: tuple  # types of tensors ("float32") and data types; tuples of them for lists; None for all else
    named: tuple  # (name, the same) of those given by name
    result: str | None  # type of the first tensor that came out
    gradient: bool  # whether a gradient will be asked of it


@contextlib.contextmanager
def taken() -> Iterator[set[Call]]:
    """Record what is called within."""
    calls: set[Call] = set()
    inside = [False]

    def watched(name: str, function):
        def call(*args, **kwargs):
            if inside[0]:
                return function(*args, **kwargs)
            inside[0] = True
            try:
                result = function(*args, **kwargs)
            finally:
                inside[0] = False
            values = [*args, *kwargs.values()]
            calls.add(
                Call(
                    operator=_operator(name, args),
                    arguments=tuple(map(_type, args)),
                    named=tuple((key, _type(value)) for key, value in kwargs.items()),
                    result=next((one for one in _flat(_type(result)) if one), None),
                    gradient=paddle.is_grad_enabled() and any(map(_trains, values)),
                )
            )
            return result

        return call

    with contextlib.ExitStack() as stack:
        for name in dir(_C_ops):
            function = getattr(_C_ops, name)
            if callable(function) and not name.startswith("_"):
                stack.enter_context(mock.patch.object(_C_ops, name, watched(name, function)))
        for name in (*BINARY, *REFLECTED, *UNARY, "getitem", "setitem"):
            method = f"__{name}__"
            wrapped = watched(method, getattr(paddle.Tensor, method))
            stack.enter_context(mock.patch.object(paddle.Tensor, method, wrapped))
        yield calls


def _operator(name: str, args: tuple) -> str:
    """The operator that stands behind a method of tensors; a number beside a tensor becomes part of a `scale`."""
    if not name.startswith("__"):
        return name
    bare = name.strip("_")
    if bare in ("getitem", "setitem"):
        return _index(bare, args[1])
    if bare in UNARY:
        return UNARY[bare]
    operator = BINARY.get(bare) or REFLECTED[bare]
    if bare in SCALING and "float" in str(args[0].dtype) and isinstance(args[1], numbers.Number):
        return SCALING[bare]
    return operator


def _index(method: str, index) -> str:
    indices = index if isinstance(index, tuple) else (index,)
    if all(isinstance(one, int | slice) or one in (None, Ellipsis) for one in indices):
        if method == "setitem":
            return "set_value"
        steps = [one.step for one in indices if isinstance(one, slice)]
        return "strided_slice" if any(step not in (None, 1) for step in steps) else "slice"
    return "index_elementwise_get" if method == "getitem" else "index_elementwise_put"


def _type(value):
    if isinstance(value, paddle.Tensor):
        return str(value.dtype).removeprefix("paddle.")
    if isinstance(value, list | tuple) and any(isinstance(one, paddle.Tensor) for one in value):
        return tuple(map(_type, value))
    return str(value).removeprefix("paddle.") if isinstance(value, paddle.dtype) else None


def _flat(types) -> list:
    return [one for part in types for one in _flat(part)] if isinstance(types, tuple) else [types]


def _trains(value) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_trains, value))
    return isinstance(value, paddle.Tensor) and not value.stop_gradient
