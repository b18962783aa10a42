"""How pictures are shown to what was trained, as in its training: resolutions and orientation.

Both lie in processor_config.json beside an export or an adapter; of a run they are in its metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from data.images.pixels import Exif
from train.ask.source import Source
from vl2.checkpoint import published
from vl2.config import VL2Config, read_resolutions
from vl2.errors import UserError
from vl2.json_object import read_json_object
from vl2.tiles import Resolution, limit_candidates

PROCESSOR_CONFIG = "processor_config.json"
EXIF_KEY = "exif_orientation"
"""Of ours: the official processor takes the picture as its caller opened it, and passes over keys it does not know."""


def resolutions_in_force(source: Source, config: VL2Config) -> tuple[Resolution, ...]:
    """Those in an adapter's own processor_config.json; else those of a run's `max_tiles`; else all of the base.

    Args:
        source: what is loaded or exported.
        config: of its base.

    Raises:
        UserError: a processor_config.json beside an adapter with resolutions that cannot be.
    """
    path = _own_config(source)
    if path is not None and (found := read_json_object(path).get("candidate_resolutions")) is not None:
        return read_resolutions(found, str(path))
    if source.max_tiles is not None:
        return limit_candidates(config.candidate_resolutions, source.max_tiles)
    return config.candidate_resolutions


def exif_in_force(source: Source) -> Exif:
    """Whether pictures are turned as their EXIF data says: as an adapter's own file has it, a run, or the base.

    Args:
        source: what is loaded or exported.

    Raises:
        UserError: a processor_config.json that says neither ignore nor rotate.
    """
    own = _own_config(source)
    if own is not None and (found := _exif_of(own)) is not None:
        return found
    if source.exif is not None:
        return source.exif
    base = source.base / PROCESSOR_CONFIG
    return (_exif_of(base) if base.is_file() else None) or "ignore"


def processor_document(source: Source, config: VL2Config) -> dict[str, Any]:
    """processor_config.json with what is in force; of a base without one, the published models'.

    Args:
        source: what is exported.
        config: of its base.
    """
    own = source.base / PROCESSOR_CONFIG
    document = read_json_object(own if own.is_file() else published.PROCESSOR_CONFIG)
    if (resolutions := resolutions_in_force(source, config)) != config.candidate_resolutions:
        document["candidate_resolutions"] = [list(pair) for pair in resolutions]
    document.pop(EXIF_KEY, None)
    if exif_in_force(source) == "rotate":
        document[EXIF_KEY] = "rotate"
    return document


def _own_config(source: Source) -> Path | None:
    """The file that lies beside an adapter, made here or elsewhere."""
    if source.kind != "adapter" or source.trained is None:
        return None
    path = source.trained / PROCESSOR_CONFIG
    return path if path.is_file() else None


def _exif_of(path: Path) -> Exif | None:
    found = read_json_object(path).get(EXIF_KEY)
    if found not in (None, "ignore", "rotate"):
        raise UserError(f"{path}: {EXIF_KEY}: expected ignore or rotate, found {str(found)[:60]!r}")
    return cast(Exif | None, found)
