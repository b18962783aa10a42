"""Which process owns which parameter: the largest first, each to the one that has the least so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace

from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer.dygraph_sharding_optimizer import (
    DygraphShardingOptimizer,
)

LAYERS = "language.model.layers."


def owners(sizes: Mapping[str, int], degree: int) -> dict[str, int]:
    """The process that owns each parameter, as fleet's sharding optimizer gives them out.

    Args:
        sizes: numbers of each parameter.
        degree: processes that share.
    """
    listed = [SimpleNamespace(name=name, shape=[size]) for name, size in sizes.items()]
    all_of_them = SimpleNamespace(_sharding_world_size=degree, _parameter_list=listed)
    given = DygraphShardingOptimizer._partition_parameters(all_of_them)
    return {p.name: rank for rank, own in given.items() for p in own}


def heaviest_share(sizes: Mapping[str, int], degree: int, names: Iterable[str] | None = None) -> int:
    """Numbers that the process with the most of them owns.

    Args:
        sizes: numbers of each parameter, all of which are given out.
        degree: processes that share.
        names: those that count; None: all.
    """
    owner, counted = owners(sizes, degree), set(sizes if names is None else names)
    shares = [sum(sizes[name] for name in counted if owner[name] == rank) for rank in range(degree)]
    return max(shares)


def layer_of(name: str) -> int | None:
    """The decoder layer, from 0, that a parameter belongs to; None: to none."""
    return int(name[len(LAYERS) :].partition(".")[0]) if name.startswith(LAYERS) else None


def numbers_of_layers(sizes: Mapping[str, int]) -> dict[int, int]:
    """Numbers of each decoder layer that has some of these parameters."""
    layers = {index for name in sizes if (index := layer_of(name)) is not None}
    return {index: sum(size for name, size in sizes.items() if layer_of(name) == index) for index in sorted(layers)}
