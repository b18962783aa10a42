"""The products of one expert after the other, for CPU, where each of them takes all cores.

Rows lie expert by expert without padding. Every product writes its rows where they belong, and what LoRA adds to them
follows while they are in the cache: a pass over memory costs a CPU as much as a skinny product. Float32, for these
products have no 16-bit kernels there.

Shape suffixes: E experts, n rows of one of them, I and O channels, L LoRA channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import paddle

from vl2.errors import UserError
from vl2.quantised import Quantised, matrix_of

_VIEWS = "FLAGS_use_stride_kernel"


def check_views() -> None:
    """Whether slices are views, which products are written to.

    Raises:
        UserError: they are copies.
    """
    if not paddle.get_flags(_VIEWS)[_VIEWS]:
        raise UserError(f"{_VIEWS}=0 is set: slices would be copies, and products written into them lost; unset it")


def slices(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of those that have some."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def some_rows(x: paddle.Tensor | None, rows: slice) -> paddle.Tensor | None:
    """Rows of what may not be there."""
    return None if x is None else x[rows]


class ExpertProducts:
    """x @ weight[e] + x @ a[e] @ b[e] of each expert's rows."""

    def __init__(
        self, weight: paddle.Tensor | Quantised, a_EIL: paddle.Tensor | None = None, b_ELO: paddle.Tensor | None = None
    ):
        self.weight = weight
        # All views at once: one costs as much as a small product.
        self._factors = None if a_EIL is None or b_ELO is None else (paddle.unbind(a_EIL), paddle.unbind(b_ELO))

    def forward(
        self,
        e: int,
        x_nI: paddle.Tensor,
        out_nO: paddle.Tensor,
        low_nL: paddle.Tensor | None,
        lora_x_nI: paddle.Tensor | None = None,
    ) -> None:
        """Writes an expert's result, and x @ a for backward.

        Args:
            e: expert.
            x_nI: its rows.
            out_nO: takes the result.
            low_nL: takes x @ a, where there is LoRA.
            lora_x_nI: the rows that LoRA multiplies, where they are others.
        """
        paddle.matmul(x_nI, matrix_of(self.weight, x_nI.dtype, e), out=out_nO)
        if self._factors is not None and low_nL is not None:
            a_E, b_E = self._factors
            paddle.matmul(x_nI if lora_x_nI is None else lora_x_nI, a_E[e], out=low_nL)
            paddle.addmm_(out_nO, low_nL, b_E[e])


class ExpertGradients:
    """The gradients of what `ExpertProducts` multiplies, from those of its results."""

    def __init__(
        self,
        weight: paddle.Tensor | Quantised,
        a_EIL: paddle.Tensor | None,
        b_ELO: paddle.Tensor | None,
        needed: Sequence[bool],
        counts: Sequence[int],
        dtype: paddle.dtype,
    ):
        """Makes room for the gradients of all experts.

        Args:
            weight, a_EIL, b_ELO: as of `ExpertProducts`.
            needed: whether each of the three has a gradient.
            counts: rows of each expert; the gradients of those without rows are zeros.
            dtype: of the gradients.
        """
        self._weight = weight
        self.of_weight, self.of_a, self.of_b = (
            _room(stacked, counts, dtype) if wanted else None
            for stacked, wanted in zip((weight, a_EIL, b_ELO), needed, strict=True)
        )
        self._factors = None
        if a_EIL is not None and b_ELO is not None:
            self._factors = paddle.unbind(a_EIL.transpose([0, 2, 1]).contiguous()), paddle.unbind(b_ELO)
        self._of_a_E, self._of_b_E = (room if room is None else paddle.unbind(room) for room in (self.of_a, self.of_b))

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
        grad_nO: paddle.Tensor,
        grad_x_nI: paddle.Tensor | None,
        grad_lora_x_nI: paddle.Tensor | None = None,
        *,
        same_rows: bool = True,
    ) -> paddle.Tensor | None:
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
            paddle.matmul(grad_nO, matrix_of(self._weight, grad_nO.dtype, e), transpose_y=True, out=grad_x_nI)
        if self._factors is None:
            return None
        a_T_E, b_E = self._factors
        grad_low_nL = paddle.matmul(grad_nO, b_E[e], transpose_y=True)
        if grad_lora_x_nI is not None:
            paddle.matmul(grad_low_nL, a_T_E[e], out=grad_lora_x_nI)
        elif grad_x_nI is not None and same_rows:
            paddle.addmm_(grad_x_nI, grad_low_nL, a_T_E[e])
        return grad_low_nL

    def to_matrices(
        self,
        e: int,
        grad_nO: paddle.Tensor,
        grad_low_nL: paddle.Tensor | None,
        x_nI: paddle.Tensor | None,
        low_nL: paddle.Tensor | None,
        lora_x_nI: paddle.Tensor | None = None,
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
        if self.of_weight is not None:
            paddle.matmul(x_nI, grad_nO, transpose_x=True, out=self.of_weight[e])
        if self._of_b_E is not None:
            paddle.matmul(low_nL, grad_nO, transpose_x=True, out=self._of_b_E[e])
        if self._of_a_E is not None:
            multiplied = x_nI if lora_x_nI is None else lora_x_nI
            paddle.matmul(multiplied, grad_low_nL, transpose_x=True, out=self._of_a_E[e])


def _room(stacked: paddle.Tensor, counts: Sequence[int], dtype: paddle.dtype) -> paddle.Tensor:
    """Room for the gradient of a stacked matrix; zeros for experts without rows."""
    room = paddle.empty(stacked.shape, dtype)
    for expert, count in enumerate(counts):
        if not count:
            room[expert].zero_()
    return room
