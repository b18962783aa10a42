"""Where the factors of every official Linear lie in ours: one module each, or a slice of the stacked experts.

Needs names and shapes only, so a model without memory for its weights (`vl2.parameters.build_model`) will do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from paddle import nn

from vl2.lora_settings import GROUPS, LoRASettings
from vl2.moe import Experts

# Linears of the official model that nothing computes with: an adapter trained elsewhere may hold factors for them.
UNUSED = tuple(f"vision.attn_pool.{name}" for name in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2"))
# Linears of the official model that no group holds.
UNTUNED = ("language.lm_head",)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The factors of one official Linear."""

    group: str
    factor: str  # path of our factors without the end "_A" or "_B"
    expert: int | None  # index into the stacked factors
    in_features: int
    out_features: int

    def shape(self, letter: str, rank: int) -> tuple[int, int]:
        """[in, r] of A, [r, out] of B."""
        return (self.in_features, rank) if letter == "A" else (rank, self.out_features)


def slots(model: nn.Layer) -> dict[str, Slot]:
    """Every Linear that a group can tune, by its official name.

    language.model.layers.1.mlp.experts.3.up_proj
        -> group experts, factor language.model.layers.1.mlp.experts.lora.up, expert 3

    Args:
        model: a DeepseekVL2, with or without factors.
    """
    found = {}
    for path, layer in model.named_sublayers():
        group = next((name for name, pattern in GROUPS.items() if re.fullmatch(pattern, path)), None)
        if group is None:
            continue
        if not isinstance(layer, Experts):
            size, out = layer.weight.shape
            found[path] = Slot(group=group, factor=f"{path}.lora", expert=None, in_features=size, out_features=out)
            continue
        num_experts, size, inner = layer.gate_up.shape[0], layer.gate_up.shape[1], layer.down.shape[1]
        for expert in range(num_experts):
            for leaf, width, out in (("gate", size, inner), ("up", size, inner), ("down", inner, size)):
                found[f"{path}.{expert}.{leaf}_proj"] = Slot(
                    group=group, factor=f"{path}.lora.{leaf}", expert=expert, in_features=width, out_features=out
                )
    return found


def factor_shapes(settings: LoRASettings, found: Mapping[str, Slot]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the factors that these settings put into the model that `slots` looked at.

    With PiSSA also of where each of them started.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for slot in found.values():
        if slot.group in settings.groups:
            for letter in "AB":
                piece = slot.shape(letter, settings.rank_of(slot.group))
                # The last expert's index is the greatest.
                shape = piece if slot.expert is None else (slot.expert + 1, *piece)
                for name in ("", "_start") if settings.pissa else ("",):
                    shapes[f"{slot.factor}_{letter}{name}"] = shape
    return shapes


def difference(found: Mapping[str, Iterable[int]], expected: Mapping[str, Iterable[int]]) -> list[str]:
    """Missing, unknown and wrongly shaped names, a line each with up to ten of them; empty when all agree."""
    wrong = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and list(found[name]) != list(shape)
    ]
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    return [
        f"  {title} ({len(names)}): {'; '.join(names[:10])}" + (" ..." if len(names) > 10 else "")
        for title, names in (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
        if names
    ]
