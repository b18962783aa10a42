"""Token-exact loss of rows that are not trained on: the same packs and the same sums, whoever computes which pack."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import paddle
from tqdm import tqdm

from data.dataset import Dataset
from data.images.reader import ImageReader
from data.packs import PackDataset
from data.plan import make_plan
from data.settings import OnBadRecord
from data.vision_cache import VisionCache
from train.ask.answer import BATCH_TOKENS
from train.ask.load import Loaded
from vl2.model import DeepseekVL2
from vl2.prompt import IGNORE
from vl2.tiles import Resolution
from vl2.tokenizer import Tokenizer

_TILES = 32  # of a pack: what goes through the vision tower at once


@dataclass(frozen=True, kw_only=True, eq=False)
class RowLosses:
    """Losses of N rows, in their order."""

    sums: np.ndarray
    """float64 [N]: sum of -log p over a row's supervised tokens; 0 where its pack was not computed here."""
    supervised: np.ndarray
    """float64 [N]: these tokens; 0 likewise, and where a picture broke that may be left out."""

    def mean(self, rows: np.ndarray | slice = slice(None)) -> float:
        """Mean per supervised token of some rows; the order in which they were computed does not change it."""
        count = float(self.supervised[rows].sum())
        return math.fsum(self.sums[rows]) / count if count else math.nan


def pack_rows(
    dataset: Dataset,
    tokenizer: Tokenizer,
    candidates: tuple[Resolution, ...],
    images: ImageReader,
    *,
    on_bad_record: OnBadRecord = "error",
    max_bad: int = 0,
    vision_cache: VisionCache | None = None,
) -> PackDataset:
    """Lay out each row in one pack; neither ranks nor settings of a training change which rows lie together.

    Args:
        dataset: the rows.
        tokenizer, candidates, images: see PackDataset.
        on_bad_record, max_bad: what is done with a picture that broke after it was measured.
        vision_cache: of the model's tower.
    """
    plan = make_plan(
        dataset.sizes,
        max_tokens=max(int(dataset.sizes.tokens.max()), BATCH_TOKENS),
        max_tiles_per_pack=max(int(dataset.sizes.tiles.max()), _TILES),
        packs_per_step=1,
        seed=0,
        epochs=1,
    )
    return PackDataset(
        dataset.records,
        plan,
        dataset.sizes,
        tokenizer,
        candidates,
        images=images,
        on_bad_record=on_bad_record,
        max_bad=max_bad,
        vision_cache=vision_cache,
    )


def row_losses(model: DeepseekVL2, packs: PackDataset, which: Iterable[int]) -> RowLosses:
    """Losses of the rows in some packs.

    Args:
        model: in evaluation mode.
        packs: of `pack_rows`.
        which: indices of packs.

    Raises:
        RecordError: an image that cannot be decoded.
    """
    sums, supervised = np.zeros(len(packs.records)), np.zeros(len(packs.records))
    for index in which:
        batch = packs.complete(packs[index], model.seen)
        of_tokens: list[paddle.Tensor] = []
        with paddle.no_grad():
            model.loss(batch, of_tokens=of_tokens)
        if not of_tokens:
            continue
        rows = list(packs.plan.packs[index].samples)
        of_token = np.repeat(np.arange(len(rows)), batch["seq_lens"])[batch["labels"] != IGNORE]
        losses = np.concatenate([piece.numpy().reshape(-1) for piece in of_tokens])
        sums[rows] = np.bincount(of_token, weights=losses, minlength=len(rows))
        supervised[rows] = np.bincount(of_token, minlength=len(rows))
    return RowLosses(sums=sums, supervised=supervised)


def mean_losses(loaded: Loaded, dataset: Dataset) -> tuple[float, dict[int, float]]:
    """Mean of -log p per supervised token: over all conversations, and over those of each source that has some."""
    packs = pack_rows(dataset, loaded.tokenizer, loaded.candidates, loaded.images)
    which = tqdm(range(len(packs)), desc="loss", unit="pack", file=sys.stderr, mininterval=1.0)
    losses = row_losses(loaded.model, packs, which)
    sources = np.unique(dataset.source_of).tolist()
    return losses.mean(), {source: losses.mean(dataset.source_of == source) for source in sources}
