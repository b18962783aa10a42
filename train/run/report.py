"""report.json: what a run starts with, and the same as tables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.config.schema import TrainConfig
from train.machine.memory import gigabytes, peak_memory_gb
from train.page.sources import SourceFacts, source_facts
from train.run.build import PartCount
from train.run.build_data import Data, HeldOutFacts
from train.run.memory import TrainingMemory
from vl2.lora import GroupReport


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Which run a report is of."""

    recipe: str
    rehearsal: bool
    model: str  # base model as typed
    processes: int
    precision: str
    frozen: str = "none"  # what the base's matrices are kept in


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """What it learns from, over all its steps."""

    samples: int  # conversations in the data
    skipped: int  # rows left out as unusable
    packs: int
    packs_per_step: int
    steps: int
    epochs: int
    tokens: int
    supervised: int  # tokens
    tiles: int
    fill: float  # of the packs' token budgets
    fingerprint: str
    held_out: HeldOutFacts | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """In GB (10^9 bytes), of one process."""

    computed_gb: float  # in a step on a full pack, by train.run.memory
    parts_gb: dict[str, float]  # of it, by what holds them
    checkpoint_gb: float  # on the host, while a checkpoint is on its way to the disk; of the first process
    resident_gb: float  # held at the start
    machine_gb: float


@dataclass(frozen=True, kw_only=True)
class StartReport:
    """The numbers a run starts with."""

    run: RunFacts
    parts: tuple[PartCount, ...]
    lora: tuple[GroupReport, ...]
    plan: PlanFacts
    memory: MemoryFacts
    sources: tuple[SourceFacts, ...] = ()

    @staticmethod
    def from_format_1(document: Mapping[str, Any]) -> dict[str, Any]:
        """It counted weights and what learns of them, not the step, nor the copy of a checkpoint."""
        fields, memory = dict(document), document.get("memory")
        if isinstance(memory, Mapping) and "weights_gb" in memory:
            parts = {"weights": memory["weights_gb"], "gradients and moments": memory.get("training_state_gb", 0.0)}
            rest = {name: memory.get(name, 0.0) for name in ("resident_gb", "machine_gb")}
            computed = sum(parts.values())
            fields["memory"] = {"computed_gb": computed, "parts_gb": parts, "checkpoint_gb": 0.0, **rest}
        return fields


def start_report(
    config: TrainConfig,
    data: Data,
    *,
    need: TrainingMemory,
    parts: Sequence[PartCount],
    groups: Sequence[GroupReport],
    num_ranks: int,
) -> StartReport:
    """The numbers a run starts with.

    Args:
        need: of each process.
        num_ranks: processes.
    """
    return StartReport(
        run=RunFacts(
            recipe=config.recipe,
            rehearsal=config.rehearsal,
            model=config.model.path,
            processes=num_ranks,
            precision=config.precision,
            frozen=config.model.frozen,
        ),
        parts=tuple(parts),
        lora=tuple(groups),
        plan=plan_facts(data),
        sources=tuple(source_facts(data.dataset)),
        memory=MemoryFacts(
            computed_gb=need.num_bytes / 1e9,
            parts_gb={name: size / 1e9 for name, size in need.parts().items()},
            checkpoint_gb=need.copied / 1e9,
            resident_gb=peak_memory_gb(),
            machine_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        ),
    )


def plan_facts(data: Data) -> PlanFacts:
    """What a plan comes to."""
    plan = data.plan
    return PlanFacts(
        samples=len(data.dataset.records),
        skipped=len(data.dataset.skipped),
        packs=plan.num_packs,
        packs_per_step=plan.packs_per_step,
        steps=plan.num_steps,
        epochs=len(plan.steps_per_epoch),
        tokens=sum(pack.tokens for pack in plan.packs),
        supervised=sum(pack.supervised for pack in plan.packs),
        tiles=sum(pack.tiles for pack in plan.packs),
        fill=plan.fill,
        fingerprint=plan.fingerprint,
        held_out=data.held_out,
    )


def run_words(run: RunFacts, run_dir: str) -> dict[str, str]:
    """Which run it is, in words."""
    few = "" if run.frozen == "none" else f", the language model's matrices in {run.frozen}"
    return {
        "recipe": run.recipe + (" (REHEARSAL)" if run.rehearsal else ""),
        "model": run.model,
        "precision": f"{run.precision}{few}, {run.processes} process(es)",
        "run_dir": run_dir,
    }


def count_tables(parts: Sequence[PartCount], groups: Sequence[GroupReport]) -> list[str]:
    """Tables of what trains of each part, and of the LoRA groups where there are any."""
    rows = [[part.part, count_text(part.trainable), count_text(part.frozen)] for part in parts]
    tables = [table(["part", "trainable", "frozen"], rows)]
    if groups:
        rows = [[g.group, str(g.rank or "all"), str(g.modules), count_text(g.parameters)] for g in groups]
        tables.append(table(["LoRA group", "rank", "modules", "parameters"], rows))
    return tables


def source_table(sources: Sequence[SourceFacts]) -> str:
    """What each source gives."""
    return table(SourceFacts.HEAD, [source.cells() for source in sources])


def plan_words(plan: PlanFacts) -> dict[str, str]:
    """What a plan comes to, in words."""
    skipped = f", {plan.skipped:,} rows skipped" if plan.skipped else ""
    held = plan.held_out
    return {
        "plan": f"{plan.samples:,} samples{skipped}, {plan.packs:,} packs {plan.fill:.1%} full, "
        f"{plan.steps:,} steps of {plan.packs_per_step} packs, {plan.epochs} epoch(s)",
        "tokens": f"{plan.tokens:,} ({plan.supervised:,} supervised), {plan.tiles:,} tiles",
        **({"held out": f"{held.rows:,} rows, {held.asked:,} of them asked"} if held else {}),
    }


def memory_words(memory: MemoryFacts) -> dict[str, str]:
    """What a process holds at the start, in words."""
    parts = ", ".join(f"{name} {gigabytes(size * 1e9)}" for name, size in memory.parts_gb.items())
    return {
        "memory": f"{gigabytes(memory.computed_gb * 1e9)} in each process: {parts}",
        "on the host": f"{gigabytes(memory.checkpoint_gb * 1e9)} of a checkpoint that is being written; "
        f"held now {memory.resident_gb:.2f} GB, machine {memory.machine_gb:.1f} GB",
    }


def count_text(number: int) -> str:
    """A number in three digits: 2.36 M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def pairs(rows: Mapping[str, str]) -> str:
    """Names and values in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns; all but the first stand at the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        first, *rest = row
        lines.append("  ".join([f"{first:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(rest, widths[1:]))]))
    return "\n".join(lines)
