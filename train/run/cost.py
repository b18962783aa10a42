"""What a pack costs: operations of its products, bytes moved and kernels launched, from config and lengths alone.

Memory is `train.run.memory`'s. What a card would take is computed here, not measured: no card was at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from data.sizes import Sizes
from train.config.schema import TrainConfig
from train.run.activations import PADDING, saved_numbers
from train.run.memory import FLOAT32_BYTES, plan_weights
from vl2.config import VisionConfig, VL2Config
from vl2.dtypes import DTYPE_OF_SETTING, item_bytes
from vl2.kernel_attention import BLOCK
from vl2.language import HEAD_CHUNK
from vl2.lora_settings import is_factor
from vl2.quantised import SLICE, kept_in

# Looked up, added or never computed with; vectors are too small to count.
_NOT_MULTIPLIED = ("embed_tokens.weight", "pos_embed", "image_newline", "view_seperator")
_UNUSED = "vision.attn_pool."
# AdamW reads weight, gradient and both moments, and writes all but the gradient; it was summed and clipped before.
_UPDATE_BYTES = 11 * FLOAT32_BYTES
# Each number that is kept for backward is written, and read by what comes next; numbers that are not kept come to it.
_FORWARD_PASSES, _BACKWARD_PASSES = 3, 5
_LOGIT_PASSES = 8  # of float32: product, softmax, loss and their gradients
# Kernels of a part in forward, again under recomputation, and backward, with adapters: `bench launches` counts them.
_LAUNCHES = {"attention": 104, "norms": 40, "dense": 13, "experts": 212 + 13 + 31, "head": 12, "block": 25, "rest": 100}
_RECOMPUTED = 0.3  # of them are those of the second forward pass
# Of a number in few bits that operations make whole: its code as an index, its value and the product with its scale in
# float32, written and read. A kernel of a CPU writes the result alone.
_MADE_WHOLE_BYTES, _MADE_WHOLE_LAUNCHES = 20, 8
_UPDATE_LAUNCHES = 2  # of a tensor that trains
# Fitted to steps of nano and of MHA and MLA at hidden 512, with and without recomputation, on one thread and on two, to
# within 20 %: exponentials and fresh pages, but also numbers that are still in a cache, against a copy; and Python and
# autograd around an operation against the smallest one.
_OVER_COPY, _OVER_SMALLEST = 0.9, 30
_CPU_EXPERT_LAUNCHES = 20  # of an expert, where they are computed one after the other


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work of a process."""

    flops: float = 0.0  # of matrix products; a multiplication and an addition are two
    num_bytes: float = 0.0  # read and written
    launches: float = 0.0  # kernels

    def __add__(self, other: Cost) -> Cost:
        """Put two pieces of work one after the other."""
        return Cost(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)})

    def __mul__(self, times: float) -> Cost:
        """The same work several times."""
        return Cost(**{field.name: getattr(self, field.name) * times for field in fields(Cost)})


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What computes."""

    name: str
    flops: float  # a second, of products
    num_bytes: float  # a second
    launch: float  # seconds of the host for each kernel
    overlaps: bool  # the host launches while earlier kernels run

    def seconds(self, cost: Cost) -> float:
        """How long some work takes."""
        work, host = cost.flops / self.flops + cost.num_bytes / self.num_bytes, cost.launches * self.launch
        return max(work, host) if self.overlaps else work + host


# Of the published bf16 rate (dense, sums in float32) and bandwidth: shares that trainers of mixtures of experts reach.
FLOPS_SHARE, BANDWIDTH_SHARE, LAUNCH_SECONDS = 0.4, 0.7, 10e-6


def card(name: str, teraflops: float, gigabytes: float) -> Processor:
    """A GPU by what its maker says of it, for bf16 and its memory.

    Args:
        name: of the card.
        teraflops: 10^12 operations a second.
        gigabytes: 10^9 bytes a second.
    """
    rates = {"flops": FLOPS_SHARE * teraflops * 1e12, "num_bytes": BANDWIDTH_SHARE * gigabytes * 1e9}
    return Processor(name=name, **rates, launch=LAUNCH_SECONDS, overlaps=True)


def processor(flops: float, copied: float, smallest: float) -> Processor:
    """A CPU by what was measured on it; `bench cost` holds what comes of that against steps.

    Args:
        flops: operations a second of a large product.
        copied: bytes a second, read and written, of a large copy.
        smallest: seconds of an operation on one number.
    """
    rates = {"flops": flops, "num_bytes": copied / _OVER_COPY, "launch": smallest * _OVER_SMALLEST}
    return Processor(name="CPU", **rates, overlaps=False)


# Sources: NVIDIA's data sheets (Ampere GA102 whitepaper; A100).
CARDS = {
    24: card("RTX 3090", 71, 936),
    40: card("A100 40 GB", 312, 1555),
    80: card("A100 80 GB", 312, 2039),
}


@dataclass(frozen=True, kw_only=True)
class PackCost:
    """Forward and backward of a pack as a sum over what is in it; and what follows once a step."""

    token: Cost
    supervised: Cost  # of each position whose logits are computed
    pair: Cost  # of each query and key that it sees
    tile: Cost
    pack: Cost  # whatever is in it: its weights are read
    update: Cost  # of a step, by each process

    def of(self, lengths: Sequence[int], *, tiles: int, supervised: int) -> Cost:
        """The work of a pack.

        Args:
            lengths: tokens of its conversations.
            tiles: distinct ones.
            supervised: tokens.
        """
        seen = float(pairs(np.asarray(lengths)).sum())
        parts = self.token * sum(lengths) + self.supervised * supervised + self.pair * seen + self.tile * tiles
        return self.pack + parts

    def of_samples(self, sizes: Sizes) -> np.ndarray:
        """Work of each conversation, in millions of operations; what a pack costs by itself is left out: int64 [N]."""
        flops = self.token.flops * sizes.tokens + self.supervised.flops * sizes.supervised
        flops = flops + self.pair.flops * pairs(sizes.tokens) + self.tile.flops * distinct_tiles(sizes)
        return np.rint(flops / 1e6).astype(np.int64)


def pairs(lengths: np.ndarray) -> np.ndarray:
    """Pairs of a query and a key that are multiplied: of a block of queries all keys up to its end, float64 [N]."""
    lengths = lengths.astype(np.float64)
    return lengths * np.minimum(lengths, (lengths + BLOCK) / 2)


def distinct_tiles(sizes: Sizes) -> np.ndarray:
    """Tiles of each conversation that are encoded: the only local tile of a picture is its global view, int64 [N]."""
    twice = np.concatenate([[0], np.cumsum((sizes.grids == 1).all(axis=1))])
    return sizes.tiles - np.diff(twice[sizes.first_image])


def pack_cost(model: VL2Config, config: TrainConfig, *, on_gpu: bool, tower: bool = True) -> PackCost:
    """What packs of a run cost.

    Args:
        model: the base model.
        config: of the run: what trains, precision, recomputation.
        on_gpu: else as a CPU computes.
        tower: False: the vision cache has every picture.

    Raises:
        UserError: a LoRA group that matches nothing in this model.
    """
    language = model.language
    weights = plan_weights(model, config)
    sizes, learned = weights.sizes, weights.learned
    item = item_bytes(DTYPE_OF_SETTING[config.precision]) if on_gpu else FLOAT32_BYTES
    kept_small = {n for n in weights.base_bytes.keys() - learned if kept_in(n, config.model.frozen) != "none"}
    again = 1 / config.recompute if config.recompute else 0.0  # of the layers go forward twice
    trains = {part for part in ("vision", "projector") if any(name.startswith(f"{part}.") for name in learned)}
    flops = dict.fromkeys(("token", "supervised", "tile"), 0.0)
    read = made_whole = 0.0
    for name, size in sizes.items():
        if name.endswith(_NOT_MULTIPLIED) or name.startswith(_UNUSED):
            continue
        where, rows = _rows(name, model, on_gpu)
        if where == "tile" and not tower:
            continue
        passes = _passes(name, again, trains) + (name in learned)
        flops[where] += 2.0 * size * rows * passes
        whole = FLOAT32_BYTES * size if name in learned or is_factor(name) else weights.frozen_bytes([name])
        read += _bytes_read(size, whole, item) * passes
        if on_gpu and name in kept_small:
            read += _MADE_WHOLE_BYTES * size * passes
            made_whole += _MADE_WHOLE_LAUNCHES * math.ceil(size / SLICE) * passes
    numbers = float(sum(sizes[name] for name in learned))
    attention = 2.0 * language.num_hidden_layers * language.num_attention_heads * _head_widths(model)
    forward_again = _FORWARD_PASSES * (1 + again)
    kept = [saved_numbers(language, layer, 1, True) for layer in range(language.num_hidden_layers)]
    tile = _tile(model.vision, item, trains="vision" in trains, again=again, on_gpu=on_gpu) if tower else Cost()
    return PackCost(
        token=Cost(flops=flops["token"], num_bytes=item * sum(kept) * (forward_again + _BACKWARD_PASSES)),
        supervised=Cost(
            flops=flops["supervised"],
            num_bytes=language.vocab_size * FLOAT32_BYTES * _LOGIT_PASSES,
            launches=_LAUNCHES["head"] / HEAD_CHUNK,
        ),
        pair=Cost(
            flops=attention * (1 + again + 2),
            # A CPU writes the weights and reads them; flash attention keeps them in registers.
            num_bytes=0.0
            if on_gpu
            else language.num_hidden_layers * language.num_attention_heads * item * (3 * (1 + again) + 6),
        ),
        tile=tile + Cost(flops=flops["tile"]),
        pack=Cost(num_bytes=read, launches=_launches(model, again, on_gpu, tower) + made_whole),
        update=Cost(num_bytes=numbers * _UPDATE_BYTES, launches=_UPDATE_LAUNCHES * len(learned)),
    )


def _rows(name: str, model: VL2Config, on_gpu: bool) -> tuple[str, float]:
    """What a weight is multiplied for, and with how many rows each time."""
    if name.startswith("vision."):
        return "tile", model.vision.grid**2
    if name.startswith("projector."):
        return "tile", (-(-model.vision.grid // model.projector.downsample_ratio)) ** 2
    if name.startswith("language.lm_head"):
        return "supervised", 1.0
    if ".mlp.experts." in name:
        share = model.language.num_experts_per_tok / (model.language.n_routed_experts or 1)
        return "token", share * (PADDING if on_gpu else 1.0)
    return "token", 1.0


def _passes(name: str, again: float, trains: set[str]) -> float:
    """How often the rows go through a weight: forward, again, and back as the gradient of what came in."""
    if name.startswith("vision."):
        return 2.0 + again if "vision" in trains else 1.0
    if name.startswith("projector."):
        return 2.0 if trains else 1.0
    return 2.0 if name.startswith("language.lm_head") else 2.0 + again


def _bytes_read(size: int, stored: int, item: int) -> int:
    """Bytes that are moved to multiply with a weight: read, and cast where it is stored otherwise.

    Args:
        size: numbers.
        stored: bytes that they are stored in.
        item: bytes of each as it is computed with.
    """
    return stored if stored == size * item else stored + 2 * item * size


def _head_widths(model: VL2Config) -> int:
    """Channels of a head's key and value."""
    language = model.language
    if language.use_mla:
        return language.qk_nope_head_dim + language.qk_rope_head_dim + language.v_head_dim
    return 2 * language.head_dim


