"""Memory that training takes in each process, from the model's config alone; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import paddle

from train.ask.model_memory import weight_bytes, weight_sizes
from train.config.schema import TrainConfig
from train.machine.devices import CONTEXT_BYTES
from train.machine.memory import check_memory, free_ram, gigabytes
from train.run.activations import StepMemory, step_memory
from train.run.build import PART_PREFIXES, PartCount, lora_settings, own_names, whole_reports
from train.run.gradients import reduction_slices
from train.run.shard.group import shard_degree
from train.run.shard.partition import heaviest_share, layer_of, numbers_of_layers
from vl2.checkpoint.published import published
from vl2.config import VL2Config
from vl2.dtypes import DTYPE_OF_SETTING
from vl2.lora import GroupReport, plan_factors
from vl2.lora_settings import is_factor
from vl2.parameters import build_model

FLOAT32_BYTES = 4
SAVED_BYTES = 12  # of each number that trains: a checkpoint has it and Adam's two moments
# Of a process on a CPU: Python, Paddle, PaddleNLP, numba, and what they allocate beside a model. Seen: 0.72 to 0.94 GB.
PROCESS_BYTES = 790_000_000
CARD_BYTES = 80 * 10**9  # the card that recipes speak of


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a run, before there is a model; by their paths."""

    sizes: dict[str, int]  # numbers of each
    learned: set[str]  # those that train
    groups: tuple[GroupReport, ...]  # of LoRA
    base_bytes: dict[str, int]  # of each of the base's, while it is frozen

    def frozen_bytes(self, names: Iterable[str]) -> int:
        """What weights that do not train take; where PiSSA's factors started is kept in float32."""
        left = [name for name in names if name not in self.learned]
        return sum(self.base_bytes.get(name, self.sizes[name] * FLOAT32_BYTES) for name in left)


def plan_weights(model: VL2Config, config: TrainConfig) -> Weights:
    """What weights a run has, and which of them train, before there is a model.

    Raises:
        UserError: a LoRA group that matches nothing in this model.
    """
    skeleton = build_model(model, 0)
    sizes = weight_sizes(skeleton)
    base_bytes = weight_bytes(skeleton, DTYPE_OF_SETTING[config.precision], config.model.frozen)
    learned = set(own_names(sizes, config))
    if config.lora.rank == 0:
        return Weights(sizes=sizes, learned=learned, groups=(), base_bytes=base_bytes)
    settings = lora_settings(config)
    groups = (*plan_factors(skeleton, settings), *whole_reports(skeleton, settings))
    sizes = weight_sizes(skeleton)
    learned |= {name for name in sizes if is_factor(name)}
    return Weights(sizes=sizes, learned=learned, groups=groups, base_bytes=base_bytes)


