"""A run's folder: what lies where, who uses it, and when a new run may.

run.json        marks the folder as a run's: recipe, status, steps
config.yaml  report.json  report.html  metrics.jsonl  curve.png  summary.json  nonfinite.jsonl  wandb/  visualdl/
checkpoints/step-000200/
samples/step-000200.html  of each validation
adapter/ or weights/     the trained weights
data/           drawn pictures, when there is no data.path
export/  adapter_peft/  adapter_paddle/  export-step-000200/
dryrun.html     of a dry run for a folder with a run in it
.lock           while a run goes on here
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from train.store.facts import read_fact, write_fact
from train.store.lock import hold
from train.store.names import MARKER, PAGE
from train.store.overwrite import check_replaceable, removable
from train.store.run_state import Best
from vl2.errors import UserError

LOCK = ".lock"
# Deterministic and keyed by their settings, of a moment, or of a dry run: allowed before the marker is written.
_KEPT = ("data", "log", LOCK, f".{MARKER}", PAGE, f".{PAGE}")

_updating = Lock()  # checkpoints are counted by a thread of their own


@dataclass(frozen=True, kw_only=True)
class RunMarker:
    """run.json: what a folder's run is and how far it came."""

    recipe: str
    rehearsal: bool
    status: Literal["running", "stopped", "finished", "diverged", "failed"]
    step: int  # of the newest checkpoint
    steps: int  # of the whole run
    wandb_id: str | None  # of the run on wandb
    evaluation: dict[str, dict[str, float]]  # "before" and "after" training -> its numbers
    best: Best | None = None  # the checkpoint that pruning keeps beside the newest ones
    why: str = ""  # it diverged or failed, in one line

    def __str__(self) -> str:
        return f"recipe {self.recipe}, {self.status}, step {self.step} of {self.steps}"

    @staticmethod
    def from_format_1(document: Mapping[str, Any]) -> dict[str, Any]:
        """It repeated the identity, which the checkpoints have."""
        fields = {key: value for key, value in document.items() if key != "identity"}
        return {"wandb_id": None, "evaluation": {}, **fields}


def read_marker(run_dir: Path) -> RunMarker | None:
    """run.json, or None when the folder is no run's.

    Raises:
        UserError: a run.json that no run wrote.
    """
    return read_fact(RunMarker, run_dir / MARKER) if (run_dir / MARKER).is_file() else None


def write_marker(run_dir: Path, marker: RunMarker) -> None:
    """Write run.json."""
    write_fact(run_dir / MARKER, marker)


def update_marker(run_dir: Path, **changes: Any) -> RunMarker:
    """Change fields of the run.json that is there."""
    with _updating:
        marker = replace(read_fact(RunMarker, run_dir / MARKER), **changes)
        write_marker(run_dir, marker)
    return marker


@contextmanager
def hold_run_dir(run_dir: Path) -> Iterator[None]:
    """Have a run's folder for oneself; it is made for that, and removed again where it stays empty.

    Raises:
        UserError: another process runs there, or no folder can be there.
    """
    check_place(run_dir, f"run_dir={run_dir}")
    place = run_dir.resolve()
    missing = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"run_dir={run_dir}: the folder cannot be made ({problem.strerror})") from problem
    try:
        with hold(place / LOCK, f"run_dir={run_dir}"):
            yield
    finally:
        with suppress(OSError):  # no longer empty
            for folder in missing:
                folder.rmdir()


def check_place(path: Path, setting: str) -> None:
    """Refuse a path at which no folder can be: below a file, too long, with a character that no name may have.

    Args:
        path: of a folder to write, there or not.
        setting: `key=value`, for the message.

    Raises:
        UserError: saying what is in the way.
    """
    try:
        place = path.resolve()
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
    except (OSError, ValueError, RuntimeError) as problem:  # RuntimeError: symbolic links in a circle, in Python 3.12
        raise UserError(f"{setting}: no path of a folder ({problem})") from problem
    if not existing.is_dir():
        found = "a file" if existing == place else f"{existing}, a file"
        raise UserError(f"{setting}: expected a folder, found {found}")


def check_run_dir(run_dir: Path, *, resume: str, overwrite: bool) -> RunMarker | None:
    """Refuse a folder that holds something else; changes nothing.

    Returns:
        What the run says that lies there; None: there is none, or it goes on although its run.json cannot be read.

    Raises:
        UserError: saying what is there and what to do.
    """
    if resume and overwrite:
        raise UserError(
            "resume and overwrite=true are both given: going on with a run and replacing it exclude each other"
        )
    check_place(run_dir, f"run_dir={run_dir}")
    goes_on = resume == "auto" or (resume and Path(resume).resolve().is_relative_to(run_dir.resolve()))
    try:
        marker = read_marker(run_dir)
    except UserError as problem:
        if goes_on:
            check_replaceable(run_dir)
            return None
        raise UserError(f"{problem}; no run of this program wrote it: choose another run_dir") from problem
    if marker is None:
        foreign = sorted(path.name for path in run_dir.iterdir() if path.name not in _KEPT) if run_dir.exists() else []
        if foreign:
            raise UserError(
                f"run_dir={run_dir}: holds files that are no run of this program ({', '.join(foreign[:5])}); "
                "choose another run_dir"
            )
        return None
    if overwrite:
        removable(run_dir, marker.wandb_id)
    elif goes_on:
        check_replaceable(run_dir)
    else:
        raise UserError(
            f"run_dir={run_dir}: already holds a run ({marker}); resume=auto goes on with it, overwrite=true "
            "replaces it, run_dir=FOLDER puts the new one elsewhere"
        )
    return marker
