"""image_newline and view_seperator in an adapter of PaddleNLP, which leaves them trainable.

It freezes the parameters of layers, and these two are the model's own. So it looks for both in an adapter's files, and
what was trained in PaddleMIX may have changed them: then they are a part of the adapter, and replace the base's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle

from vl2.adapter.foreign import Adapter

ROWS = ("image_newline", "view_seperator")  # the checkpoint's spelling


def changed_rows(adapter: Adapter, value_of: Callable[[str], paddle.Tensor]) -> dict[str, np.ndarray]:
    """The rows of an adapter that are not the base's, in float32.

    Args:
        adapter: in any format; only PaddleNLP's has rows.
        value_of: the base's parameter by its path. Compared in its type, since the adapter may be stored in another.
    """
    changed = {}
    for name in adapter.rows:
        row, value = adapter.row(name), value_of(name)
        if not np.array_equal(in_type_of(value, row).astype("float32").numpy(), value.astype("float32").numpy()):
            changed[name] = row
    return changed


def written_rows(adapter: Adapter, value_of: Callable[[str], paddle.Tensor]) -> dict[str, np.ndarray]:
    """Both rows in float32 for PaddleNLP: the adapter's own where it has them, else the base's."""
    return {
        name: adapter.row(name) if name in adapter.rows else value_of(name).astype("float32").numpy() for name in ROWS
    }


def in_type_of(value: paddle.Tensor, row: np.ndarray) -> paddle.Tensor:
    """A row as the base would store it."""
    return paddle.to_tensor(row).astype(value.dtype)
