"""DeepSeek-VL2: vision tower, projector and language model over one flat stream of packed conversations.

Shape suffixes: T tokens of the stream, S segments (conversations), N tiles, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import paddle
from paddle import nn

from vl2.balance import LoadBalance
from vl2.cache import Step
from vl2.config import VL2Config
from vl2.constant_tensors import send
from vl2.errors import UserError
from vl2.language import LanguageModel
from vl2.projector import Arrangement, Projector, arrange, distinct_tiles, plan_rows
from vl2.vision import VisionTower

IGNORE = -100


class ImagePlan(NamedTuple):
    """Where the images of a batch go."""

    first: np.ndarray  # the distinct tiles, which are encoded, among all
    rows: Arrangement
    positions_R: np.ndarray  # of their rows in the stream


class DeepseekVL2(nn.Layer):
    """The model: three named children and two learned rows, named as in the checkpoint (`view_seperator` is its word).

    A batch is a mapping of arrays or tensors (see `data`): `input_ids` [T], `position_ids` [T], `seq_lens` [S], for
    training `labels` [T] (already shifted, -100 where nothing is supervised), and with images `tiles` uint8
    [N, 3, 384, 384] and `grids` [images, 2] (width, height in tiles). In place of `tiles` there may be `seen`:
    what `see` gave of the distinct ones.

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

    def image_rows(self, batch: Mapping, plan: ImagePlan, order_R: paddle.Tensor) -> paddle.Tensor:
        """Rows of all images in stream order, [sum of image tokens, D].

        Equal tiles are encoded once: an image of one local tile has it twice, as its global view too.
        """
        trained = any(not p.stop_gradient for p in self.vision.parameters()) and paddle.is_grad_enabled()
        if "seen" not in batch and trained:
            features_NPW = self.vision(paddle.to_tensor(_array(batch["tiles"])[plan.first]), self.compute_dtype)
            parts = [self.projector(features_NPW)]
        else:
            parts = self._projected(list(self._frozen_features(batch, plan)))
        return self._arranged(parts, plan, order_R)

    def see(self, tiles_N3XX: np.ndarray) -> Iterator[paddle.Tensor]:
        """What the frozen parts make of tiles, slice by slice: [n, P, W], or [n, G, D] of a projector frozen as well.

        What a tile becomes does not depend, on a CPU, on the tiles beside it: a slice there is one tile, since the
        rounding of a matrix product changes with the number of its rows.
        """
        pixels = paddle.to_tensor(tiles_N3XX)
        size = frozen_tile_slice(pixels.place)
        for start in range(0, len(tiles_N3XX), size):
            with paddle.no_grad():
                features_NPW = self.vision(pixels[start : start + size], self.compute_dtype)
                part = self.projector(features_NPW) if self.projects_frozen() else features_NPW
            yield part

    def seen(self, tiles_N3XX: np.ndarray) -> np.ndarray:
        """What `see` gives, on the host; bfloat16 as uint16."""
        return np.concatenate([part.numpy() for part in self.see(tiles_N3XX)])

    def projects_frozen(self) -> bool:
        """Whether the projector's numbers are those of every step, so that `see` goes through it too."""
        return all(p.stop_gradient for p in self.projector.parameters())

    def _frozen_features(self, batch: Mapping, plan: ImagePlan) -> Iterator[paddle.Tensor]:
        """What `see` gives of the distinct tiles; slices of it where the batch has it already."""
        if "seen" not in batch:
            yield from self.see(_array(batch["tiles"])[plan.first])
            return
        seen = _tensor(batch["seen"])
        size = frozen_tile_slice(seen.place)
        yield from (seen[start : start + size] for start in range(0, len(plan.first), size))

    def _projected(self, parts: list[paddle.Tensor]) -> list[paddle.Tensor]:
        """What `see` gave, through the projector where it was not yet."""
        if self.projects_frozen():
            return parts
        # Together where a gradient needs them, which is one product then; else each part by itself, as in `see`.
        return [self.projector(part) for part in ([_joined(parts)] if paddle.is_grad_enabled() else parts)]

    def _arranged(self, parts: list[paddle.Tensor], plan: ImagePlan, order_R: paddle.Tensor) -> paddle.Tensor:
        return arrange(_joined(parts), self.image_newline, self.view_seperator, plan.rows, order_R)

    def plan_images(self, batch: Mapping) -> ImagePlan | None:
        """Where the images of a batch go; None where it has none.

        Raises:
            UserError: when the image positions in `input_ids` and the images given do not match.
        """
        positions_R = np.flatnonzero(_array(batch["input_ids"]) == self.image_token_id)
        if "tiles" not in batch and "seen" not in batch:
            if positions_R.size:
                raise UserError(f"{positions_R.size} image positions in input_ids, but the batch holds no tiles")
            return None
        grids = [(int(w), int(h)) for w, h in _array(batch["grids"])]
        first, which = distinct_tiles(_array(batch["tiles"]) if "tiles" in batch else None, grids)
        rows = plan_rows(which, grids, -(-self.config.vision.grid // self.projector.ratio))
        if len(rows.order_R) != positions_R.size:
            raise UserError(f"{positions_R.size} image positions in input_ids, but the images fill {len(rows.order_R)}")
        return ImagePlan(first, rows, positions_R)

    def embed(self, batch: Mapping) -> paddle.Tensor:
        """Input embeddings of the stream, [T, D]: text rows from the table, image rows from the tower.

        Raises:
            UserError: when the image positions in `input_ids` and the images given do not match.
        """
        plan = self.plan_images(batch)
        return self._embed(batch, plan, send(_stream_numbers(batch, plan)))

    def embed_by_slices(self, batch: Mapping) -> Iterator[paddle.Tensor | None]:
        """`embed` in pieces of bounded work, without gradients: None after each slice of tiles, then the embeddings.

        Raises:
            UserError: see `embed`.
        """
        plan = self.plan_images(batch)
        parts = []
        if plan is not None:
            for part in self._frozen_features(batch, plan):
                parts.append(part)
                yield None
        sent = send(_stream_numbers(batch, plan))
        with paddle.no_grad():
            x_TD = self.embed_text(sent["input_ids"])
            if plan is not None:
                rows = self._arranged(self._projected(parts), plan, sent["image_order"])
                x_TD = paddle.scatter(x_TD, sent["image_positions"], rows)
        yield x_TD

    def _embed(self, batch: Mapping, plan: ImagePlan | None, sent: Mapping[str, paddle.Tensor]) -> paddle.Tensor:
        x_TD = self.embed_text(sent["input_ids"])
        if plan is None:
            return x_TD
        rows = self.image_rows(batch, plan, sent["image_order"])
        # Out of place: written into a view, the projector would get no gradient.
        return paddle.scatter(x_TD, sent["image_positions"], rows)

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
        cache: Step | None = None,
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
        plan = self.plan_images(batch)
        numbers = {
            "supervised": supervised,
            "targets": labels[supervised],
            "position_ids": _array(batch["position_ids"]),
        }
        sent = send(_stream_numbers(batch, plan) | numbers)
        x_TD = self._embed(batch, plan, sent)
        hidden_TD = self.decode_stream(x_TD, sent["position_ids"], batch["seq_lens"], balance=balance)
        hidden_ND = paddle.gather(hidden_TD, sent["supervised"])
        return self.language.loss_sum(hidden_ND, sent["targets"], of_tokens), int(supervised.size)


def _stream_numbers(batch: Mapping, plan: ImagePlan | None) -> dict[str, np.ndarray]:
    """What `_embed` needs on the device beside the tiles."""
    numbers = {"input_ids": _array(batch["input_ids"])}
    return numbers | ({"image_positions": plan.positions_R, "image_order": plan.rows.order_R} if plan else {})


def frozen_tile_slice(place: paddle.base.core.Place) -> int:
    """Tiles that go through a frozen tower at once, which bounds its activations; a GPU outruns the host with few.

    On a CPU more than one are no faster (0.6 to 0.95 of the speed at 384 and 1152 channels), and round differently.
    """
    return 32 if place.is_gpu_place() else 1


def _joined(parts: list[paddle.Tensor]) -> paddle.Tensor:
    return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=0)


def _array(x: Any) -> np.ndarray:
    return x.numpy() if isinstance(x, paddle.Tensor) else np.asarray(x)


def _tensor(x: Any) -> paddle.Tensor:
    return x if isinstance(x, paddle.Tensor) else paddle.to_tensor(x)
