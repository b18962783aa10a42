"""The load-balance ("auxiliary") loss of the routers, for every conversation of a stream by itself.

Shape suffixes: T tokens of the stream, S segments (conversations), E experts, C choices of a token.
"""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F

from vl2.constant_tensors import send


class LoadBalance:
    """Collects the loss of every expert layer in one forward pass of one stream.

    The loss of a segment and a layer is sum_e f_e * P_e: f_e is expert e's share of the segment's choices times E (1
    when all are chosen alike; no gradient goes through it), P_e the mean of its scores. With one choice a token:

        scores of 2 experts   .9 .1      choices  0      f = 2 * (2, 1) / 3 = (1.33, .67)
                              .6 .4               0      P = (.6, .4)
                              .3 .7               1      loss = .8 + .27 = 1.07; it is 1 when P is even

    Source: official MoEGate with `seq_aux`, which takes the mean over the sequences of a padded batch.

    Args:
        lens: tokens of each segment, int64 [S].
        supervised_T: bool [T]. A segment without a supervised token (padding, a sample that nothing is learned from)
            adds nothing to the loss.
    """

    def __init__(self, lens: np.ndarray, supervised_T: np.ndarray):
        segment_T = np.repeat(np.arange(len(lens)), lens)
        counted_S = np.isin(np.arange(len(lens)), segment_T[supervised_T])
        sent = send({"segment": segment_T, "counted": counted_S, "lens": lens})
        self._segment_T = sent["segment"]
        self._member_ST = F.one_hot(sent["segment"], len(lens)).transpose([1, 0]).contiguous()
        lens_S = sent["lens"].astype("float64")
        self._weight_S1 = (sent["counted"].astype("float64") / (lens_S * lens_S)).astype("float32").unsqueeze(1)
        self.layers: list[paddle.Tensor] = []  # float32 scalars, sums over the counted segments

    def total(self) -> paddle.Tensor:
        """Sum over layers and segments, a float32 scalar tensor that gradients go through."""
        return paddle.add_n(self.layers)

    def of_layer(self, scores_TE: paddle.Tensor, choices_TC: paddle.Tensor) -> paddle.Tensor:
        """One layer's loss, summed over the counted segments: a float32 scalar.

        Args:
            scores_TE: float32, adding up to 1 for each token.
            choices_TC: int64, the experts with the highest scores.
        """
        num_experts, num_choices = scores_TE.shape[1], choices_TC.shape[1]
        with paddle.no_grad():
            # A product of zeros and ones: exact, and summed in the same order each time.
            counts_SE = paddle.matmul(self._member_ST, F.one_hot(choices_TC, num_experts).sum(axis=1))
            share_SE = counts_SE * self._weight_S1 * (num_experts / num_choices)
            share_TE = paddle.gather(share_SE, self._segment_T)
        return (share_TE * scores_TE).sum()
