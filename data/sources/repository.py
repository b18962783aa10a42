"""Opens what `datasets` knows: saved data sets, folders it understands, names on the hub.

`datasets` decides which files belong to which split and makes tables of them. JSON and CSV among them are read as if
they were named themselves: `datasets` wants every JSON row to have the same keys of the same types, and forgets row
numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.sources.arrow_rows import ArrowRows
from data.sources.content import content_hash, write_whole
from data.sources.files import open_file
from data.sources.kept_tables import kept_table, open_tables, quiet
from data.sources.place import Place
from data.sources.rows import Rows
from data.sources.tables import check_table, damage, shortened
from vl2.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetBuilder

logger = logging.getLogger(__name__)

_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # written by save_to_disk
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class _File:
    """A file of a split on this machine, and what it is called."""

    path: str
    name: str
    size: int


def open_saved(place: Place, split: str) -> ArrowRows:
    """Open a folder that `save_to_disk` wrote, with one split or several.

    Args:
        place: the folder.
        split: the one of several; empty where there is one.

    Raises:
        UserError: no such split, or damaged.
    """
    from datasets import load_from_disk  # here: the import takes seconds

    with damage(place.name, "saved data set", KeyError, TypeError):
        folder = place.path
        if (folder / _SAVED_SPLITS).is_file():
            splits = json.loads((folder / _SAVED_SPLITS).read_text("utf-8"))["splits"]
            folder = folder / choose_split(splits, split, place.name)
        elif split:
            raise UserError(f"{place.name}: expected a data set of several splits, found one; leave @{split} out")
        dataset = load_from_disk(str(folder))
        # Not the fingerprint that datasets wrote down: it names how a table was made, and two of equal content differ.
        files = [Path(file["filename"]) for file in dataset.cache_files]
        fingerprint = _joined(content_hash(file, place.cache) for file in files)
        check_table(dataset, place.kept("checked", f"{fingerprint}.npy"))
    root = place.root or place.path.absolute()
    return ArrowRows(dataset, name=place.name, folder=root, fingerprint=fingerprint)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / _SAVED).is_file() or (folder / _SAVED_SPLITS).is_file()


def open_folder(place: Place, config: str, split: str) -> list[Rows]:
    """Open a folder as `datasets.load_dataset` does: of Parquet, of JSON, of pictures with metadata.jsonl.

    Args:
        place: the folder.
        config: one of several that its README.md names; empty for its only one.
        split: likewise.

    Raises:
        UserError: nothing in it, several and none named, or damaged files.
    """
    # The builder wants a folder of its own even if nothing is built.
    with tempfile.TemporaryDirectory() as scratch, damage(place.name, "folder"), quiet():
        builder = _builder(str(place.path), config, Path(scratch))
    split = choose_split(_splits(builder), split, place.name)
    files = [
        replace(place, path=Path(file), name=_name_inside(place, file)) for file in builder.config.data_files[split]
    ]
    if _is_text(builder):
        return [open_file(file) for file in files]
    with damage(place.name, "folder"):
        fingerprint = _hash_of_files(place, files)
    # Tables of pictures hold their absolute paths.
    key = _joined([fingerprint, str(place.path.resolve()), config, split])

    def build(folder: Path) -> Any:
        with damage(place.name, "folder"):
            inner = _builder(str(place.path), config, folder)
            inner.download_and_prepare()
            return inner.as_dataset(split=split)

    table = kept_table(
        place.kept("tables", key), build, name=place.name, size=sum(file.path.stat().st_size for file in files)
    )
    return [
        ArrowRows(
            table,
            name=place.name,
            folder=place.root or place.path.absolute(),
            fingerprint=_joined([fingerprint, config, split]),
        )
    ]


def _name_inside(place: Place, file: str) -> str:
    return os.path.join(os.path.dirname(place.name), os.path.relpath(file, place.path.absolute().parent))


def open_name(place: Place, name: str, config: str, split: str) -> list[Rows]:
    """Open a data set of the hub: what was opened before without asking the network, the rest by `datasets`.

    Args:
        place: what errors call it, and where relative image paths start.
        name: `owner/name`, or a name without an owner.
        config: one of several; empty for its only one.
        split: likewise.

    Raises:
        UserError: no such name, no network, no such split.
    """
    known = place.kept("hub", f"{_joined([name, config])}.json")
    splits = _known_splits(known)
    if splits is None:
        logger.warning("%s: no file lies there; looking for a data set of that name on the hub", place.name)
        try:
            with _one_error():
                splits = _fetched(name, config)
        except _name_errors() as error:
            raise UserError(
                f"{place.name}: expected a file, a folder or the name of a data set on the hub, found nothing there "
                f"and cannot open that name: {shortened(error)}"
            ) from None
        if known:
            content = json.dumps({key: [vars(file) for file in files] for key, files in splits.items()})
            write_whole(known, lambda file: file.write_text(content, "utf-8"))
    files = splits[choose_split(list(splits), split, place.name)]
    if not all(file.path.endswith(".arrow") for file in files):
        return [open_file(replace(place, path=Path(file.path), name=file.name)) for file in files]
    fingerprint = _joined(content_hash(Path(file.path), place.cache) for file in files)
    table = open_tables([Path(file.path) for file in files])
    return [ArrowRows(table, name=place.name, folder=place.folder, fingerprint=fingerprint)]


def _fetched(name: str, config: str) -> dict[str, list[_File]]:
    """Fetch a data set of the hub, all its splits, into the caches of `datasets`."""
    from datasets import DownloadManager

    builder = _builder(name, config, None)
    if _is_text(builder):
        manager = DownloadManager(dataset_name=builder.dataset_name)
        return {
            str(split): [
                _File(path, f"{name}/{url.rpartition('/')[2]}", os.path.getsize(path))
                for url, path in zip(urls, manager.download(list(urls)), strict=True)
            ]
            for split, urls in builder.config.data_files.items()
        }
    builder.download_and_prepare()
    return {
        split: [
            _File(file["filename"], name, os.path.getsize(file["filename"]))
            for file in builder.as_dataset(split=split).cache_files
        ]
        for split in _splits(builder)
    }


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Keep huggingface_hub from printing each of its tries to reach the hub: the last is raised."""
    tries = logging.getLogger("huggingface_hub.utils._http")
    level = tries.level
    tries.setLevel(logging.ERROR)
    try:
        yield
    finally:
        tries.setLevel(level)


