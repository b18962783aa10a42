"""The products of one expert after the other, for CPU, where each of them takes all cores.

Rows lie expert by expert without padding. Every product writes its rows where they belong, and what LoRA adds to them
follows while they are in the cache: a pass over memory costs a CPU as much as a skinny product. Float32, for these
products have no 16-bit kernels there.

Shape suffixes: E experts, n rows of one of them, I and O channels, L LoRA channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import paddle

from vl2.arrays import empty, read
from vl2.products import multiply
from vl2.quantised import Quantised
from vl2.stored_products import StoredMatrices


def slices(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of those that have some."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def some_rows(x: np.ndarray | None, rows: slice) -> np.ndarray | None:
    """Rows of what may not be there."""
    return None if x is None else x[rows]


class ExpertProducts:
    """x @ weight[e] + x @ a[e] @ b[e] of each expert's rows."""

    def __init__(
        self, weight: paddle.Tensor | Quantised, a_EIL: paddle.Tensor | None = None, b_ELO: paddle.Tensor | None = None
    ):
        self._weights = StoredMatrices(weight)
        self._factors = None if a_EIL is None or b_ELO is None else (read(a_EIL), read(b_ELO))

    def forward(
        self,
        e: int,
        x_nI: np.ndarray,
        out_nO: np.ndarray,
        low_nL: np.ndarray | None,
        lora_x_nI: np.ndarray | None = None,
    ) -> None:
        """Writes an expert's result, and x @ a for backward.

        Args:
            e: expert.
            x_nI: its rows.
            out_nO: takes the result.
            low_nL: takes x @ a, where there is LoRA.
            lora_x_nI: the rows that LoRA multiplies, where they are others.
        """
        self._weights.multiply(x_nI, out_nO, e)
        if self._factors is not None and low_nL is not None:
            a_EIL, b_ELO = self._factors
            multiply(x_nI if lora_x_nI is None else lora_x_nI, a_EIL[e], low_nL)
            multiply(low_nL, b_ELO[e], out_nO, add=True)


class ExpertGradients:
    """The gradients of what `ExpertProducts` multiplies, from those of its results."""

    def __init__(
        self,
        weight: paddle.Tensor | Quantised,
        a_EIL: paddle.Tensor | None,
        b_ELO: paddle.Tensor | None,
        needed: Sequence[bool],
        counts: Sequence[int],
    ):
        """Makes room for the gradients of all experts.

        Args:
            weight, a_EIL, b_ELO: as of `ExpertProducts`.
            needed: whether each of the three has a gradient.
            counts: rows of each expert; the gradients of those without rows are zeros.
        """
        self._weights = StoredMatrices(weight)
        self._factors = None if a_EIL is None or b_ELO is None else (read(a_EIL), read(b_ELO))
        rooms = [
            _room(stacked, counts) if wanted else (None, None)
            for stacked, wanted in zip((weight, a_EIL, b_ELO), needed, strict=True)
        ]
        self.of_weight, self.of_a, self.of_b = (tensor for tensor, _ in rooms)
        self._of_weight, self._of_a, self._of_b = (array for _, array in rooms)

    @property
    def has_factors(self) -> bool:
        """Whether there is LoRA."""
        return self._factors is not None

    @property
    def need_rows(self) -> bool:
        """Whether what was multiplied is asked for."""
        return self.of_weight is not None or self.of_a is not None

    def to_rows(
        self,
        e: int,
        grad_nO: np.ndarray,
        grad_x_nI: np.ndarray | None,
        grad_lora_x_nI: np.ndarray | None = None,
        *,
        same_rows: bool = True,
    ) -> np.ndarray | None:
        """Writes the gradient of an expert's rows.

        Args:
            e: expert.
            grad_nO: gradient of its result.
            grad_x_nI: takes that of its rows, if they have one.
            grad_lora_x_nI: takes that of the rows that LoRA multiplied, where they are others and have one.
            same_rows: whether they are the same.

        Returns:
            The gradient of x @ a, [n, L].
        """
        if grad_x_nI is not None:
            self._weights.multiply(grad_nO, grad_x_nI, e, transpose=True)
        if self._factors is None:
            return None
        a_EIL, b_ELO = self._factors
        grad_low_nL = np.empty([len(grad_nO), b_ELO.shape[1]], np.float32)
        multiply(grad_nO, b_ELO[e], grad_low_nL, transpose_b=True)
        if grad_lora_x_nI is not None:
            multiply(grad_low_nL, a_EIL[e], grad_lora_x_nI, transpose_b=True)
        elif grad_x_nI is not None and same_rows:
            multiply(grad_low_nL, a_EIL[e], grad_x_nI, transpose_b=True, add=True)
        return grad_low_nL

    def to_matrices(
        self,
        e: int,
        grad_nO: np.ndarray,
        grad_low_nL: np.ndarray | None,
        x_nI: np.ndarray | None,
        low_nL: np.ndarray | None,
        lora_x_nI: np.ndarray | None = None,
    ) -> None:
        """Writes the gradients of an expert's weight, a and b, of those that have one.

        Args:
            e: expert.
            grad_nO: gradient of its result.
            grad_low_nL: from `to_rows`.
            x_nI: its rows, where `need_rows`.
            low_nL: x @ a from forward.
            lora_x_nI: the rows that LoRA multiplied, where they are others.
        """
        if self._of_weight is not None and x_nI is not None:
            multiply(x_nI, grad_nO, self._of_weight[e], transpose_a=True)
        if self._of_b is not None and low_nL is not None:
            multiply(low_nL, grad_nO, self._of_b[e], transpose_a=True)
        multiplied = x_nI if lora_x_nI is None else lora_x_nI
        if self._of_a is not None and multiplied is not None and grad_low_nL is not None:
            multiply(multiplied, grad_low_nL, self._of_a[e], transpose_a=True)


def _room(
    stacked: paddle.Tensor | Quantised | None, counts: Sequence[int]
) -> tuple[paddle.Tensor | None, np.ndarray | None]:
    """Room for the gradient of a stacked matrix; zeros for experts without rows."""
    assert stacked is not None
    room, numbers = empty(stacked.shape)
    for expert, count in enumerate(counts):
        if not count:
            numbers[expert] = 0
    return room, numbers
