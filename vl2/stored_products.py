"""Products of float32 rows with weights as they are stored, on a CPU; no float32 copy outlives a product."""

from __future__ import annotations

import numpy as np
import paddle

from vl2.arrays import read
from vl2.bfloat16_products import multiply_bfloat16, takes_bfloat16
from vl2.casts import cast
from vl2.products import multiply
from vl2.quantised import Quantised

_BLOCK = 1 << 23  # numbers of a weight in another type that are made float32 at once; those of four such stay whole


class StoredMatrices:
    """A weight [I, O], or a stacked one [E, I, O]: float32, 16 bits or fewer."""

    def __init__(self, weight: paddle.Tensor | Quantised):
        self._weight, self._stacked = weight, len(weight.shape) == 3
        self._numbers = self._bits = None
        if isinstance(weight, paddle.Tensor) and weight.dtype == paddle.float32:
            self._numbers = read(weight)
        elif isinstance(weight, paddle.Tensor) and weight.dtype == paddle.bfloat16 and takes_bfloat16():
            self._bits = read(weight)

    def multiply(
        self, x: np.ndarray, out: np.ndarray, index: int = 0, *, transpose: bool = False, add: bool = False
    ) -> None:
        """Writes x @ matrix.

        Args:
            x: [n, I].
            out: [n, O].
            index: of the matrix, of a stacked weight.
            transpose: x @ matrix.T, of x [n, O] and out [n, I].
            add: to what `out` holds.
        """
        if self._numbers is not None:
            numbers = self._numbers[index] if self._stacked else self._numbers
            multiply(x, numbers, out, transpose_b=transpose, add=add)
        elif self._bits is not None:
            bits = self._bits[index] if self._stacked else self._bits
            multiply_bfloat16(x, bits, out, transpose=transpose, add=add)
        elif isinstance(self._weight, Quantised):
            numbers = read(self._weight.matrix(paddle.float32, index))
            multiply(x, numbers, out, transpose_b=transpose, add=add)
        else:
            weight = self._weight[index] if self._stacked else self._weight
            _multiply_by_columns(x, weight, out, transpose=transpose, add=add)


def _multiply_by_columns(x: np.ndarray, weight: paddle.Tensor, out: np.ndarray, *, transpose: bool, add: bool) -> None:
    """With a 16-bit matrix; a large one, a head's, is never whole in float32.

    That of Tiny would be the largest thing of a step.
    """
    rows, columns = weight.shape
    at_once = columns if rows * columns <= 4 * _BLOCK else max(1, _BLOCK // rows)
    for start in range(0, columns, at_once):
        some = slice(start, min(columns, start + at_once))
        numbers = read(cast(weight if at_once == columns else weight[:, some], paddle.float32))
        if transpose:
            multiply(x[:, some], numbers, out, transpose_b=True, add=add or start > 0)
        else:
            multiply(x, numbers, out[:, some], add=add)
