"""The loss of a model on conversations, per supervised token."""

from __future__ import annotations

import sys

import paddle
from tqdm import tqdm

from data.dataset import Dataset
from data.packs import PackDataset
from data.plan import make_plan
from train.ask.answer import BATCH_TOKENS
from train.ask.load import Loaded


def mean_loss(loaded: Loaded, dataset: Dataset) -> float:
    """Mean of -log p per supervised token over all conversations."""
    longest = int(dataset.sizes.tokens.max())
    plan = make_plan(
        dataset.sizes,
        max_tokens=max(longest, BATCH_TOKENS),
        max_tiles_per_pack=max(32, int(dataset.sizes.tiles.max())),
        packs_per_step=1,
        seed=0,
        epochs=1,
    )
    packs = PackDataset(dataset.records, plan, dataset.sizes, loaded.tokenizer, loaded.candidates, images=loaded.images)
    total, count = 0.0, 0
    with paddle.no_grad():
        for i in tqdm(range(plan.num_packs), desc="loss", unit="pack", file=sys.stderr, mininterval=1.0):
            loss_sum, supervised = loaded.model.loss(packs[i])
            total, count = total + float(loss_sum), count + supervised
    return total / count
