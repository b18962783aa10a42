"""What a run writes about what it trained, for tests that make a run's folder by hand."""

from pathlib import Path
from typing import Any

from train.store.facts import to_document
from train.store.provenance import Provenance
from vl2.checkpoint.fingerprint import stored_fingerprint
from vl2.checkpoint.model_folder import open_folder


def provenance(base: Path, **changes: Any) -> dict[str, Any]:
    """The metadata of a rehearsal's adapter, some of it another."""
    fields: dict[str, Any] = {
        "recipe": "sft_tiny",
        "rehearsal": True,
        "base": str(base),
        "base_path": str(base),
        "init": "weights",
        "seed": 42,
        "max_tiles": 4,
        "precision": "bf16",
        "step": None,
        "versions": {},
        **changes,
    }
    if "base_fingerprint" not in fields:
        fields["base_fingerprint"] = stored_fingerprint(open_folder(base).weights, "bfloat16")
    return to_document(Provenance(**fields))
