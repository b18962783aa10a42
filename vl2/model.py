"""DeepSeek-VL2: vision tower, projector and language model over one flat stream of packed conversations.

Shape suffixes: T tokens of the stream, S segments (conversations), N tiles, D model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
from paddle import nn

from vl2.balance import LoadBalance
from vl2.cache import KVCache
from vl2.config import VL2Config
from vl2.errors import UserError
from vl2.language import LanguageModel
from vl2.projector import Projector, arrange, distinct_tiles
from vl2.vision import VisionTower

IGNORE = -100


class DeepseekVL2(nn.Layer):
    """The model: three named children and two learned rows, named as in the checkpoint (`view_seperator` is its word).

    A batch is a mapping of arrays or tensors (see `data`): `input_ids` [T], `position_ids` [T], `seq_lens` [S], for
    training `labels` [T] (already shifted, -100 where nothing is supervised), and with images `tiles` uint8
    [N, 3, 384, 384] and `grids` [images, 2] (width, height in tiles).

    Args:
        config: sizes and switches.
        image_token_id: id that marks an image's positions in `input_ids`; it comes from the tokenizer.
    """

    def __init__(self, config: VL2Config, *, image_token_id: int):
        super().__init__()
        self.config = config
        self.image_token_id = image_token_id
        # float32 on CPU, which has no 16-bit kernels; a 16-bit type on GPU.
        self.compute_dtype = "float32"
        self.vision = VisionTower(config.vision)
        self.projector = Projector(config.projector)
        self.language = LanguageModel(config.language)
        self.image_newline = self.create_parameter([config.projector.n_embed])
        self.view_seperator = self.create_parameter([config.projector.n_embed])

    def set_recompute(self, every: int) -> None:
        """Recompute every n-th layer in backward; 0 keeps all activations."""
        self.language.model.recompute_every = every
        self.vision.recompute_every = every

    def image_rows(self, tiles_N3XX: np.ndarray, grids: list[tuple[int, int]]) -> paddle.Tensor:
        """Rows of all images in stream order, [sum of image tokens, D].

        Equal tiles are encoded once: an image of one local tile has it twice, as its global view too.
        """
        tiles = _array(tiles_N3XX)
        first, which = distinct_tiles(tiles, grids)
        pixels = paddle.to_tensor(tiles[first])
        if any(not p.stop_gradient for p in self.vision.parameters()) and paddle.is_grad_enabled():
            features_NPW = self.vision(pixels, self.compute_dtype)
        else:
            with paddle.no_grad():
                size = frozen_tile_slice(pixels.place)
                slices = range(0, len(first), size)
                parts = [self.vision(pixels[i : i + size], self.compute_dtype) for i in slices]
                features_NPW = parts[0] if len(parts) == 1 else paddle.concat(parts, axis=0)
        return arrange(self.projector(features_NPW), which, self.image_newline, self.view_seperator, grids)

    def embed(self, batch: Mapping) -> paddle.Tensor:
        """Input embeddings of the stream, [T, D]: text rows from the table, image rows from the tower.

        Raises:
            UserError: when the image positions in `input_ids` and the images given do not match.
        """
        ids_T = _tensor(batch["input_ids"])
        x_TD = self.embed_text(ids_T)
        positions = np.flatnonzero(_array(batch["input_ids"]) == self.image_token_id)
        if "tiles" not in batch:
            if positions.size:
                raise UserError(f"{positions.size} image positions in input_ids, but the batch holds no tiles")
            return x_TD
        grids = [(int(w), int(h)) for w, h in _array(batch["grids"])]
        rows = self.image_rows(batch["tiles"], grids)
        if rows.shape[0] != positions.size:
            raise UserError(f"{positions.size} image positions in input_ids, but the images fill {rows.shape[0]}")
        # Out of place: written into a view, the projector would get no gradient.
        return paddle.scatter(x_TD, paddle.to_tensor(positions, place=x_TD.place), rows)

    def embed_text(self, ids_T: paddle.Tensor) -> paddle.Tensor:
        """Rows of the table, [T] -> [T, D], whatever the ids mean."""
        return self.language.model.embed_tokens(ids_T).astype(self.compute_dtype)

    def forward(self, batch: Mapping, trace: list | None = None, balance: LoadBalance | None = None) -> paddle.Tensor:
        """Final hidden states of a batch, [T, D]."""
        stream = self.embed(batch), batch["position_ids"], batch["seq_lens"]
        return self.decode_stream(*stream, trace=trace, balance=balance)

    def decode_stream(
        self,
        x_TD: paddle.Tensor,
        position_ids: Any,
        seq_lens: Any,
        cache: KVCache | None = None,
        trace: list | None = None,
        balance: LoadBalance | None = None,
    ) -> paddle.Tensor:
        """Language model over embeddings: [T, D] -> final hidden states [T, D]."""
        lens = [int(n) for n in _array(seq_lens)]
        return self.language.model(x_TD, _tensor(position_ids), lens, cache, trace, balance)

    def loss(
        self, batch: Mapping, balance: LoadBalance | None = None, of_tokens: list[paddle.Tensor] | None = None
    ) -> tuple[paddle.Tensor, int]:
        """Token-exact loss of a batch.

        Args:
            batch: see the class.
            balance: of this batch; receives the load-balance loss, which is not part of what is returned.
            of_tokens: receives the loss of each supervised token in the order of the stream, as float32 tensors [n, 1]
                that follow one another and that no gradient goes through.

        Returns:
            (sum of -log p over the supervised tokens as a float32 scalar tensor, their number as an int). The sum of a
            batch without supervised tokens is 0 and reaches no parameter.
        """
        labels = _array(batch["labels"])
        supervised = np.flatnonzero(labels != IGNORE)
        if supervised.size == 0:
            return paddle.zeros([], dtype="float32"), 0
        hidden_TD = self(batch, balance=balance)
        hidden_ND = paddle.gather(hidden_TD, paddle.to_tensor(supervised, place=hidden_TD.place))
        targets_N = paddle.to_tensor(labels[supervised], place=hidden_TD.place)
        return self.language.loss_sum(hidden_ND, targets_N, of_tokens), int(supervised.size)


def frozen_tile_slice(place: paddle.base.core.Place) -> int:
    """Tiles that go through a frozen tower at once, which bounds its activations; a GPU outruns the host with few."""
    return 32 if place.is_gpu_place() else 8


def _array(x: Any) -> np.ndarray:
    return x.numpy() if isinstance(x, paddle.Tensor) else np.asarray(x)


def _tensor(x: Any) -> paddle.Tensor:
    return x if isinstance(x, paddle.Tensor) else paddle.to_tensor(x)
