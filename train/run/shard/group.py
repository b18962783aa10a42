"""The processes that share one optimizer, and the group through which they talk."""

from __future__ import annotations

from dataclasses import dataclass

import paddle
import paddle.distributed as dist
from paddle.distributed.communication.group import Group

from train.config.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ShardGroup:
    """Processes that keep one optimizer's state together.

        sharding.degree=2, 4 processes    0 1 | 2 3    degree 2, index 0 1 0 1: two copies of the state, each in halves

    The methods are what fleet's sharding optimizers ask of fleet's communicator.
    """

    degree: int  # processes that share
    index: int  # of this process among them
    group: Group  # through which the owner of a weight sends it to the others

    def get_sharding_parallel_world_size(self) -> int:
        """`degree`."""
        return self.degree

    def get_sharding_parallel_rank(self) -> int:
        """`index`."""
        return self.index

    def get_sharding_parallel_group(self) -> Group:
        """`group`."""
        return self.group


def shard_degree(config: TrainConfig) -> int:
    """Processes that keep one optimizer's state together; 1: nothing is shared."""
    if not config.sharding.stage:
        return 1
    return config.sharding.degree or config.nproc * config.nnodes


def make_shard_group(config: TrainConfig) -> ShardGroup | None:
    """The group of this process; None where nothing is shared. Collective.

    On a CPU it talks through the group of all processes, in which the first `degree` own everything: a further group of
    gloo could not be made reliably by 4 processes (6 of 10 tries ended with "Connection refused", also when nobody made
    two at a time; the group of all, made once, never did). Its pairs give up the port they listened on before they
    connect from it, and a listener of another process may be given it in between.
    """
    degree, ranks, rank = shard_degree(config), dist.get_world_size(), dist.get_rank()
    if degree == 1:
        return None
    if degree == ranks or paddle.get_device() == "cpu":
        return ShardGroup(degree=degree, index=rank % degree, group=dist.get_group(0))
    # Every process makes all of them, in the same order.
    groups = [dist.new_group(list(range(first, first + degree))) for first in range(0, ranks, degree)]
    return ShardGroup(degree=degree, index=rank % degree, group=groups[rank // degree])
