"""What a dry run found, in words: as tables on the terminal, and as report.html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.images.reader import DEFAULT_READER
from data.record import RecordError
from train.config.schema import TrainConfig
from train.machine.memory import gigabytes
from train.page.page import make_page
from train.page.sources import source_facts
from train.run.build import PartCount
from train.run.build_data import Data
from train.run.memory import TrainingMemory
from train.run.report import PlanFacts, RunFacts, count_tables, pairs, plan_words, run_words, source_table
from vl2.lora import GroupReport
from vl2.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a dry run found; what could not be found out is None."""

    config: TrainConfig
    page: Path | None  # where the page goes
    refused: tuple[str, ...]  # why training would not start, bad rows apart
    notes: tuple[str, ...]
    bad: tuple[RecordError, ...]  # rows that cannot be used, at most MOST_LISTED
    bad_is_refused: bool
    tokenizer: Tokenizer | None
    parts: tuple[PartCount, ...] | None
    groups: tuple[GroupReport, ...]
    need: TrainingMemory | None
    data: Data | None
    plan: PlanFacts | None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why training would not start; empty where it would."""
        if not self.bad_is_refused:
            return self.refused
        advice = "correct them, or leave them out with data.on_bad_record=skip and a data.max_bad that allows it"
        return (*self.refused, f"{len(self.bad):,} bad rows; {advice}")


def byte_words(found: DryRun) -> dict[str, str]:
    """Bytes of a step on a full pack in each process, in words."""
    if found.need is None:
        return {}
    return {"memory": f"{gigabytes(found.need.num_bytes)} in each process: {found.need}"}


def header(found: DryRun) -> dict[str, str]:
    """The facts of a dry run, name by name."""
    config = found.config
    run = RunFacts(
        recipe=config.recipe,
        rehearsal=config.rehearsal,
        model=config.model.path,
        processes=config.nproc * config.nnodes,
        precision=config.precision,
        frozen=config.model.frozen,
    )
    plan = plan_words(found.plan) if found.plan else {}
    return {**run_words(run, config.run_dir), **plan, **byte_words(found)}


def dry_page(found: DryRun) -> str:
    """What a dry run found, as a page."""
    title = f"{found.config.recipe}, dry run" + (" (rehearsal)" if found.config.rehearsal else "")
    return make_page(
        title=title,
        words=header(found),
        dataset=found.data.dataset if found.data else None,
        plan=found.data.plan if found.data else None,
        tokenizer=found.tokenizer,
        reader=found.data.images if found.data else DEFAULT_READER,
        bad=found.bad,
        refused=found.reasons,
        notes=found.notes,
    )


def dry_text(found: DryRun) -> str:
    """What a dry run found, as tables."""
    tables = count_tables(found.parts, found.groups) if found.parts else []
    if found.data:
        tables.append(source_table(source_facts(found.data.dataset)))
    return "\n\n".join([pairs(header(found)), *tables]) + "\n"
