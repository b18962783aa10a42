"""Rows of each expert of a layer, as measured and as made up."""

import numpy as np

# The three expert layers of nano in two packs of its rehearsal's data, 3,983 and 3,977 tokens with two choices.
NANO_LOADS = [
    [1299, 2385, 892, 504, 38, 33, 526, 2289],
    [135, 508, 1724, 1910, 1249, 335, 974, 1131],
    [1958, 367, 105, 2326, 637, 1034, 360, 1179],
    [1028, 1579, 1002, 963, 70, 68, 629, 2615],
    [163, 432, 1199, 1410, 1652, 367, 1579, 1152],
    [1911, 97, 609, 1367, 956, 1424, 78, 1512],
]


def zipf(num_experts: int, num_rows: int, power: float) -> list[int]:
    """Rows of each expert, the k-th most wanted one's in proportion to k^-power."""
    share = np.arange(1, num_experts + 1.0) ** -power
    counts = np.floor(share / share.sum() * num_rows).astype(int)
    counts[: num_rows - counts.sum()] += 1
    return counts.tolist()
