"""What overwriting a run or an export removes: what this program wrote, by marker and manifests, and nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from train.store.facts import read_fact
from train.store.names import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG_FILE,
    CURVE,
    DRYRUN_PAGE,
    EXPORT_REPORT,
    MARKER,
    METRICS,
    NONFINITE,
    PAGE,
    REPORT,
    SAMPLES,
    SUMMARY,
    VISUALDL_FILE,
    WEIGHTS,
)
from train.store.provenance import ExportReport
from train.store.whole_folder import strangers
from vl2.errors import UserError

# Single files of a run; its marker, which tells that they are its, goes last.
_FILES = (CONFIG_FILE, REPORT, PAGE, DRYRUN_PAGE, METRICS, NONFINITE, CURVE, VISUALDL_FILE, SUMMARY, MARKER)
_CHECKPOINT = re.compile(r"(aside-(\d+-)?)?step-\d{6,}")
_SAMPLES = re.compile(r"step-\d{6,}\.html")
_EXPORT = re.compile(r"(export|adapter_peft|adapter_paddle)(-step-\d{6,})?")


def removable(run_dir: Path, wandb_id: str | None) -> list[Path]:
    """What overwriting a run removes; changes nothing.

    Other files and folders stay: of wandb/ and checkpoints/ too. An export is one by its own report and manifest.

    Args:
        run_dir: with a valid marker.
        wandb_id: of the marker.

    Raises:
        UserError: what is to be removed or written anew holds something that no run wrote; names it.
    """
    folders = [*_matching(run_dir / CHECKPOINTS, _CHECKPOINT), *_results(run_dir)]
    folders += [folder for folder in _matching(run_dir, _EXPORT) if is_export(folder)]
    foreign = [found for folder in folders for found in _foreign(folder)]
    foreign += [run_dir / name for name in _FILES if (run_dir / name).is_dir()]
    _refuse(foreign, run_dir)
    wandb = [path for path in _entries(run_dir / "wandb") if wandb_id and path.name.endswith(f"-{wandb_id}")]
    if wandb:  # its links to the newest run, and pictures to be sent
        wandb += [path for path in _entries(run_dir / "wandb") if path.is_symlink() or path.name == "artifacts"]
    files = [path for name in _FILES if (path := run_dir / name).exists() or path.is_symlink()]
    pages = [path for path in _entries(run_dir / SAMPLES) if _SAMPLES.fullmatch(path.name)]
    return [*folders, *wandb, *pages, *files]


def remove(paths: Iterable[Path], run_dir: Path) -> None:
    """Remove what `removable` named, and the folders around it where nothing is left in them."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for folder in (run_dir / CHECKPOINTS, run_dir / SAMPLES, run_dir / "wandb", (run_dir / VISUALDL_FILE).parent):
        if not folder.is_symlink():
            with suppress(OSError):  # not there, or something is left
                folder.rmdir()


def check_replaceable(run_dir: Path) -> None:
    """Refuse to go on with a run whose results hold something foreign: they are replaced at its end.

    Raises:
        UserError: naming it.
    """
    _refuse([found for folder in _results(run_dir) for found in _foreign(folder)], run_dir)


def is_export(folder: Path) -> bool:
    """Whether a folder holds an export that this program wrote, by its report."""
    try:
        read_fact(ExportReport, folder / EXPORT_REPORT)
    except UserError:
        return False
    return True


def _results(run_dir: Path) -> list[Path]:
    return [folder for name in (ADAPTER, WEIGHTS) if (folder := run_dir / name).exists()]


def _matching(folder: Path, names: re.Pattern[str]) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir() and names.fullmatch(path.name)]


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _foreign(folder: Path) -> list[Path]:
    """What in a folder nobody of us wrote: files beside those of its manifest; without one all of it."""
    try:
        return [folder / name for name in strangers(folder)]
    except UserError:
        return [folder]


def _refuse(foreign: list[Path], run_dir: Path) -> None:
    if foreign:
        names = ", ".join(str(path.relative_to(run_dir)) for path in foreign[:5])
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise UserError(
            f"run_dir={run_dir}: {names}{more}: not written by a run, or it has lost its manifest, and it would be "
            "replaced; move it away, or choose another run_dir"
        )
