"""The optimizer's part of sharding: each weight's moments, and AdamW's work on it, in the process that owns it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import paddle
import paddle.distributed as dist
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer.dygraph_sharding_optimizer import (
    DygraphShardingOptimizer,
)
from paddle.optimizer import Optimizer

from train.run.shard.group import ShardGroup


class ShardedOptimizer(DygraphShardingOptimizer):
    """An optimizer that steps the parameters of its own process and gets the others' from theirs.

    Fleet's, which gives whole parameters out as `owners` says, and sends each on after the step.
    `fleet.distributed_optimizer` is not used: it makes a dozen groups, would clip by a norm of its own, and averages
    gradients where ours are summed by `train.run.gradients`. At stage 1 the sums stay on all processes, so norm,
    clipping and the check for what is not finite are those without sharding, and so are the weights, bit for bit.

    Args:
        optimizer: over all parameters, without moments: they are made for `optimizer._parameter_list`, which this
            shortens to the process's own.
        group: of the processes that share.
        stay: Paddle's names of the parameters that are not sent on: stage 3 brings them when they are needed.
    """

    def __init__(self, optimizer: Optimizer, group: ShardGroup, stay: Collection[str] = ()):
        self._stay = stay
        strategy = fleet.DistributedStrategy()
        strategy.hybrid_configs["sharding_configs"].use_reduce_avg = False  # NCCL's, and not asked for
        fleet.fleet._user_defined_strategy = strategy  # from where the class takes it; `fleet.init` would make groups
        super().__init__(optimizer, group)

    @paddle.no_grad()
    def _sharding_sync_parameters(self) -> None:
        """Send each parameter on. Fleet's skips those without a gradient, which from stage 2 on the owner alone has."""
        group = self._hcg.get_sharding_parallel_group()
        tasks = [
            dist.broadcast(parameter, src=group.ranks[rank], group=group, sync_op=False)
            for rank, own in self._rank2params.items()
            for parameter in own
            if parameter.name not in self._stay
        ]
        for task in tasks:
            task.wait()


def owned(optimizer: Optimizer, parameters: Mapping[str, paddle.Tensor]) -> dict[str, paddle.Tensor]:
    """Those of `parameters` whose moments this process keeps: all of them without sharding."""
    names = {p.name for p in getattr(optimizer, "_inner_opt", optimizer)._parameter_list}
    return {name: p for name, p in parameters.items() if p.name in names}