def _tile(vision: VisionConfig, item: int, *, trains: bool, again: float, on_gpu: bool) -> Cost:
    """What the tower does with a tile beside its weights' products."""
    patches = vision.grid**2
    passes = _FORWARD_PASSES + (_BACKWARD_PASSES + again * _FORWARD_PASSES if trains else 0)
    block = patches * (10 * vision.width + 2 * vision.mlp_width)
    scores = 0 if on_gpu else vision.heads * patches**2
    products = 2.0 * patches**2 * 2 * vision.width * (3 + again if trains else 1)
    return Cost(flops=vision.layers * products, num_bytes=vision.layers * item * passes * (block + scores))


def _launches(model: VL2Config, again: float, on_gpu: bool, tower: bool) -> float:
    """Kernels of a pack's forward and backward pass, its update aside."""
    language = model.language
    layers = language.num_hidden_layers
    sparse = sum(language.is_moe(layer) for layer in range(layers))
    experts = _LAUNCHES["experts"] if on_gpu else _CPU_EXPERT_LAUNCHES * (language.n_routed_experts or 0)
    of_layers = layers * (_LAUNCHES["attention"] + _LAUNCHES["norms"])
    of_layers += sparse * experts + (layers - sparse) * _LAUNCHES["dense"]
    seen = _LAUNCHES["block"] * model.vision.layers if tower else 0
    return of_layers * (1 - _RECOMPUTED * (1 - again)) + seen + _LAUNCHES["rest"]
