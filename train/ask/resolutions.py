"""The resolutions at which an image may be shown to what was trained: those of its training."""

from __future__ import annotations

from train.ask.source import Source
from vl2.config import VL2Config, read_resolutions
from vl2.json_object import read_json_object
from vl2.tiles import Resolution, limit_candidates

PROCESSOR_CONFIG = "processor_config.json"


def resolutions_in_force(source: Source, config: VL2Config) -> tuple[Resolution, ...]:
    """Those in an adapter's own processor_config.json; else those of a run's `max_tiles`; else all of the base.

    Args:
        source: what is loaded or exported.
        config: of its base.

    Raises:
        UserError: a processor_config.json beside an adapter with resolutions that cannot be.
    """
    if source.kind == "adapter" and source.trained is not None and (source.trained / PROCESSOR_CONFIG).is_file():
        path = source.trained / PROCESSOR_CONFIG
        found = read_json_object(path).get("candidate_resolutions")
        if found is not None:
            return read_resolutions(found, str(path))
    if source.max_tiles is not None:
        return limit_candidates(config.candidate_resolutions, source.max_tiles)
    return config.candidate_resolutions