def _known_splits(known: Path | None) -> dict[str, list[_File]] | None:
    """What an earlier start found, where all of it still lies there."""
    if known:
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            content = json.loads(known.read_text("utf-8"))
            splits = {key: [_File(**file) for file in files] for key, files in content.items()}
            if all(os.path.getsize(file.path) == file.size for files in splits.values() for file in files):
                return splits
    return None


def _builder(path: str, config: str, cache: Path | None) -> DatasetBuilder:
    from datasets import load_dataset_builder

    # Code that lies beside the data is not run.
    return load_dataset_builder(path, config or None, cache_dir=str(cache) if cache else None, trust_remote_code=False)


def _is_text(builder: DatasetBuilder) -> bool:
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    return isinstance(builder, Json | Csv)


def _splits(builder: DatasetBuilder) -> list[str]:
    return [str(split) for split in (builder.info.splits or builder.config.data_files)]


def choose_split(splits: Sequence[str], wanted: str, name: str) -> str:
    """Take the split that was named, or the only one.

    Raises:
        UserError: no such split, or several and none was named.
    """
    if wanted in splits:
        return wanted
    if not wanted and len(splits) == 1:
        return splits[0]
    found = f"no {wanted!r} among {', '.join(splits)}" if wanted else f"several splits: {', '.join(splits)}"
    raise UserError(f"{name}: expected the name of one split, found {found}; write {name.split('@')[0]}@{splits[0]}")


def _name_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HFValidationError

    # requests' errors are OSErrors; a wrong config is a ValueError, data sets made by code a RuntimeError or ValueError
    return (DatasetsError, HFValidationError, OSError, ValueError, NotImplementedError, RuntimeError)


def _hash_of_files(place: Place, files: Sequence[Place]) -> str:
    """Hash files of a folder: of pictures name and size, their content is looked at when they are measured."""
    parts = []
    for file in files:
        picture = file.path.suffix.lower() in _PICTURES
        content = str(file.path.stat().st_size) if picture else content_hash(file.path, file.cache)
        parts.append(f"{os.path.relpath(file.path, place.path)}\n{content}")
    return _joined(parts)


def _joined(parts: Iterator[str] | Sequence[str]) -> str:
    return hashlib.blake2b("\n\n".join(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
