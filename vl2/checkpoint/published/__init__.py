"""The three published DeepSeek-VL2: their config.json, and how their tensors are spread over files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
PROCESSOR_CONFIG = FOLDER / "processor_config.json"  # the same for all three
# A shard of the published checkpoints ends with the tensor that brings it to 8 GiB.
SHARD_BYTES = 8 * 2**30


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published checkpoint."""

    name: str  # on the hub, without the organisation
    config: Path
    # Saved from two pipeline stages, each with shards of its own: the decoder layer that the second begins with.
    second_stage: int | None = None


PUBLISHED = {
    entry.name: entry
    for entry in (
        Published(name="deepseek-vl2-tiny", config=FOLDER / "deepseek-vl2-tiny" / "config.json"),
        Published(name="deepseek-vl2-small", config=FOLDER / "deepseek-vl2-small" / "config.json"),
        Published(name="deepseek-vl2", config=FOLDER / "deepseek-vl2" / "config.json", second_stage=15),
    )
}


def published(path: str | Path) -> Published | None:
    """The published model that a name on the hub means (deepseek-ai/deepseek-vl2-tiny); None for any other path."""
    organisation, _, name = str(path).partition("/")
    return PUBLISHED.get(name) if organisation == "deepseek-ai" and not Path(path).is_dir() else None
