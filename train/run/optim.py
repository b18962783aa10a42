"""The optimizer: learning rate as a function of the step, AdamW, fp16's loss scale, and state by structured names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import paddle
from paddle.optimizer import AdamW, Optimizer
from paddle.optimizer.lr import LRScheduler

from train.config.schema import GroupConfig
from train.run.shard.optimizer import owned
from vl2.checkpoint.tensor_files import MemoryTensor, StoredTensor
from vl2.errors import UserError
from vl2.lora_settings import is_factor
from vl2.parameter_groups import PARAMETER_GROUPS, group_of

STATE_NAMES = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")


def lr_factor(step: int, num_steps: int, *, schedule: str, warmup_ratio: float, min_lr_ratio: float) -> float:
    """What the peak learning rate is multiplied by in optimizer step `step`.

        num_steps 10, warmup_ratio 0.2, cosine to 0    steps 0 1     0.5  1.0                linear warm-up to the peak
                                                       steps 2 .. 9  1.0 0.96 0.85 ... 0.04  would reach 0 at step 10

    Args:
        step: optimizer steps made before this one, 0 .. num_steps - 1.
        num_steps: optimizer steps of the whole run.
        schedule: "cosine" or "constant" after the warm-up.
        warmup_ratio: share of the steps that warm up, rounded up.
        min_lr_ratio: factor at the end of a cosine.
    """
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def decays(parameter: paddle.Tensor) -> bool:
    """Weight decay applies to matrices; norms, biases and the two learned rows of the image grid are vectors."""
    return len(parameter.shape) >= 2


def by_group(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of parameters by the group of weights that they belong to; groups in their order, none of them empty."""
    groups: dict[str, list[str]] = {group: [] for group in PARAMETER_GROUPS}
    for name in names:
        groups[group_of(name)].append(name)
    return {group: found for group, found in groups.items() if found}


def lr_scale(name: str, groups: Mapping[str, GroupConfig], plus_scale: float = 1.0) -> float:
    """What the learning rate of a parameter is multiplied by, and so what it decays by.

    Args:
        name: structured.
        groups: those that learn otherwise.
        plus_scale: LoRA+: for B of every adapter, beside its group's.
    """
    group = groups.get(group_of(name))
    return (group.lr_scale if group else 1.0) * (plus_scale if is_factor(name, "B") else 1.0)


class GroupedAdamW(AdamW):
    """AdamW with a weight decay for each parameter, over one flat list of them.

    Paddle's own takes a list of groups for that, which what partitions an optimizer over ranks does not.

    Args:
        weight_decays: coefficient by Paddle's name of the parameter.
        options: of Paddle's AdamW.
    """

    def __init__(self, weight_decays: Mapping[str, float], **options: Any):
        super().__init__(**options)
        self.weight_decays = weight_decays

    def _append_optimize_op(self, block: Any, param_and_grad: Any) -> Any:
        self._weight_decay = self.weight_decays[param_and_grad[0].name]
        return super()._append_optimize_op(block, param_and_grad)


def build_optimizer(
    parameters: Mapping[str, paddle.Tensor],
    learning_rate: LRScheduler | float,
    *,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    groups: Mapping[str, GroupConfig] | None = None,
    plus_scale: float = 1.0,
    share: Callable[[AdamW], Optimizer] = lambda optimizer: optimizer,
) -> Optimizer:
    """AdamW with float32 state over float32 parameters. It does not clip: see train.run.gradients.

    Args:
        parameters: by structured name; all trainable.
        learning_rate: a number, or a scheduler.
        weight_decay: decoupled, see `decays`; of groups that have none of their own.
        groups: those that learn otherwise.
        plus_scale: see `lr_scale`.
        share: leaves the optimizer the parameters of this process, when several share them; what it gives is returned.
    """
    half = [name for name, p in parameters.items() if p.dtype != paddle.float32]
    assert not half, f"trainable weights are float32, found {half[:3]}"
    assert len({p.name for p in parameters.values()}) == len(parameters), "two parameters share a name"
    groups, weight_decays = groups or {}, {}
    for name, parameter in parameters.items():
        own = groups.get(group_of(name), GroupConfig()).weight_decay
        weight_decays[parameter.name] = (weight_decay if own is None else own) if decays(parameter) else 0.0
        # AdamW's own lr_ratio does not exist on CPU.
        parameter.optimize_attr["learning_rate"] = lr_scale(name, groups, plus_scale)
    optimizer = GroupedAdamW(
        weight_decays,
        learning_rate=learning_rate,
        parameters=list(parameters.values()),
        beta1=beta1,
        beta2=beta2,
        epsilon=eps,
        weight_decay=weight_decay,
    )
    shared = share(optimizer)
    # Now rather than in the first step, so that a state can be set by structured name: Paddle's own state dict goes by
    # automatic names, which a second model in the process shifts. After `share`: only a parameter's owner has moments.
    block = paddle.static.default_main_program().global_block()
    optimizer._create_accumulators(block, optimizer._parameter_list)
    return shared


def loss_scale(scaler: paddle.amp.GradScaler | None) -> float:
    """What a loss is multiplied by before backward: the scale of fp16's scaler, 1 without one.

    Not by `scaler.scale`, which turns the scaler off for good, with a warning only, when it is called outside of
    Paddle's own auto_cast: this model casts by itself.
    """
    return 1.0 if scaler is None else float(scaler.state_dict()["scale"].item())


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, paddle.Tensor]) -> dict[str, np.ndarray]:
    """AdamW's state in this process as `<structured name>:<moment1 | moment2 | beta1_pow_acc | beta2_pow_acc>`."""
    return {
        f"{name}:{kind}": optimizer._accumulators[kind][p.name].numpy()
        for name, p in owned(optimizer, parameters).items()
        for kind in STATE_NAMES
    }


def set_optimizer_state(
    optimizer: Optimizer,
    parameters: Mapping[str, paddle.Tensor],
    state: Mapping[str, StoredTensor] | Mapping[str, MemoryTensor],
) -> None:
    """Set what `optimizer_state` gave in all processes together; each reads what it keeps.

    Raises:
        UserError: when names or shapes differ.
    """
    expected = {
        f"{name}:{kind}": tuple(p.shape) if kind.startswith("moment") else (1,)
        for name, p in parameters.items()
        for kind in STATE_NAMES
    }
    wrong = sorted(
        name
        for name in expected.keys() | state.keys()
        if name not in state or name not in expected or state[name].shape != expected[name]
    )
    if wrong:
        raise UserError(f"the optimizer state does not fit the trainable weights: {'; '.join(wrong[:10])}")
    for name, p in owned(optimizer, parameters).items():
        for kind in STATE_NAMES:
            optimizer._accumulators[kind][p.name].set_value(state[f"{name}:{kind}"].read())