def plan_parts(model: VL2Config, config: TrainConfig) -> tuple[tuple[PartCount, ...], tuple[GroupReport, ...]]:
    """Count what trains and what is frozen, as `count_parts` does once the model is there.

    Returns:
        (numbers of each part, reports of the LoRA groups).

    Raises:
        UserError: a LoRA group that matches nothing in this model.
    """
    weights, counts = plan_weights(model, config), []
    for part, prefixes in PART_PREFIXES.items():
        own = {name: size for name, size in weights.sizes.items() if name.startswith(prefixes)}
        trainable = sum(size for name, size in own.items() if name in weights.learned)
        frozen = sum(own.values()) - trainable
        stored = trainable * FLOAT32_BYTES + weights.frozen_bytes(own)
        counts.append(PartCount(part=part, trainable=trainable, frozen=frozen, stored_bytes=stored))
    return tuple(counts), weights.groups


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes that training takes in one process, by what holds them."""

    frozen: int  # weights that are only read
    trained: int  # weights that learn, float32
    gradients: int
    moments: int  # Adam's two, of the parameters whose moments this process keeps
    exchanged: int  # copies of gradients on their way to the other processes
    step: StepMemory  # of a full pack
    copied: int  # of the first process, on the host: a checkpoint on its way to the disk
    copied_by_others: int  # of each other process, likewise: its part of the moments, where they are shared
    on_gpu: bool

    @property
    def certain(self) -> int:
        """Bytes on the device before a step."""
        return self.frozen + self.trained + self.gradients + self.moments + self.exchanged

    @property
    def num_bytes(self) -> int:
        """Bytes on the device in a step on a full pack."""
        return self.certain + self.step.num_bytes

    def process_bytes(self, *, first: bool) -> int:
        """All that a process holds, libraries included; on a CPU with its copy of a checkpoint."""
        if self.on_gpu:
            return self.num_bytes + CONTEXT_BYTES
        return self.num_bytes + PROCESS_BYTES + (self.copied if first else self.copied_by_others)

    def copied_by(self, num_processes: int) -> int:
        """Bytes on the host of a machine with so many processes, the first among them, while a checkpoint is saved."""
        return self.copied + (num_processes - 1) * self.copied_by_others

    def parts(self) -> dict[str, int]:
        """Bytes by name; what is not there is left out."""
        sizes = {
            "frozen weights": self.frozen,
            "trained weights": self.trained,
            "gradients": self.gradients,
            "Adam's moments": self.moments,
            "gradients on their way": self.exchanged,
            "a step on a full pack": self.step.num_bytes,
        }
        return {name: size for name, size in sizes.items() if size}

    def __str__(self) -> str:
        return ", ".join(f"{name} {gigabytes(size)}" for name, size in self.parts().items())


def training_memory(
    model: VL2Config, config: TrainConfig, *, on_gpu: bool | None = None, tower: bool = True
) -> TrainingMemory:
    """What training a model takes, in each process.

    Args:
        model: the base model.
        config: of the run.
        on_gpu: None: as this process computes.
        tower: False: the vision cache has every picture, and the vision tower is not loaded.

    Raises:
        UserError: a LoRA group that matches nothing in this model.
    """
    on_gpu = paddle.get_device() != "cpu" if on_gpu is None else on_gpu
    weights = plan_weights(model, config)
    if not tower:
        seen = PART_PREFIXES["vision"]
        weights = replace(weights, sizes={name: n for name, n in weights.sizes.items() if not name.startswith(seen)})
    memory = _memory(weights, model, config, on_gpu)
    return memory if tower else replace(memory, step=replace(memory.step, seeing=0))


def _memory(
    weights: Weights,
    model: VL2Config,
    config: TrainConfig,
    on_gpu: bool,
) -> TrainingMemory:
    """`training_memory`, with what `plan_weights` gave."""
    trained = {name: size for name, size in weights.sizes.items() if name in weights.learned}
    numbers, moments = sum(trained.values()), 2 * heaviest_share(trained, shard_degree(config))
    exchanged, stage, divided = 0, config.sharding.stage, 0
    whole = {name: size for name, size in trained.items() if layer_of(name) is None} if stage >= 2 else trained
    if stage >= 2:  # of the decoder layers what one process owns, and all of the layer that is computed
        own = heaviest_share(trained, shard_degree(config), trained.keys() - whole.keys())
        divided = sum(whole.values()) + own + max(numbers_of_layers(trained).values(), default=0)
    if config.nproc * config.nnodes > 1 and whole:
        gradients = {name: size * FLOAT32_BYTES for name, size in whole.items()}
        exchanged = max(sum(map(gradients.__getitem__, names)) for names in reduction_slices(gradients))
    return TrainingMemory(
        frozen=weights.frozen_bytes(weights.sizes),
        trained=(divided if stage == 3 else numbers) * FLOAT32_BYTES,
        gradients=(divided if stage >= 2 else numbers) * FLOAT32_BYTES,
        moments=moments * FLOAT32_BYTES,
        exchanged=exchanged,
        step=step_memory(model, config, on_gpu=on_gpu),
        copied=(numbers + moments) * FLOAT32_BYTES,
        copied_by_others=moments * FLOAT32_BYTES if shard_degree(config) > 1 else 0,
        on_gpu=on_gpu,
    )


def cards_needed(model: VL2Config, config: TrainConfig, card_bytes: int) -> tuple[int, int] | None:
    """The least number of GPUs of so many bytes on which a run fits, and the sharding.stage it takes; None: none.

    Only numbers that divide `packs_per_step` are tried, since each process takes the same number of packs. Adapters are
    not divided by stage 3.
    """
    weights = plan_weights(model, config)
    for cards in (n for n in range(1, config.packs_per_step + 1) if config.packs_per_step % n == 0):
        for stage in (0,) if cards == 1 else (1, 2) if config.lora.rank else (1, 2, 3):
            sharding = replace(config.sharding, degree=0, stage=stage)
            on_cards = replace(config, nproc=cards, nnodes=1, sharding=sharding)
            if _memory(weights, model, on_cards, True).process_bytes(first=True) <= card_bytes:
                return cards, stage
    return None


def check_published(config: TrainConfig, num_processes: int) -> None:
    """`check_training` of a published model before it is fetched; does nothing with any other."""
    if known := published(config.model.path):
        check_training(config, VL2Config.from_folder(known.config.parent), num_processes)


def check_training(config: TrainConfig, model: VL2Config, num_processes: int) -> None:
    """Refuse to train what does not fit into memory.

    Args:
        config: of the run.
        model: the base model.
        num_processes: that share the memory: those of this machine on a CPU, 1 on a GPU.

    Raises:
        UserError: with the figures and what would need less.
    """
    need = training_memory(model, config)
    each = f", in each of {num_processes} processes" if num_processes > 1 else ""
    advice = _advice(config, model)
    what = f"training {config.model.path} takes {need}{each}"
    if need.on_gpu:
        check_memory(need.num_bytes, what, advice, estimated=True)
        copied = f"a checkpoint of {config.model.path} is copied to the host first"
        check_memory(need.copied_by(config.nproc), copied, advice, free_ram())
    else:
        on_its_way = need.copied_by(num_processes)
        what += f", and {gigabytes(on_its_way)} of a checkpoint on its way to the disk"
        check_memory(need.num_bytes * num_processes + on_its_way, what, advice, estimated=True)


def _advice(config: TrainConfig, model: VL2Config) -> str:
    """What would need less."""
    advice = "use a machine with more, or a smaller model"
    if config.lora.rank == 0:
        card, found = gigabytes(CARD_BYTES), cards_needed(model, config, CARD_BYTES)
        if found is None:
            advice = f"no number of GPUs of {card} is enough: use a smaller model"
        elif found[0] == 1:
            advice = f"one GPU of {card} is enough, or a smaller model"
        else:
            alone = " eval.questions=0" if found[1] == 3 else ""
            advice = f"use {found[0]} GPUs of {card} with sharding.stage={found[1]}{alone}, or a smaller model"
        advice += ", or train adapters instead of all weights (lora.rank=8)"
    elif (
        config.model.frozen != "nf4"
        and config.sharding.stage < 3
        and not config.lora.pissa
        and config.model.init != "random"
    ):
        advice += ", or model.frozen=nf4"
    advice += ", or shorter packs (data.max_tokens)"
    return advice + (", or precision=bf16" if config.precision == "fp32" else "")
