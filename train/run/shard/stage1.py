"""Stage 1: each weight's moments, and AdamW's work on it, in one process only, which sends it to the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace

import paddle
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer.dygraph_sharding_optimizer import (
    DygraphShardingOptimizer,
)
from paddle.optimizer import Optimizer

from train.run.shard.group import ShardGroup


class ShardedOptimizer(DygraphShardingOptimizer):
    """An optimizer that steps the parameters of its own process and gets the others' from theirs.

    Fleet's, which gives whole parameters out, the largest first, each to the process that has the least so far, and
    sends each on after the step. `fleet.distributed_optimizer` is not used: it makes a dozen groups, would clip by a
    norm of its own, and averages gradients where ours are summed by `train.run.gradients`. The sums stay on all
    processes, so norm, clipping and the check for what is not finite are those without sharding, and so are the
    weights, bit for bit.

    Args:
        optimizer: over all parameters, without moments: they are made for `optimizer._parameter_list`, which this
            shortens to the process's own.
        group: of the processes that share.
    """

    def __init__(self, optimizer: Optimizer, group: ShardGroup):
        strategy = fleet.DistributedStrategy()
        strategy.hybrid_configs["sharding_configs"].use_reduce_avg = False  # NCCL's, and not asked for
        fleet.fleet._user_defined_strategy = strategy  # from where the class takes it; `fleet.init` would make groups
        super().__init__(optimizer, group)


def heaviest_share(sizes: Mapping[str, int], degree: int) -> int:
    """Numbers of the parameters that the process with the most of them owns, as fleet's optimizer gives them out.

    Args:
        sizes: numbers of each parameter.
        degree: processes that share.
    """
    listed = [SimpleNamespace(name=name, shape=[size]) for name, size in sizes.items()]
    all_of_them = SimpleNamespace(_sharding_world_size=degree, _parameter_list=listed)
    given = DygraphShardingOptimizer._partition_parameters(all_of_them)
    return max(sum(math.prod(p.shape) for p in own) for own in given.values())


def owned(optimizer: Optimizer, parameters: Mapping[str, paddle.Tensor]) -> dict[str, paddle.Tensor]:
    """Those of `parameters` whose moments this process keeps: all of them without sharding."""
    names = {p.name for p in getattr(optimizer, "_inner_opt", optimizer)._parameter_list}
    return {name: p for name, p in parameters.items() if p.name in names}
