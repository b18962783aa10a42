"""Opens a data file for a run: read, measured, checked against the budget. The one door through which data comes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from data.images.reader import DEFAULT_READER, ImageReader
from data.jsonl import read_records
from data.measure import measure
from data.record import BadRecords, Record, RecordError, UnusableRows
from data.settings import OnBadRecord, SpecialTokens, Verify
from data.size_table import Size
from vl2.prompt import IMAGE_PLACEHOLDER
from vl2.tiles import Resolution, num_image_tokens
from vl2.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Usable records with their sizes."""

    records: tuple[Record, ...]
    """In the order of the file."""
    sizes: tuple[Size, ...]
    """One for each record."""
    fingerprint: str
    """sha256 hex of what the records say, their images' names and bytes, and their sizes; no absolute path, no time."""
    skipped: tuple[RecordError, ...]
    """Rows that were left out, with on_bad_record=skip."""


def open_dataset(
    path: str | PathLike[str],
    *,
    tokenizer: Tokenizer,
    candidates: Sequence[Resolution],
    images: ImageReader = DEFAULT_READER,
    max_tokens: int | None = None,
    max_tiles_per_pack: int | None = None,
    context: int | None = None,
    special_tokens: SpecialTokens = "error",
    on_bad_record: OnBadRecord = "error",
    max_bad: int = 0,
    verify: Verify = "header",
    cache: Path | None = None,
    workers: int | None = None,
) -> Dataset:
    """Read and measure a data file, and check that each conversation fits into a pack.

    Args:
        path: JSON lines with `messages` and `images`.
        tokenizer: counts the text.
        candidates: resolutions (width, height) in pixels an image may be shown at.
        images: opens the pictures.
        max_tokens: budget of a pack, tokens; None does not check.
        max_tiles_per_pack: budget of a pack, tiles with global views; None does not check.
        context: positions the model was made for, tokens; None does not check. Training may go beyond them.
        special_tokens: "error" refuses special tokens typed into a text, "neutralise" encodes them as plain text.
        on_bad_record: "error" stops at the first row that cannot be used, "skip" lists it in `skipped`.
        max_bad: rows that may be skipped.
        verify: "header" or "decode", see `data.measure.measure`.
        cache: file of the size table, see `default_cache`.
        workers: processes for measuring; None takes one a core.

    Raises:
        UserError: no such file; `RecordError` names file, row and field; `UnusableRows`: none is usable, or too many
            are bad.
    """
    bad = BadRecords(on_bad_record=on_bad_record, max_bad=max_bad)
    read = read_records(path, tokenizer=tokenizer, special_tokens=special_tokens, bad=bad)
    longest = min([limit for limit in (max_tokens, context) if limit is not None], default=None)
    records = []
    for record in read:  # before they are measured: to encode a text of 50 MB takes minutes and all memory
        if problem := _far_too_long(record, tokenizer, longest):
            bad.add(problem)
        else:
            records.append(record)
    sizes = measure(records, tokenizer, candidates, images=images, cache=cache, workers=workers, verify=verify, bad=bad)
    kept: list[tuple[Record, Size]] = []
    for record, size in zip(records, sizes, strict=True):
        if size is None:
            continue
        problem = _over_budget(record, size, max_tokens, max_tiles_per_pack, context)
        if problem:
            bad.add(problem)
        else:
            kept.append((record, size))
    if not kept:
        found = f"none; all {len(bad.skipped)} rows were skipped" if bad.skipped else "an empty file"
        raise UnusableRows(f"{path}: empty dataset: expected at least one conversation, found {found}", bad.skipped)
    return Dataset(
        records=tuple(record for record, _ in kept),
        sizes=tuple(size for _, size in kept),
        fingerprint=_fingerprint(kept, tokenizer),
        skipped=tuple(sorted(bad.skipped, key=lambda error: error.row)),
    )


def default_cache(path: str | PathLike[str]) -> Path:
    """Return the size table's usual place for a data file: in the user's cache folder, named after the file's path."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]
    return root / "deepseek-vl2-finetune" / f"sizes-{name}.npz"


def _far_too_long(record: Record, tokenizer: Tokenizer, longest: int | None) -> RecordError | None:
    if longest is None:
        return None
    texts = [message.content.strip() for message in record.messages]
    least = sum(map(tokenizer.least_tokens, texts))
    if least <= longest:
        return None
    characters = sum(map(len, texts))
    return record.error(
        "messages",
        f"conversation of {characters} characters, at least {least} tokens, expected at most {longest} tokens; "
        "shorten it",
    )


def _over_budget(
    record: Record, size: Size, max_tokens: int | None, max_tiles_per_pack: int | None, context: int | None
) -> RecordError | None:
    of_images = sum(num_image_tokens(grid) for grid in size.grids)
    found = f"conversation of {size.tokens} tokens ({of_images} of them for {len(size.grids)} {IMAGE_PLACEHOLDER})"
    if max_tokens is not None and size.tokens > max_tokens:
        return record.error(
            "messages",
            f"{found}, expected at most data.max_tokens={max_tokens}; "
            "shorten it, lower data.max_tiles or raise data.max_tokens",
        )
    if context is not None and size.tokens > context:
        return record.error(
            "messages", f"{found}, expected at most the {context} that the model was made for; shorten it"
        )
    if max_tiles_per_pack is not None and size.tiles > max_tiles_per_pack:
        return record.error(
            "images",
            f"conversation of {size.tiles} tiles, expected at most data.max_tiles_per_pack={max_tiles_per_pack}; "
            "lower data.max_tiles or raise data.max_tiles_per_pack",
        )
    return None


def _fingerprint(kept: Sequence[tuple[Record, Size]], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for record, size in kept:
        messages = [[m.role, m.content, m.plain, m.learn] for m in record.messages]
        images = [[Path(image.name).name, Path(image.name).stat().st_size] for image in record.images]
        digest.update(
            json.dumps([messages, repr(record.boxes), images, size.tokens, size.supervised, size.grids]).encode()
        )
    return digest.hexdigest()
