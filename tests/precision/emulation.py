"""16-bit arithmetic on a CPU that has no kernels for it, strict about what a GPU would reject.

Every operator whose operands are bfloat16 or float16 gets them in float32 and has its result rounded back, so that a
whole training step runs as on a GPU: the same dtypes between operators, one rounding an operator, sums in float32.
Gradients too: those of the model's own PyLayers go through the same operators, Paddle's own go through the casts.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from unittest import mock

import paddle
from paddle import _C_ops
from paddle.pir import Value

HALF = (paddle.bfloat16, paddle.float16)
FLOATS = (*HALF, paddle.float32, paddle.float64)
# Their result's dtype is an argument, or they have a CPU kernel that only moves data.
AS_IS = {"cast", "full_like", "empty_like", "assign", "assign_out_", "memcpy", "memcpy_h2d", "memcpy_d2h", "copy_to"}
IN_PLACE = {"scatter_"}  # into the first operand; only generation, which asks for no gradients, writes in place
BINARY = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "pow", "rpow")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
UNARY = ("neg", "abs", "getitem")


class MixedOperands(TypeError):
    """Operands of different floating types: a GPU's kernels refuse them, or Paddle quietly goes on in float32."""


@contextlib.contextmanager
def half_precision_on_cpu(flash: bool = True) -> Iterator[dict[str, int]]:
    """Run 16-bit operators within.

    Args:
        flash: whether attention takes the flash kernel, as on cards from Ampere on, or the plain path, as on a V100.

    Yields:
        How often each operator ran on 16-bit operands.

    Raises:
        MixedOperands: where 16-bit and other floating operands meet in one operator.
    """
    ran: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        for name in dir(_C_ops):
            function = getattr(_C_ops, name)
            if callable(function) and not name.startswith("_") and name not in AS_IS:
                stack.enter_context(mock.patch.object(_C_ops, name, _emulated(name, function, ran)))
        for name in (*BINARY, *COMPARISONS, *UNARY):
            method = f"__{name}__"
            wrapped = _emulated(name, getattr(paddle.Tensor, method), ran)
            stack.enter_context(mock.patch.object(paddle.Tensor, method, wrapped))
        # In batches, as on a GPU: the loop of the CPU adds in place.
        stack.enter_context(mock.patch("vl2.ways.takes_batches", lambda place: True))
        if flash:
            stack.enter_context(mock.patch.object(_C_ops, "flash_attn_unpadded", _flash(ran)))
            stack.enter_context(mock.patch("vl2.attention._has_flash", lambda place: True))
        yield ran


def floating_types(values) -> set:
    """Floating types of the tensors (or values of a static program) among arguments, those in lists included."""
    found = set()
    for value in values:
        if isinstance(value, paddle.Tensor) or (isinstance(value, Value) and value.is_dense_tensor_type()):
            found |= {value.dtype} & set(FLOATS)
        elif isinstance(value, list | tuple):
            found |= floating_types(value)
    return found


def describe(name: str, found: set) -> str:
    """`matmul of bfloat16 and float32`"""
    return f"{name} of {' and '.join(sorted(str(dtype).removeprefix('paddle.') for dtype in found))}"


def _emulated(name: str, function, ran: dict[str, int]):
    def call(*args, **kwargs):
        found = floating_types([*args, *kwargs.values()])
        half = found & set(HALF)
        if not half:
            return function(*args, **kwargs)
        if len(found) > 1:
            raise MixedOperands(describe(name, found))
        if name.endswith("_") and name not in IN_PLACE:
            raise NotImplementedError(f"{name}: no emulation of in-place operators")
        ran[name] = ran.get(name, 0) + 1
        if name in IN_PLACE:
            return paddle.assign(in_float32(getattr(_C_ops, name.removesuffix("_")), args, kwargs), output=args[0])
        return in_float32(function, args, kwargs)

    return call


def in_float32(function, args, kwargs):
    """Call with 16-bit operands cast to float32 and float32 results cast back."""
    (half,) = floating_types([*args, *kwargs.values()])
    args, kwargs = _cast(args, half, "float32"), {name: _cast(value, half, "float32") for name, value in kwargs.items()}
    return _cast(function(*args, **kwargs), paddle.float32, half)


def _cast(value, found, dtype):
    """The value, or every tensor in it, cast where it is of the type `found`."""
    if isinstance(value, paddle.Tensor | Value):
        return value.astype(dtype) if value.dtype == found else value
    return type(value)(_cast(v, found, dtype) for v in value) if isinstance(value, list | tuple) else value


def _flash(ran: dict[str, int]):
    """The variable-length flash kernel: what it demands, and softmax attention in float32."""

    def call(q, k, v, q_bounds, k_bounds, seed, mask, q_longest, k_longest, scale, dropout, causal, *rest):
        check_flash(q, k, v, q_bounds, k_bounds)
        ran["flash_attn_unpadded"] = ran.get("flash_attn_unpadded", 0) + 1
        bounds, outs = q_bounds.tolist(), []
        for start, stop in itertools.pairwise(bounds):
            q_HnK, k_HnK, v_HnK = (x[start:stop].astype("float32").transpose([1, 0, 2]) for x in (q, k, v))
            scores = paddle.matmul(q_HnK, k_HnK, transpose_y=True) * scale
            if causal:
                scores = scores + paddle.triu(paddle.full([stop - start] * 2, -1e30), diagonal=1)
            outs.append(paddle.matmul(paddle.nn.functional.softmax(scores), v_HnK).transpose([1, 0, 2]))
        return paddle.concat(outs).astype(q.dtype), None

    return call


def check_flash(q, k, v, q_bounds, k_bounds) -> None:
    """What flash attention asks of its operands. Source: its own checks (csrc/capi/flash_attn.cu)."""
    assert q.dtype in HALF, f"flash attention: {q.dtype}"
    if len(found := floating_types([q, k, v])) > 1:
        raise MixedOperands(describe("flash_attn_unpadded", found))
    assert q.shape[1:] == k.shape[1:] == v.shape[1:], f"flash attention: {q.shape}, {k.shape}, {v.shape}"
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, f"flash attention: head of {q.shape[-1]}"
    assert q_bounds.dtype == k_bounds.dtype == paddle.int32
