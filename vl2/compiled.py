"""Loops over numpy arrays, compiled for this CPU.

They are compiled at their first call and kept on disk (NUMBA_CACHE_DIR).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from vl2.threads import in_parts


def kernel(function: Callable[..., Any], *, reorder: bool = False) -> Callable[..., Any]:
    """Compiles a function at its first call; where no folder can be written to, in every process again.

    Args:
        function: of numpy arrays and numbers.
        reorder: a sum may be taken in several lanes, whose number depends on the processor only.
    """
    fastmath = {"contract", "reassoc", "nsz"} if reorder else {"contract"}
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder for what it compiled
        return numba.njit(**options)(function)


def sum_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` of a sum in lanes."""
    return kernel(function, reorder=True)


class row_kernel:
    """`kernel` of a loop over rows, of which each call does some: its last arguments are the first and the end.

    Whoever calls it leaves them out: all rows are done, in parts on several threads. As many as the last array has.
    """

    def __init__(self, function: Callable[..., Any]):
        self.__doc__, self._some_rows = function.__doc__, kernel(function)

    def __call__(self, *arguments: Any) -> None:
        """All rows."""
        numbers = max(argument.size for argument in arguments if isinstance(argument, np.ndarray))
        in_parts(lambda start, stop: self._some_rows(*arguments, start, stop), len(arguments[-1]), numbers)
