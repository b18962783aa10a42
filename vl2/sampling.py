"""The draw of the next token."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F


def sample(
    logits_BV: paddle.Tensor,
    temperature: float | paddle.Tensor,
    top_p: float | paddle.Tensor,
    draw_B: paddle.Tensor,
) -> paddle.Tensor:
    """Draw one token a row from its nucleus, the smallest set of tokens of at least `top_p` together.

    probabilities .2 .5 .3, top_p 0.6 -> the tokens 1 and 2, with .625 and .375: 1 for a draw below .625

    Args:
        logits_BV: float32.
        temperature: above 0; or of each row, float64 [B, 1].
        top_p: in (0, 1]; or of each row, likewise.
        draw_B: float64 in [0, 1).

    Returns:
        int64 [B].
    """
    if not isinstance(temperature, paddle.Tensor):
        temperature = paddle.full([1], temperature, "float64")
    probabilities_BV = F.softmax(logits_BV.astype("float64") / temperature, axis=-1)
    order_BV = paddle.argsort(probabilities_BV, axis=-1, descending=True, stable=True)
    sorted_BV = paddle.take_along_axis(probabilities_BV, order_BV, axis=-1, broadcast=False)
    before_BV = paddle.cumsum(sorted_BV, axis=-1) - sorted_BV
    up_to_BV = paddle.cumsum(sorted_BV * (before_BV < top_p).astype("float64"), axis=-1)
    place_B1 = (up_to_BV / up_to_BV[:, -1:] <= draw_B.unsqueeze(1)).sum(axis=-1, keepdim=True)
    return paddle.take_along_axis(order_BV, place_B1, axis=-1, broadcast=False).squeeze(1)
