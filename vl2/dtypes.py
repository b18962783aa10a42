"""Types of numbers, in one table. Inside the code a type goes by Paddle's name; others are translated where they enter.

Paddle's    a setting's   a safetensors file's   a pickle's (numpy)
bfloat16    bf16          BF16                   u2: numpy has none, Paddle stores its bits
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Dtype(NamedTuple):
    """One type under its four names."""

    name: str  # Paddle's
    setting: str | None  # of precision= and dtype=; None: no weights can be had in it
    file: str  # safetensors'
    code: str  # numpy's, as a .pdparams has it
    bits: type[np.generic]  # numpy's type that holds its values, or their bits


_TABLE = (
    Dtype("float32", "fp32", "F32", "f4", np.float32),
    Dtype("float16", "fp16", "F16", "f2", np.float16),
    Dtype("bfloat16", "bf16", "BF16", "u2", np.uint16),
    Dtype("float64", None, "F64", "f8", np.float64),
    Dtype("int64", None, "I64", "i8", np.int64),
    Dtype("uint8", None, "U8", "u1", np.uint8),
    Dtype("int8", None, "I8", "i1", np.int8),
)
_BY_NAME = {dtype.name: dtype for dtype in _TABLE}

# setting -> Paddle's name: the types that weights can be had in.
DTYPE_OF_SETTING: dict[str, str] = {dtype.setting: dtype.name for dtype in _TABLE if dtype.setting}
# safetensors' name -> Paddle's name.
DTYPE_OF_SAFETENSORS: dict[str, str] = {dtype.file: dtype.name for dtype in _TABLE}
# numpy's code in a .pdparams -> Paddle's name.
DTYPE_OF_NUMPY: dict[str, str] = {dtype.code: dtype.name for dtype in _TABLE}
# Paddle's names of the types that weights can be had in.
WEIGHT_DTYPES: tuple[str, ...] = tuple(DTYPE_OF_SETTING.values())


def safetensors_name(dtype: str) -> str:
    """What safetensors calls a type: "BF16" for "bfloat16"."""
    return _BY_NAME[dtype].file


def bits_type(dtype: str) -> type[np.generic]:
    """Numpy's type that holds a type's values; for bfloat16, which numpy does not have, their bits."""
    return _BY_NAME[dtype].bits


def item_bytes(dtype: str) -> int:
    """Bytes of one number."""
    return np.dtype(bits_type(dtype)).itemsize
