"""What trains in a run, and whether the settings of it go together."""

from __future__ import annotations

from collections.abc import Callable

from train.config.schema import PARAMETER_GROUPS, TrainConfig
from vl2.errors import UserError

# The groups of weights that a part of `trainable` is made of.
_GROUPS_OF_PART = {
    "vision": ("vision",),
    "projector": ("projector",),
    "language": tuple(group for group in PARAMETER_GROUPS if group not in ("vision", "projector")),
}
_OF_ADAPTERS = (
    "rslora",
    "pissa",
    "also_train",
    "plus_scale",
    "init",
)  # keys of `lora` that say nothing where there are no adapters
_VECTORS = ("norms",)  # groups without a matrix


def trained_groups(config: TrainConfig) -> tuple[str, ...]:
    """The groups of weights that a run trains, themselves or by adapters."""
    if config.lora.rank == 0:
        return tuple(group for part in config.trainable for group in _GROUPS_OF_PART[part])
    return (*config.lora.groups, *config.lora.also_train)


def check_trains(config: TrainConfig) -> None:
    """Refuse settings of what trains that do not go together.

    Raises:
        UserError: with the keys.
    """
    lora = config.lora
    if lora.rank == 0 and not config.trainable:
        raise UserError("lora.rank=0 and trainable=[]: nothing would train; name parts in trainable or give a rank")
    if lora.rank and not lora.groups:
        raise UserError("lora.groups=[]: nothing would train; name groups or give lora.rank=0")
    for name, table in (("ranks", lora.ranks), ("alphas", lora.alphas)):
        stray = sorted(set(table) - set(lora.groups))
        if stray:
            raise UserError(f"lora.{name}.{stray[0]}: {stray[0]} is not in lora.groups={lora.groups}")
    default = type(lora)()
    for name in _OF_ADAPTERS:
        value = getattr(lora, name)
        if lora.rank == 0 and value != getattr(default, name):
            raise UserError(f"lora.{name}={value} with lora.rank=0: no adapter would train; give lora.rank")
    if lora.pissa and lora.init:
        raise UserError(
            f"lora.pissa=true with lora.init={lora.init}: adapters start at the principal singular values or at that "
            "adapter; give one of them"
        )
    if lora.pissa and lora.dropout:
        raise UserError(
            f"lora.pissa=true with lora.dropout={lora.dropout}: it would drop the greatest part of the weights; give "
            "lora.dropout=0"
        )
    _check_frozen(config)
    if config.data.vision_cache and "vision" in trained_groups(config):
        key = "trainable" if lora.rank == 0 else "lora.groups" if "vision" in lora.groups else "lora.also_train"
        raise UserError(
            f"data.vision_cache={config.data.vision_cache}: the vision tower trains in this run ({key} has vision), so "
            "what it makes of a picture changes with every step; take vision out, or give no data.vision_cache"
        )
    if both := [group for group in lora.also_train if group in lora.groups]:
        raise UserError(
            f"lora.also_train={lora.also_train}: {both[0]} has adapters by lora.groups, so it cannot train itself too; "
            "take it out of one of them"
        )


def _check_frozen(config: TrainConfig) -> None:
    """Refuse what weights in few bits cannot do."""
    frozen, lora = config.model.frozen, config.lora
    if config.model.frozen_cache and frozen == "none":
        raise UserError(
            f"model.frozen_cache={config.model.frozen_cache} with model.frozen=none: nothing would be kept there; give "
            "model.frozen=nf4 or int8"
        )
    if frozen == "none":
        return
    given = f"model.frozen={frozen}"
    if lora.rank == 0 and "language" in config.trainable:
        raise UserError(
            f"{given} with lora.rank=0 and trainable={config.trainable}: the language model's weights would train, and "
            "in few bits they cannot; give lora.rank, or take language out of trainable"
        )
    if lora.pissa:
        raise UserError(
            f"{given} with lora.pissa=true: adapters would start at the singular values of weights that are not there "
            "in full; give lora.pissa=false"
        )
    if config.model.init == "random":
        raise UserError(f"{given} with model.init=random: there is no checkpoint to quantise; give model.frozen=none")
    if config.sharding.stage == 3:
        raise UserError(
            f"{given} with sharding.stage=3: weights in few bits are not divided over processes; give sharding.stage=2 "
            "or model.frozen=none"
        )


def check_groups(config: TrainConfig, is_named: Callable[[str], bool]) -> None:
    """Refuse rates of groups that do not train; an option of conf/optim may have them, as it is for many runs.

    Args:
        config: of the run.
        is_named: whether the user named a group, on the command line or in a recipe of their own.

    Raises:
        UserError: a group that the user named and that does not train, or a weight decay of vectors.
    """
    trained = trained_groups(config)
    for group, rates in config.optim.groups.items():
        if group not in trained and is_named(group):
            raise UserError(
                f"optim.groups.{group}: {group} does not train in this run, only {', '.join(trained)} do; take it out, "
                f"or name it in {'lora.groups' if config.lora.rank else 'trainable'}"
            )
        if group in _VECTORS and rates.weight_decay is not None:
            raise UserError(f"optim.groups.{group}.weight_decay: {group} are vectors, which never decay; leave it out")
