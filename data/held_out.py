"""Which rows are held out of training: chosen by what they say, so that more rows move none to the other side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vl2.errors import UserError

DEFAULT_FRACTION = 0.05
"""What data.eval_rows alone holds out: the N rows with the smallest hashes would change when rows are added."""
_SALT = np.uint64(0x5E1D_0F0D_A7A5_E7ED)  # fixed for ever: neither the seed nor the run may move a row


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """The rows of a data set on either side."""

    trained: np.ndarray
    """int64 [rows]: indices, in order."""
    asked: np.ndarray
    """int64 [rows]: indices of held-out rows, in order."""
    unused: int
    """Rows that are held out and not asked, as there are more than wanted."""


def hold_out(content_keys: np.ndarray, *, fraction: float | None, rows: int | None) -> Split:
    """Split rows by the hash of their content.

    A row is held out where its hash, as a number in [0, 1), is below the fraction. So a row's side depends on nothing
    but the row: rows that come or go move no other, equal conversations fall on the same side, and what a smaller
    fraction holds out a larger one does too. The asked ones are those with the smallest hashes.

    Args:
        content_keys: uint64 [N], `Dataset.content_keys`.
        fraction: about the part of the rows to hold out; None: `DEFAULT_FRACTION`.
        rows: most rows to ask; None: all that are held out.

    Raises:
        UserError: no row on one of the sides.
    """
    part = DEFAULT_FRACTION if fraction is None else fraction
    wanted = "data.eval_rows" if fraction is None and rows is not None else f"data.eval_fraction={part:g}"
    hashes = _mixed(content_keys)
    held = hashes < np.uint64(int(part * 2**64))
    found = np.flatnonzero(held)
    if not len(found):
        raise UserError(
            f"{wanted}: none of the {len(held)} rows is held out, of which about {part:g} should be; raise "
            "data.eval_fraction, or give the held-out rows as data.eval_path"
        )
    if len(found) == len(held):
        raise UserError(
            f"{wanted}: all {len(held)} rows are held out, none is left to train on; lower data.eval_fraction"
        )
    asked = np.sort(found[np.argsort(hashes[found], kind="stable")][:rows])
    return Split(trained=np.flatnonzero(~held), asked=asked, unused=len(found) - len(asked))


def _mixed(keys: np.ndarray) -> np.ndarray:
    """Another hash of each key, uint64 (the finaliser of SplitMix64): keys need not be spread evenly."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + _SALT
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
