"""What a training step holds beside weights, gradients and moments: an estimate from shapes.

For a GPU it is computed, not measured; a test holds it against what Paddle allocates on a CPU in the same layout. For
a CPU `bash launch.sh bench memory` holds it against what a process has.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.config.schema import TrainConfig
from train.config.trains import trained_groups
from vl2.config import LanguageConfig, VisionConfig, VL2Config
from vl2.dtypes import DTYPE_OF_SETTING, item_bytes
from vl2.expert_mlp import GROUP
from vl2.language import HEAD_CHUNK
from vl2.quantised import SLICE

# Rows that batches of experts hold for each row that there is, padding included: 1.2 to 1.5 with routers at random.
PADDING = 1.3
TILES_AT_ONCE, TILES_ON_CPU = 32, 1  # that a frozen tower sees, see `vl2.model.frozen_tile_slice`
_TOKENS_A_TILE = 200  # at the least, so that a pack's tokens bound its tiles


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of a step on a full pack, by what holds them; not all of them at the same time."""

    seeing: int  # while the vision tower sees the pack's tiles
    kept: int  # from forward to backward: the tower's features and what the layers keep
    layer: int  # the layer that is computed backward
    logits: int  # of the positions that are computed together, with their gradients
    cast: int  # trained weights in the type they are computed in, and their gradients in it

    @property
    def num_bytes(self) -> int:
        """At the peak."""
        return max(self.seeing, self.kept + max(self.layer, self.logits)) + self.cast


def step_memory(model: VL2Config, config: TrainConfig, *, on_gpu: bool = True) -> StepMemory:
    """What a step on a full pack holds in each process.

    Args:
        model: the base model.
        config: of the run: packs, precision, recomputation, what trains.
        on_gpu: else as a CPU computes: in float32, experts one after the other.
    """
    item = item_bytes(DTYPE_OF_SETTING[config.precision]) if on_gpu else 4
    language, tokens = model.language, config.data.max_tokens
    tiles = max(1, min(config.data.max_tiles_per_pack, tokens // _TOKENS_A_TILE))
    layers = range(language.num_hidden_layers)
    saved = [item * saved_numbers(language, layer, tokens, on_gpu) for layer in layers]
    # Recomputed layers keep their input; one of them at a time has its activations, others have them all along.
    kept = sum(
        item * tokens * language.hidden_size if config.recompute and layer % config.recompute == 0 else saved[layer]
        for layer in layers
    )
    alive = max(saved) if config.recompute else 0
    few_bits = on_gpu and config.model.frozen != "none"
    backward = alive + item * max(_sent_back(language, layer, tokens, on_gpu, few_bits) for layer in layers)
    if few_bits:  # codes as an index, values and products in float32, and both in the type that is computed in
        backward += SLICE * (2 + 4 + 4 + 2 * item)
    # Logits in both types, their softmax and gradients in float32.
    head = min(tokens, HEAD_CHUNK) * language.vocab_size * (2 * item + 3 * 4)
    seeing, seen = _vision(model.vision, config, tiles, item, TILES_AT_ONCE if on_gpu else TILES_ON_CPU)
    return StepMemory(
        seeing=round(seeing),
        kept=round(seen + kept),
        layer=round(backward),
        logits=head,
        cast=_cast(model, config, item),
    )


def activation_memory(model: VL2Config, config: TrainConfig) -> int:
    """Bytes that a step on a full pack holds at its peak, in each process on a GPU."""
    return step_memory(model, config).num_bytes


def saved_numbers(language: LanguageConfig, layer: int, tokens: int, on_gpu: bool) -> float:
    """Numbers that a decoder layer keeps for its backward."""
    heads, width = language.num_attention_heads, language.hidden_size
    attention = 4 * width + heads * (4 * _key_width(language) + 2 * _value_width(language))
    if language.use_mla:  # latents, and keys and values before they are put together
        attention += (language.kv_lora_rank or 0) + heads * (language.qk_nope_head_dim + language.v_head_dim)
    if not language.is_moe(layer):
        return tokens * (attention + 3 * language.intermediate_size)
    inner = language.moe_intermediate_size
    rows = (PADDING if on_gpu else 1) * tokens * language.num_experts_per_tok
    shared = 3 * inner * (language.n_shared_experts or 0)
    router = 2 * 3 * (language.n_routed_experts or 0)  # in float32: two of these numbers each
    # A CPU has copies of tokens, results and what lies between by groups, see `vl2.expert_mlp`.
    experts = 3 * width + 4 * inner if on_gpu else 2 * inner
    return tokens * (attention + shared + router) + rows * experts


def _sent_back(language: LanguageConfig, layer: int, tokens: int, on_gpu: bool, few_bits: bool) -> float:
    """Numbers that are there at once in a decoder layer's backward: gradients, and copies of weights in full."""
    width = language.hidden_size
    if not language.is_moe(layer):
        return tokens * (2 * width + 3 * language.intermediate_size)
    inner = language.moe_intermediate_size
    if not on_gpu:
        shared = 3 * inner * (language.n_shared_experts or 0)
        return tokens * (2 * width + shared) + GROUP * (2 * width + 4 * inner)
    rows = PADDING * tokens * language.num_experts_per_tok
    copied = 0
    if not few_bits:  # weights of crowded experts, beside the stacked ones
        copied = 2 * (language.n_routed_experts or 0) * width * inner
    return tokens * 2 * width + rows * max(width + 4 * inner, 3 * width + 2 * inner) + copied


def _key_width(language: LanguageConfig) -> int:
    """Channels of a head's query and key; flash attention pads values to it."""
    if language.use_mla:
        return language.qk_nope_head_dim + language.qk_rope_head_dim
    return language.head_dim


def _value_width(language: LanguageConfig) -> int:
    return language.v_head_dim if language.use_mla else language.head_dim


def _vision(vision: VisionConfig, config: TrainConfig, tiles: int, item: int, at_once: int) -> tuple[int, int]:
    """(bytes while the tower sees a pack's tiles, bytes that stay for backward)."""
    patches, width = vision.grid**2, vision.width
    block = 8 * width + 2 * vision.mlp_width + 2 * width  # float32 of the norm counts twice
    features = item * tiles * patches * width
    if "vision" not in trained_groups(config):
        return features + item * min(tiles, at_once) * patches * block, features
    alive = item * tiles * patches * block
    kept = features * vision.layers if config.recompute else alive * vision.layers
    return kept + 2 * alive, kept


def _cast(model: VL2Config, config: TrainConfig, item: int) -> int:
    """Bytes of trainable weights as one layer computes with them, and of their gradients on the way to float32."""
    if item == 4:
        return 0
    language = model.language
    if config.lora.rank:
        tables = {"embeddings", "head"} & set(config.lora.also_train)
        return language.vocab_size * language.hidden_size * (2 * item + 4) if tables else 0
    experts = (language.n_routed_experts or 0) * language.hidden_size * language.moe_intermediate_size
    table = language.vocab_size * language.hidden_size
    return max(3 * experts * 2 * item + 2 * experts * 4, table * (2 * item + 4))
