"""A run's folder: what lies where, when a new run may use it, and what overwriting removes.

run.json        marks the folder as a run's: recipe, status, identity
config.yaml  report.json  metrics.jsonl  curve.png  summary.json  wandb/
checkpoints/step-000200/
adapter/ or weights/     the trained weights
data/           drawn pictures, when there is no data.path
export/
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.store.names import ADAPTER, CURVE, METRICS, WEIGHTS
from vl2.errors import UserError

MARKER = "run.json"
# All that this program writes into a run's folder; overwriting removes these and nothing else.
OWNED = (
    MARKER,
    "config.yaml",
    "report.json",
    METRICS,
    CURVE,
    "summary.json",
    "predictions.jsonl",
    "checkpoints",
    ADAPTER,
    WEIGHTS,
    "wandb",
    "export",
)
# Deterministic and keyed by their settings: kept, and allowed before the marker is written.
KEPT = ("data", "log")


def read_marker(run_dir: Path) -> dict[str, Any] | None:
    """run.json, or None when the folder is no run's."""
    path = run_dir / MARKER
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_marker(run_dir: Path, **entries: Any) -> None:
    """Write run.json in one rename, entries added to those there."""
    document = {**(read_marker(run_dir) or {}), **entries}
    temporary = run_dir / f".{MARKER}"
    temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, run_dir / MARKER)


def check_run_dir(run_dir: Path, *, resume: str, overwrite: bool) -> None:
    """Refuse a folder that holds something else; changes nothing.

    Raises:
        UserError: saying what is there and what to do.
    """
    if resume and overwrite:
        raise UserError(
            "resume and overwrite=true are both given: going on with a run and replacing it exclude each other"
        )
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir={run_dir}: expected a folder, found a file")
    marker = read_marker(run_dir)
    if marker is None:
        foreign = sorted(path.name for path in run_dir.iterdir() if path.name not in KEPT) if run_dir.exists() else []
        if foreign:
            raise UserError(
                f"run_dir={run_dir}: holds files that are no run of this program ({', '.join(foreign[:5])}); "
                "choose another run_dir"
            )
        return
    if resume == "auto" or overwrite:
        return
    if resume and Path(resume).resolve().is_relative_to(run_dir.resolve()):
        return
    raise UserError(
        f"run_dir={run_dir}: already holds a run ({describe(marker)}); resume=auto goes on with it, overwrite=true "
        "replaces it, run_dir=FOLDER puts the new one elsewhere"
    )


def describe(marker: Mapping[str, Any]) -> str:
    """A run in a few words."""
    return (
        f"recipe {marker.get('recipe')}, {marker.get('status')}, step {marker.get('step', 0)} of {marker.get('steps')}"
    )


def clear_run_dir(run_dir: Path) -> None:
    """Remove what this program wrote, and nothing else."""
    for name in OWNED:
        path = run_dir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
