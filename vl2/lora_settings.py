"""What LoRA tunes and how: the groups, the modules each of them means, ranks and scaling. Needs no Paddle."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from vl2.errors import UserError
from vl2.parameter_groups import WHOLE_GROUPS

_LAYER = r"language\.model\.layers\.\d+"
# What each group means, as full matches of module paths. The router is in none: it is no Linear and stays frozen.
GROUPS: dict[str, str] = {
    "attention": rf"{_LAYER}\.self_attn\.(q_proj|q_a_proj|q_b_proj|k_proj|v_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)",
    "experts": rf"{_LAYER}\.mlp\.experts",
    "shared_experts": rf"{_LAYER}\.mlp\.shared_experts\.(gate_proj|up_proj|down_proj)",
    "dense_mlp": rf"{_LAYER}\.mlp\.(gate_proj|up_proj|down_proj)",
    "vision": r"vision\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))",
    "projector": r"projector\.layers\.(0|2)",
}


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """What is tuned, and how."""

    groups: tuple[str, ...]  # names of GROUPS
    rank: int = 8  # inner width of the low-rank product
    alpha: float = 16.0  # the product is scaled by alpha / rank of its group, see `scaling_of`
    dropout: float = 0.0  # probability, on the input of A, in training
    ranks: Mapping[str, int] = field(default_factory=dict)  # rank of single groups, instead of `rank`
    alphas: Mapping[str, float] = field(default_factory=dict)  # alpha of single groups, instead of `alpha`
    pissa: bool = False  # A and B start at the principal singular values of each weight, and add how they move
    also_train: tuple[str, ...] = ()  # groups that train themselves beside the adapters
    rslora: bool = False  # the product is scaled by alpha / sqrt(rank), which does not fade as the rank grows

    def __post_init__(self) -> None:
        for name in (*self.groups, *self.ranks, *self.alphas):
            if name not in GROUPS:
                raise UserError(f"lora.groups: {name!r} is not a group; the groups are {', '.join(GROUPS)}")
        if not self.groups:
            raise UserError("lora.groups is empty: name at least one group, or set lora.rank=0 for full fine-tuning")
        if repeated := {name for name in self.groups if self.groups.count(name) > 1}:
            raise UserError(f"lora.groups names {', '.join(sorted(repeated))} twice")
        for key, table in (("ranks", self.ranks), ("alphas", self.alphas)):
            if unused := set(table) - set(self.groups):
                raise UserError(f"lora.{key} sets {', '.join(sorted(unused))}, which lora.groups does not tune")
        for name in self.groups:
            if self.rank_of(name) < 1:
                raise UserError(f"lora rank of {name} is {self.rank_of(name)}; expected a positive integer")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"lora.dropout is {self.dropout}; expected a probability in [0, 1)")
        if self.pissa and self.dropout:
            raise UserError(
                f"lora.pissa=true with lora.dropout={self.dropout}: it would drop the greatest part of the weights "
                "that it starts at; give lora.dropout=0"
            )
        for name in self.also_train:
            if name not in WHOLE_GROUPS:
                raise UserError(f"lora.also_train: {name!r} is none of {', '.join(WHOLE_GROUPS)}")
            if name in self.groups:
                raise UserError(
                    f"lora.also_train names {name}, which lora.groups adapts: a group trains itself or by adapters; "
                    "take it out of one of them"
                )

    def rank_of(self, group: str) -> int:
        """Rank of one group."""
        return self.ranks.get(group, self.rank)

    def alpha_of(self, group: str) -> float:
        """Alpha of one group."""
        return self.alphas.get(group, self.alpha)

    def scaling_of(self, group: str) -> float:
        """What the low-rank product of one group is multiplied by."""
        rank = self.rank_of(group)
        return self.alpha_of(group) / (math.sqrt(rank) if self.rslora else rank)


def is_factor(path: str, letters: str = "AB") -> bool:
    """Whether a parameter is an A or a B of an adapter, or with `letters` one of them."""
    return re.search(rf"\.(lora_[{letters}]|lora\.(gate|up|down)_[{letters}])$", path) is not None


def is_start(path: str) -> bool:
    """Whether a parameter is where an A or a B of PiSSA started."""
    return path.endswith("_start") and is_factor(path.removesuffix("_start"))
