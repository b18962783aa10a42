"""The figures of README.gpu.md are those of the memory model, and its commands are ones that the program takes."""

import re
import shlex

import pytest

from tests.places import ROOT
from train.config.load import load_config, load_infer_config
from train.config.schema import TrainConfig
from train.door.help import SCHEMAS
from train.machine.devices import Machine
from train.run.cost import BANDWIDTH_SHARE, CARDS, FLOPS_SHARE, LAUNCH_SECONDS, pack_cost
from train.run.memory import training_memory
from vl2.checkpoint.published import published
from vl2.config import VL2Config

TEXT = (ROOT / "README.gpu.md").read_text("utf-8")
# What each card of the page is said to train: the command's keys, and processes that share the step.
SETTINGS = (
    (24, "conf=sft_tiny", 1),
    (24, "conf=sft_tiny recompute=0", 1),
    (24, "conf=sft_small_4bit", 1),
    (24, "conf=sft_base_4bit", 1),
    (40, "conf=sft_small data.max_tokens=2048", 1),
    (40, "conf=sft_small", 1),
    (80, "conf=sft_small recompute=2", 1),
    (80, "conf=sft_tiny_full", 1),
    (80, "conf=sft_tiny_full", 8),
    (40, "conf=sft_tiny_full sharding.stage=1", 8),
    (80, "conf=sft_base", 1),
    (80, "conf=sft_small_full sharding.stage=3 eval.questions=0", 8),
    (80, "conf=sft_base_full sharding.stage=3 eval.questions=0", 16),
)


def row(card: int, keys: str, processes: int) -> tuple[str, float]:
    """A line of the table, and its sum in GB."""
    machine = Machine(gpus=processes, driver="", gpu_paddle=True)
    config: TrainConfig = load_config(shlex.split(keys), machine)
    known = published(config.model.path)
    assert known is not None
    model = VL2Config.from_folder(known.config.parent)
    memory = training_memory(model, config, on_gpu=True)
    need, step, total = (
        size / 1e9 for size in (memory.certain, memory.step.num_bytes, memory.process_bytes(first=True))
    )
    return f"| {card} GB | `{keys}` | {processes} | {need:.1f} | {step:.1f} | {total:.1f} |", total


@pytest.mark.slow
def test_figures_are_those_of_the_memory_model():
    """Printed here when they change: paste them into the page."""
    rows = [(card, *row(card, keys, processes)) for card, keys, processes in SETTINGS]
    table = "\n".join(line for _, line, _ in rows)
    assert table in TEXT, f"the table of README.gpu.md should be\n{table}"
    assert all(total < card for card, _, total in rows)


def seconds_row(card: int, keys: str, processes: int) -> str:
    """A line of the table of seconds, for a full pack of conversations as the page describes them."""
    config: TrainConfig = load_config(shlex.split(keys), Machine(gpus=processes, driver="", gpu_paddle=True))
    known = published(config.model.path)
    assert known is not None
    cost = pack_cost(VL2Config.from_folder(known.config.parent), config, on_gpu=True)
    conversations = config.data.max_tokens // 1024
    pack = cost.of([1024] * conversations, tiles=3 * conversations, supervised=256 * conversations)
    work = pack + cost.update * (processes / config.packs_per_step)
    figures = f"{work.flops / 1e12:.0f} | {work.num_bytes / 1e9:.0f} | {CARDS[card].seconds(work):.1f}"
    return f"| {CARDS[card].name} | `{keys}` | {processes} | {figures} |"


@pytest.mark.slow
def test_seconds_are_those_of_the_model_of_cost():
    """Printed here when they change: paste them into the page, which names the assumptions too."""
    table = "\n".join(seconds_row(*setting) for setting in SETTINGS)
    assert table in TEXT, f"the table of seconds in README.gpu.md should be\n{table}"
    assumed = (
        f"{FLOPS_SHARE:.0%} of the bf16 rate, {BANDWIDTH_SHARE:.0%} of the bandwidth, {LAUNCH_SECONDS * 1e6:.0f} µs"
    )
    assert assumed.replace("%", " %") in " ".join(TEXT.split())


def test_commands_are_taken():
    commands = re.findall(r"^(?:docker run .* )?(bash launch\.sh .*)$", TEXT, re.MULTILINE)
    commands += re.findall(r"`(bash launch\.sh [^`]*)`", TEXT)
    commands = [command for command in commands if "..." not in command]
    assert len(commands) >= 6
    for command in commands:
        verb, *rest = shlex.split(command)[2:]
        if verb.startswith("conf="):
            load_config([verb, *rest], Machine(gpus=4, driver="", gpu_paddle=True))
        elif verb == "infer":
            load_infer_config(rest)
        else:
            assert verb in SCHEMAS or verb == "help", command


@pytest.mark.parametrize("key", sorted(set(re.findall(r"`([a-z_.]+)=", TEXT)) - {"conf"}))
def test_keys_exist(key):
    names = {name for schema in SCHEMAS.values() for name in schema.__dataclass_fields__}
    assert key.split(".")[0] in names
