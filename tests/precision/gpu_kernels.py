"""Whether a CUDA build of Paddle has a kernel for each operator that a run took, and for its type.

`gpu_kernels.json` is made by `make_gpu_kernels.py` from Paddle's sources. They are of 2025-02-17 (between 3.0.0-rc1 and
3.0.0), the newest that could be had whole: the version differs from the 3.3.1 that is installed. What 3.3.1 has and
these sources lack stands in `LATER`, read from the later file that is named there.

What the table cannot say: which kernels a wheel has compiled code for on a card (sm_70, sm_75, sm_120), and what a
kernel checks when it runs: bfloat16 products below capability 8.0 (cuBLAS), flash attention below 8.0 and its backward
pass at a head of 192 on sm_89. Kernels whose types depend on CUDA, cuDNN or NCCL carry these types as a third entry in
the table: bfloat16 of `layer_norm`, `softmax`, `rms_norm_grad` (CUDA 11.0), of convolutions (cuDNN 8.1), and of
everything that NCCL sends (2.10). A wheel for CUDA 12 has them all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tests.precision.taken import Call

ALL = "all"
# Kernels that are newer than the table, read in a later file of Paddle: (types, "COMMIT:FILE").
LATER = {
    "linear_v2": (
        "bfloat16 float16 float32 float64",
        "c3cfb1bcc72fac3c58e156f7b0e47088a9ab4985:paddle/phi/kernels/gpu/linear_v2_kernel.cu",
    ),
    "linear_v2_grad": (
        "bfloat16 float16 float32 float64",
        "19abc01f3e6ec900d2696bc773a4dbe2ebc2dd37:paddle/phi/kernels/gpu/linear_v2_grad_kernel.cu",
    ),
}
# Kernels that 3.3.1 has and no source that could be had: (types that are granted, why). Others are faults until tried.
UNSEEN = {
    "div_scale": (
        "float32",
        "a tensor over a number; 3.3.1 has it for CPUs in every type of `scale`; no GPU source seen",
    ),
}
# Operators that become others, or one of several: (what is taken, and what its gradients are, where not in the lists).
COMPOSED = {
    # paddle.nn.functional.linear: matmul and add in a build for CPUs, one kernel with cublasLt in one for GPUs.
    "linear": (("matmul", "add", "linear_v2"), ("linear_v2_grad",)),
    # A number in place of a tensor is made one first.
    "elementwise_pow": (("elementwise_pow", "full"), ()),
    "divide": (("divide", "full"), ()),
    # A Scalar that is a tensor changes the kernel's name.
    "set_value": (("set_value", "set_value_with_tensor"), ()),
    "arange": (("arange", "arange_tensor"), ()),
}
# Written by hand in Paddle, where the lists name a function (api_custom_impl.cc, add_n_node.cc): the kernels called.
BY_HAND = {
    "embedding_grad": ("embedding_grad",),  # dense gradients, as here
    "add_n": ("add_n",),
    "add_n_grad": ("scale",),
}
# Operators whose gradient has the type of what came out, not of what went in.
BY_RESULT = {"cast"}
# From narrow to wide, as Paddle promotes operands; float16 and bfloat16 together are float32.
RANK = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")


@cache
def table() -> dict[str, dict]:
    return json.loads(Path(__file__).with_name("gpu_kernels.json").read_text("utf-8"))


def missing(calls: Iterable[Call]) -> list[str]:
    """What no kernel for GPUs takes: `searchsorted: no kernel for bool (has float32 ...)`."""
    faults = {_fault(kernels, dtype) for call in calls for kernels, dtype in needed(call)}
    return sorted(fault for fault in faults if fault)


def needed(call: Call) -> list[tuple[tuple[str, ...], str | None]]:
    """(kernels of which one must do, type) for each operator that a call becomes, and for each gradient of these."""
    dtype = _dispatched(call)
    forward, backward = COMPOSED.get(call.operator, ((call.operator,), ()))
    found = [(_kernels(name), dtype) for name in forward]
    if call.gradient:
        listed = (table()["operators"].get(_known(name), {}).get("backward") for name in forward)
        result = call.result if call.operator in BY_RESULT else dtype
        found += [(_kernels(name), result) for name in (*listed, *backward) if name]
    return found


def registered(kernel: str) -> str | None:
    """Types that a kernel is registered with for GPUs, `all`, or None where it is not."""
    for by_hand in (LATER, UNSEEN):
        if kernel in by_hand:
            return by_hand[kernel][0]
    return table()["kernels"][kernel][0] if kernel in table()["kernels"] else None


def _fault(kernels: tuple[str, ...], dtype: str | None) -> str | None:
    has = [types for types in map(registered, kernels) if types is not None]
    if not has:
        return f"{' or '.join(kernels)}: no such kernel is registered for GPUs"
    if any(types == ALL or dtype in types.split() for types in has):
        return None
    return f"{' or '.join(kernels)}: no kernel for {dtype} (has {', '.join(has)})"


def _known(operator: str) -> str:
    """The operator's name in Paddle's lists, which name in-place forms like `add_` only where they differ."""
    return operator if operator in table()["operators"] or not operator.endswith("_") else operator.removesuffix("_")


def _kernels(operator: str) -> tuple[str, ...]:
    if operator in BY_HAND:
        return BY_HAND[operator]
    entry = table()["operators"].get(_known(operator), {})
    if "invoke" in entry:
        return _kernels(entry["invoke"])
    return tuple(entry.get("kernels") or [_known(operator)])


def _dispatched(call: Call) -> str | None:
    """The type that chooses among an operator's kernels: as its entry says, else the widest of its tensors."""
    entry = table()["operators"].get(_known(call.operator), {})
    given = dict(call.named)
    given |= dict(zip(entry.get("arguments", ()), call.arguments, strict=False))
    for name in str(entry.get("data_type", "")).split(">"):
        types = [one for one in _flat(given.get(name.strip())) if one]
        if types:
            return types[0]
    types = [one for one in _flat((call.arguments, tuple(value for _, value in call.named))) if one]
    widest = max(types, key=RANK.index, default=call.result)
    return "float32" if {"float16", "bfloat16"} <= set(types) else widest


def _flat(types) -> list:
    return [one for part in types for one in _flat(part)] if isinstance(types, tuple) else [types]
