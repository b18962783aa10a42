"""What a run says at its start and at its end: texts for people, and the same numbers as JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from data.plan import Plan
from train.config.schema import TrainConfig
from train.run.build import PartCount
from train.run.trainer import peak_memory_gb
from vl2.lora import GroupReport


def start_report(
    config: TrainConfig,
    *,
    plan: Plan,
    num_samples: int,
    num_skipped: int,
    parts: Sequence[PartCount],
    groups: Sequence[GroupReport],
    num_ranks: int,
) -> dict[str, Any]:
    """The numbers a run starts with, as JSON values.

    Args:
        num_samples: conversations in the data.
        num_skipped: rows left out as unusable.
        num_ranks: processes.
    """
    trainable = sum(part.trainable for part in parts)
    tokens = sum(pack.tokens for pack in plan.packs)
    return {
        "run": {
            "recipe": config.recipe,
            "rehearsal": config.rehearsal,
            "model": config.model.path,
            "processes": num_ranks,
            "precision": config.precision,
        },
        "parts": [asdict(part) for part in parts],
        "lora": [asdict(group) for group in groups],
        "plan": {
            "samples": num_samples,
            "skipped": num_skipped,
            "packs": plan.num_packs,
            "packs_per_step": plan.packs_per_step,
            "steps": plan.num_steps,
            "epochs": len(plan.steps_per_epoch),
            "tokens": tokens,
            "supervised": sum(pack.supervised for pack in plan.packs),
            "tiles": sum(pack.tiles for pack in plan.packs),
            "fill": plan.fill,
            "fingerprint": plan.fingerprint,
        },
        "memory": {
            "weights_gb": sum(part.stored_bytes for part in parts) / 1e9,
            # Gradients and Adam's two moments, all float32.
            "training_state_gb": trainable * 12 / 1e9,
            "resident_gb": peak_memory_gb(),
            "machine_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        },
    }


def start_text(report: Mapping[str, Any], run_dir: str) -> str:
    """`start_report` as tables."""
    run, plan, memory = report["run"], report["plan"], report["memory"]
    parts = [[part["part"], _count(part["trainable"]), _count(part["frozen"])] for part in report["parts"]]
    blocks = [
        _pairs(
            {
                "recipe": run["recipe"] + (" (REHEARSAL)" if run["rehearsal"] else ""),
                "model": run["model"],
                "precision": f"{run['precision']}, {run['processes']} process(es)",
                "run_dir": run_dir,
            }
        ),
        _table(["part", "trainable", "frozen"], parts),
    ]
    if report["lora"]:
        rows = [[g["group"], str(g["rank"]), str(g["modules"]), _count(g["parameters"])] for g in report["lora"]]
        blocks.append(_table(["LoRA group", "rank", "modules", "parameters"], rows))
    skipped = f", {plan['skipped']} rows skipped" if plan["skipped"] else ""
    blocks.append(
        _pairs(
            {
                "plan": f"{plan['samples']} samples{skipped}, {plan['packs']} packs {plan['fill']:.1%} full, "
                f"{plan['steps']} steps of {plan['packs_per_step']} packs, {plan['epochs']} epoch(s)",
                "tokens": f"{plan['tokens']:,} ({plan['supervised']:,} supervised), {plan['tiles']:,} tiles",
                "memory": f"weights {memory['weights_gb']:.2f} GB, gradients and Adam "
                f"{memory['training_state_gb']:.2f} GB, held now {memory['resident_gb']:.2f} GB, "
                f"machine {memory['machine_gb']:.1f} GB",
            }
        )
    )
    return "\n\n".join(blocks)


def end_text(summary: Mapping[str, Any]) -> str:
    """The summary of a finished run as a table."""
    rows = {
        "recipe": summary["recipe"] + (" (REHEARSAL)" if summary["rehearsal"] else ""),
        "steps": str(summary["steps"]),
        "loss": f"{summary['loss_first']:.4f} -> {summary['loss_last']:.4f}",
        "accuracy": f"{_share(summary['accuracy_before'])} -> {_share(summary['accuracy_after'])}",
        "with pictures exchanged": _share(summary["accuracy_with_pictures_exchanged"]),
        "speed": f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['seconds']:.1f} s in steps",
        "peak memory": f"{summary['peak_memory_gb']:.2f} GB",
        **{name: path for name, path in summary["paths"].items() if path},
    }
    if summary["accuracy_before"] is None and summary["accuracy_after"] is None:
        del rows["accuracy"]
    if summary["accuracy_with_pictures_exchanged"] is None:
        del rows["with pictures exchanged"]
    return _pairs(rows)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _pairs(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        first, *rest = row
        lines.append("  ".join([f"{first:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(rest, widths[1:]))]))
    return "\n".join(lines)
