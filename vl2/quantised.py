"""Frozen weights in four or eight bits: kept small, and made whole again, one matrix at a time, where they multiply.

    nf4     4.13 bits a weight: 64 neighbours share a scale and each is one of 16 values between -1 and 1; the scale
            itself is one of 256 steps between the smallest and the largest of 256 neighbours. Source: arXiv 2305.14314.
    int8    8 bits a weight and a float32 scale for each output channel.

The vision tower's matrices are kept in int8 in either case: it is small beside what they are, and all that is seen
passes through it.

Shape suffixes: E matrices of a stacked weight (1 of any other), I in, O out, B blocks of 64, G groups of 256 blocks.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import paddle

from vl2 import ways, weight_kernels
from vl2.arrays import empty, read
from vl2.constant_tensors import byte_pairs
from vl2.parameter_groups import group_of
from vl2.weight_kernels import NF4_BLOCK, NF4_GROUP

# The groups of weights that are kept so; tables, norms and routers are small, or more is lost with them.
QUANTISED_GROUPS = ("attention", "experts", "shared_experts", "dense_mlp")
_TOWER_MATRICES = re.compile(r"vision\.(blocks\.\d+\.(attn|mlp)|attn_pool(\.mlp)?)\.\w+\.weight")
_STEPS = 255  # of a scale's code
_LARGEST = 127  # of an int8 code
# Numbers of stacked matrices that are made whole at once on a GPU, with some 10 bytes each on the way.
SLICE = 1 << 25


@dataclass(frozen=True)
class Quantised(ABC):
    """A weight [I, O] or [E, I, O] in few bits. It hangs on its parameter, which keeps shape and name but no memory."""

    shape: tuple[int, ...]

    kind: ClassVar[str]

    def matrix(self, dtype: paddle.dtype, index: int = 0) -> paddle.Tensor:
        """One whole matrix, [I, O]."""
        if not ways.takes_kernels(next(iter(self.tensors.values())).place):
            return self.matrices(slice(index, index + 1))[0].astype(dtype)
        matrix, out = empty(self.shape[-2:])
        self._write(index, out)
        return matrix.astype(dtype)

    @abstractmethod
    def _write(self, index: int, out: np.ndarray) -> None:
        """Write one whole matrix to float32 [I, O] with a kernel."""

    @abstractmethod
    def matrices(self, which: slice | paddle.Tensor) -> paddle.Tensor:
        """Some matrices of a stacked weight, float32 [n, I, O], by operations that every device has."""

    @property
    def tensors(self) -> dict[str, paddle.Tensor]:
        """What is kept, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "shape"}

    @property
    def num_bytes(self) -> int:
        """Of what is kept."""
        return sum(tensor.size * tensor.element_size() for tensor in self.tensors.values())

    def slices(self, number: int) -> Iterator[slice]:
        """How so many matrices are taken one after the other, where all of them whole would take too much memory."""
        at_once = max(1, SLICE // math.prod(self.shape[-2:]))
        for start in range(0, number, at_once):
            yield slice(start, min(number, start + at_once))


@dataclass(frozen=True)
class Nf4(Quantised):
    """Block-wise four bits."""

    codes_EH: paddle.Tensor  # uint8, two codes a byte, the low four bits first; H is B * 32
    scales_EG256: paddle.Tensor  # uint8, flat: code of each block's scale
    ranges_EG2: paddle.Tensor  # float32: the lowest scale of a group, and the step from one code to the next

    kind = "nf4"

    def _write(self, index: int, out: np.ndarray) -> None:
        codes, scales, ranges = (read(kept[index]) for kept in (self.codes_EH, self.scales_EG256, self.ranges_EG2))
        weight_kernels.from_nf4(codes, scales, ranges, out.reshape(-1))

    def matrices(self, which: slice | paddle.Tensor) -> paddle.Tensor:
        """Some matrices of a stacked weight, float32 [n, I, O]."""
        codes, scales, ranges = (_some(kept, which) for kept in (self.codes_EH, self.scales_EG256, self.ranges_EG2))
        n, size = codes.shape[0], math.prod(self.shape[-2:])
        steps = scales.reshape([n, -1, NF4_GROUP]).astype("float32")
        blocks = codes.shape[1] * 2 // NF4_BLOCK
        scales_nB1 = (ranges[:, :, :1] + steps * ranges[:, :, 1:]).reshape([n, -1, 1])[:, :blocks]
        pairs = paddle.gather(byte_pairs(codes.place), codes.flatten().astype("int32"))
        numbers = pairs.reshape([n, -1, NF4_BLOCK]) * scales_nB1
        return numbers.reshape([n, -1])[:, :size].reshape([n, *self.shape[-2:]])


@dataclass(frozen=True)
class Int8(Quantised):
    """Eight bits, with a scale for each output channel."""

    codes_EIO: paddle.Tensor  # int8
    scales_EO: paddle.Tensor  # float32

    kind = "int8"

    def _write(self, index: int, out: np.ndarray) -> None:
        weight_kernels.from_int8(read(self.codes_EIO[index]), read(self.scales_EO[index]), out)

    def matrices(self, which: slice | paddle.Tensor) -> paddle.Tensor:
        """Some matrices of a stacked weight, float32 [n, I, O]."""
        return _some(self.codes_EIO, which).astype("float32") * _some(self.scales_EO, which).unsqueeze(1)


KINDS: dict[str, type[Quantised]] = {cls.kind: cls for cls in (Nf4, Int8)}


def _some(stacked: paddle.Tensor, which: slice | paddle.Tensor) -> paddle.Tensor:
    return stacked[which] if isinstance(which, slice) else paddle.gather(stacked, which)


def stored(weight: paddle.Tensor) -> paddle.Tensor | Quantised:
    """What a parameter's numbers are kept in: itself, or what hangs on it."""
    return getattr(weight, "quantised", weight)


def needs_grad(operand: paddle.Tensor | Quantised | None) -> bool:
    """Whether a product sends a gradient to one of its operands."""
    return isinstance(operand, paddle.Tensor) and not operand.stop_gradient


def tensors_of(weight: paddle.Tensor | Quantised) -> list[paddle.Tensor]:
    """What autograd saves of a weight; one in few bits hangs on the context."""
    return [] if isinstance(weight, Quantised) else [weight]


def kept_in(path: str, frozen: str) -> str:
    """What a base model's parameter is kept in.

    Args:
        path: of the parameter.
        frozen: what the model's frozen matrices are: "none", "nf4" or "int8".

    Returns:
        "nf4", "int8", or "none": as it is stored.
    """
    if frozen == "none" or group_of(path) in QUANTISED_GROUPS:
        return frozen
    return "int8" if _TOWER_MATRICES.fullmatch(path) and "norm" not in path else "none"


def quantised_bytes(kind: str, shape: Sequence[int]) -> int:
    """Bytes that a weight of a shape takes."""
    number, size = math.prod(shape[:-2]), math.prod(shape[-2:])
    if kind == "int8":
        return number * (size + 4 * shape[-1])
    blocks = -(-size // NF4_BLOCK)
    groups = -(-blocks // NF4_GROUP)
    return number * (blocks * NF4_BLOCK // 2 + groups * (NF4_GROUP + 8))


def quantise(kind: str, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """A matrix in few bits.

    Args:
        kind: "nf4" or "int8".
        matrix: float32 [I, O], contiguous.

    Returns:
        What the class of that kind keeps of one matrix, by the names of its fields.

    Raises:
        ValueError: a number that is not finite.
    """
    if kind == "int8":
        most = np.zeros(matrix.shape[1], np.float32)
        finite = weight_kernels.largest_of_columns(matrix, most)
        _check_finite(finite)
        scales, codes = most / np.float32(_LARGEST), np.empty(matrix.shape, np.int8)
        weight_kernels.to_int8(matrix, _inverse(scales), codes)
        return {"codes_EIO": codes, "scales_EO": scales}
    flat = matrix.reshape(-1)
    if rest := -flat.size % NF4_BLOCK:
        flat = np.concatenate([flat, np.zeros(rest, np.float32)])
    blocks = flat.size // NF4_BLOCK
    most = np.zeros(-(-blocks // NF4_GROUP) * NF4_GROUP, np.float32)
    _check_finite(weight_kernels.largest_of_blocks(flat, most))
    most_GS = most.reshape(-1, NF4_GROUP)
    most_GS.reshape(-1)[blocks:] = most[blocks - 1]  # no range gets wider by what is not there
    lowest = most_GS.min(axis=1, keepdims=True)
    step = (most_GS.max(axis=1, keepdims=True) - lowest) / np.float32(_STEPS)
    steps = np.rint((most_GS - lowest) * _inverse(step)).astype(np.uint8)
    scales = (lowest + steps.astype(np.float32) * step).reshape(-1)
    codes = np.empty(flat.size // 2, np.uint8)
    weight_kernels.to_nf4(flat, _inverse(scales), codes)
    return {
        "codes_EH": codes,
        "scales_EG256": steps.reshape(-1),
        "ranges_EG2": np.concatenate([lowest, step], axis=1),
    }


def quantised_of(kind: str, shape: Sequence[int], arrays: Mapping[str, np.ndarray]) -> Quantised:
    """A weight in few bits from what is kept of it.

    Args:
        kind: "nf4" or "int8".
        shape: of the whole weight.
        arrays: by the names of the fields.
    """
    return KINDS[kind](tuple(shape), **{name: paddle.to_tensor(array) for name, array in arrays.items()})


def _check_finite(finite: bool) -> None:
    if not finite:
        raise ValueError("it holds numbers that are not finite")


def _inverse(scales: np.ndarray) -> np.ndarray:
    """1 / scales; of zeros, and of what is too small to have an inverse, zero."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    return np.where(np.isfinite(inverse), inverse, np.float32(0))
