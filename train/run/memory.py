"""Memory that training takes in each process, from the model's config alone; what does not fit is refused."""

from __future__ import annotations

import paddle

from train.ask.model_memory import MemoryNeed, weight_sizes
from train.config.schema import TrainConfig
from train.machine.memory import check_memory, free_ram, gigabytes
from train.run.build import PART_PREFIXES, PartCount, lora_settings, trained_names, whole_reports
from train.run.gradients import reduction_slices
from vl2.checkpoint.published import published
from vl2.config import VL2Config
from vl2.dtypes import DTYPE_OF_SETTING, item_bytes
from vl2.lora import GroupReport, plan_factors
from vl2.lora_settings import is_factor, is_start
from vl2.parameter_groups import whole_parameters
from vl2.parameters import build_model

# Trainable weights, gradients and Adam's two moments, all float32.
TRAINED_BYTES = 16
# Of these, what a checkpoint holds and is copied for it: all but the gradients.
SAVED_BYTES = 12
_FLOAT32_BYTES = 4


def plan_weights(model: VL2Config, config: TrainConfig) -> tuple[dict[str, int], set[str], tuple[GroupReport, ...]]:
    """How many numbers each weight of a run has, and which of them train, before there is a model.

    Returns:
        (numbers of each weight, names of those that train, reports of the LoRA groups).

    Raises:
        UserError: a LoRA group that matches nothing in this model.
    """
    skeleton = build_model(model, 0)
    sizes = weight_sizes(skeleton)
    if config.lora.rank == 0:
        return sizes, set(trained_names(sizes, config.trainable)), ()
    of_base = set(sizes)
    settings = lora_settings(config)
    groups = (*plan_factors(skeleton, settings), *whole_reports(skeleton, settings))
    sizes = weight_sizes(skeleton)
    learned = {name for name in sizes if is_factor(name)} | set(whole_parameters(of_base, settings.also_train))
    return sizes, learned, groups


def plan_parts(model: VL2Config, config: TrainConfig) -> tuple[tuple[PartCount, ...], tuple[GroupReport, ...]]:
    """Count what trains and what is frozen, as `count_parts` does once the model is there.

    Returns:
        (numbers of each part, reports of the LoRA groups).

    Raises:
        UserError: a LoRA group that matches nothing in this model.
    """
    sizes, learned, groups = plan_weights(model, config)
    frozen_bytes, counts = item_bytes(DTYPE_OF_SETTING[config.precision]), []
    for part, prefixes in PART_PREFIXES.items():
        own = {name: size for name, size in sizes.items() if name.startswith(prefixes)}
        trainable = sum(size for name, size in own.items() if name in learned)
        frozen = sum(own.values()) - trainable
        starts = sum(size for name, size in own.items() if is_start(name))  # of PiSSA: frozen, in float32
        stored = (trainable + starts) * _FLOAT32_BYTES + (frozen - starts) * frozen_bytes
        counts.append(PartCount(part=part, trainable=trainable, frozen=frozen, stored_bytes=stored))
    return tuple(counts), groups


def training_memory(model: VL2Config, config: TrainConfig) -> MemoryNeed:
    """What training a model takes, in each process.

    Raises:
        UserError: a LoRA group that matches nothing in this model.
    """
    sizes, learned, _ = plan_weights(model, config)
    trained = {name: size for name, size in sizes.items() if name in learned}
    exchanged = 0
    if config.nproc * config.nnodes > 1:
        gradients = {name: size * _FLOAT32_BYTES for name, size in trained.items()}
        exchanged = max(sum(map(gradients.__getitem__, names)) for names in reduction_slices(gradients))
    starts = sum(size for name, size in sizes.items() if is_start(name))
    frozen = sum(sizes.values()) - sum(trained.values()) - starts
    return MemoryNeed(
        frozen=frozen * item_bytes(DTYPE_OF_SETTING[config.precision]) + starts * _FLOAT32_BYTES,
        trained=sum(trained.values()) * TRAINED_BYTES,
        exchanged=exchanged,
    )


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
    advice = "use a machine with more, or a smaller model"
    if config.lora.rank == 0:
        advice += ", or train adapters instead of all weights (lora.rank=8)"
    if config.precision == "fp32":
        advice += ", or precision=bf16"
    copied = need.trained // TRAINED_BYTES * SAVED_BYTES  # by the first process, see train.run.saving
    what = f"training {config.model.path} takes {need}{each}"
    if paddle.get_device() == "cpu":
        what += f", and {gigabytes(copied)} of a checkpoint on its way to the disk"
        check_memory(need.num_bytes * num_processes + copied, what, advice)
    else:
        check_memory(need.num_bytes * num_processes, what, advice)
        check_memory(copied, f"a checkpoint of {config.model.path} is copied to the host first", advice, free_ram())
