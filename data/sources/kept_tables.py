"""Arrow tables that were made from something else, kept until the next start under a name that says from what."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vl2.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_BUILDING, _LONGEST_BUILD = ".building-", 86_400  # seconds
_LARGE = 1 << 29  # bytes that take more than a moment
_FILES = "files.json"  # {name: bytes} of a table's Arrow files, in order


def kept_table(folder: Path | None, build: Callable[[Path], Dataset], *, name: str, size: int) -> Dataset:
    """Open the table of a folder, memory-mapped; build it where there is none that is whole.

    Args:
        folder: named after all that the table depends on; None, or one that cannot be written: a temporary one.
        build: writes Arrow files anywhere under the folder it is given and returns the table that they are.
        name: the source, for errors.
        size: bytes of what it is made from; if it takes a while, that is said.

    Raises:
        UserError: the disk is full.
    """
    if folder:
        with contextlib.suppress(OSError, ValueError, TypeError):  # Arrow's errors are ValueErrors and OSErrors
            return _open(folder)
    building = _temporary(folder)
    if size > _LARGE:
        logger.warning(
            "%s: unpacking %.1f GB into %s; the next start finds them there", name, size / 1e9, building.parent
        )
    try:
        with quiet():
            table = build(building)
        files = [Path(file["filename"]) for file in table.cache_files]
        sizes = {str(file.relative_to(building.resolve())): file.stat().st_size for file in files}
        (building / _FILES).write_text(json.dumps(sizes), "utf-8")
        table = _open(building)  # what is mapped stays readable under another name, and without one
        if folder and building.parent == folder.parent.resolve():
            with contextlib.suppress(OSError):  # another process was quicker
                shutil.rmtree(folder, ignore_errors=True)
                building.rename(folder)
        return table
    except OSError as error:
        if not is_full(error):
            raise
        raise UserError(
            f"{name}: the disk is full: its rows are unpacked into {building.parent}; "
            "free space there, or name another folder with XDG_CACHE_HOME"
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that a disk is full; `datasets` drops the number of the true one."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or "disk space" in str(error)


def _open(folder: Path) -> Dataset:
    sizes = json.loads((folder / _FILES).read_text("utf-8"))
    if any((folder / name).stat().st_size != size for name, size in sizes.items()):
        raise ValueError
    return open_tables([folder / name for name in sizes])


def open_tables(files: Sequence[Path]) -> Dataset:
    """Open Arrow files, memory-mapped, as one table."""
    from datasets import Dataset, concatenate_datasets  # here: the import takes seconds

    tables = [Dataset.from_file(str(file)) for file in files]
    return tables[0] if len(tables) == 1 else concatenate_datasets(tables)


def _temporary(folder: Path | None) -> Path:
    """An empty folder beside the one to be made, or among the system's where that cannot be written."""
    if folder:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for left in folder.parent.glob(f"{_BUILDING}*"):  # by a process that was killed
                if left.stat().st_mtime < time.time() - _LONGEST_BUILD:
                    shutil.rmtree(left, ignore_errors=True)
            return Path(tempfile.mkdtemp(prefix=_BUILDING, dir=folder.parent)).resolve()
        except OSError as error:
            logger.warning("%s cannot be kept, the next start makes it again: %s", folder, error)
    return Path(tempfile.mkdtemp(prefix="rows-")).resolve()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Have `datasets` draw no progress bars inside, and log nothing."""
    import datasets  # here: the import takes seconds

    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it says as an error it raises too
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
