"""An adapter of PiSSA as plain LoRA of twice the rank, which every reader of adapters understands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import paddle

from vl2.adapter.foreign import Adapter, Piece
from vl2.adapter.slots import Slot, factor_shapes
from vl2.checkpoint.tensor_files import MemoryTensor
from vl2.lora_layers import addition
from vl2.lora_settings import LoRASettings, is_start


def plain_settings(settings: LoRASettings) -> LoRASettings:
    """Settings without PiSSA that scale as these do, at twice the rank."""
    ranks = {group: 2 * settings.rank_of(group) for group in settings.groups}
    return LoRASettings(
        groups=settings.groups,
        rank=2 * settings.rank,
        alpha=settings.alpha,
        ranks=ranks,
        alphas={group: settings.scaling_of(group) * rank for group, rank in ranks.items()},
    )


def as_plain(adapter: Adapter, found: Mapping[str, Slot]) -> Adapter:
    """The same addition without PiSSA; an adapter of any other start stays as it is.

    Args:
        adapter: in any format.
        found: `slots` of its base.
    """
    if not adapter.settings.pissa:
        return adapter
    pieces = {}
    for name in adapter.shapes:
        if name.endswith("_A"):
            pair = (name, f"{name[:-1]}B")
            values = [paddle.to_tensor(adapter.factor(one)) for one in (*pair, *(f"{one}_start" for one in pair))]
            for one, value in zip(pair, addition(*values)):
                pieces[one] = (Piece(MemoryTensor("float32", value.numpy())),)
    assert all(name in pieces or is_start(name) for name in adapter.shapes)
    settings = replace(plain_settings(adapter.settings), also_train=adapter.settings.also_train)
    return replace(adapter, settings=settings, shapes=factor_shapes(settings, found), pieces=pieces)
