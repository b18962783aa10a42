"""What a `model=` folder holds: a base model, an export, an adapter, a run or one of its checkpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.store.facts import from_document, read_fact
from train.store.hub import resolve_model
from train.store.names import ADAPTER, EXPORT_REPORT, WEIGHTS, WEIGHTS_METADATA
from train.store.provenance import ExportReport, Provenance
from train.store.whole_folder import MANIFEST, damage
from vl2.adapter.formats import PADDLE_CONFIG, PEFT_CONFIG, adapter_format, adapter_metadata
from vl2.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a `model=` folder turned out to hold."""

    kind: Literal["base", "adapter", "weights"]  # base (also an export), adapter, or weights (a full fine-tune)
    base: Path  # folder of the base model
    trained: Path | None = None  # folder of the adapter or of the trained weights
    base_name: str = ""  # as the trained weights name it; empty where they do not
    provenance: Provenance | None = None  # of what was trained; None: nothing was, or not here
    export: ExportReport | None = None  # of a base that was exported here

    @property
    def rehearsal(self) -> bool:
        """Whether this comes from a rehearsal on nano."""
        made = self.provenance or self.export
        return made is not None and made.rehearsal

    @property
    def recipe(self) -> str:
        """Of the run that this comes from; empty where there was none."""
        made = self.provenance or self.export
        return made.recipe if made else ""

    @property
    def step(self) -> int | None:
        """Optimizer steps made, of a checkpoint; None: what a run ended with, or nothing was trained."""
        return self.provenance.step if self.provenance else None

    @property
    def max_tiles(self) -> int | None:
        """Most local tiles of an image in training; None: not known, or nothing was trained."""
        return self.provenance.max_tiles if self.provenance else None

    @property
    def exif(self) -> Literal["ignore", "rotate"] | None:
        """What training did with the EXIF orientation of pictures; None: not known, or nothing was trained."""
        return self.provenance.exif if self.provenance else None

    @property
    def precision(self) -> str | None:
        """Of the base in training, as the setting names it; None: not known, or nothing was trained."""
        return self.provenance.precision if self.provenance else None

    @property
    def frozen(self) -> str:
        """What the base's frozen matrices were kept in while it was trained, as the setting names it."""
        return self.provenance.frozen if self.provenance else "none"

    @property
    def random_seed(self) -> int | None:
        """Seed of a base whose weights were drawn and lie in no file; None: they lie in its folder."""
        return self.provenance.seed if self.provenance and self.provenance.init == "random" else None


def find_source(folder: str | Path, base: str = "", *, checksums: bool = False) -> Source:
    """Tell what lies in a folder: a checkpoint in the official layout, an adapter, a run, or a run's checkpoint.

    Args:
        folder: to look into.
        base: base model of what was trained; empty: the one it names.
        checksums: read the whole base where it has a manifest; else its files' sizes are looked at. What was trained
            is always read as a whole.

    Raises:
        UserError: when it is none of these, the base of an adapter cannot be found, or a file is not as it was written.
    """
    source = _find(Path(folder), base)
    if source.trained is not None:
        check_trained(source.trained)
    check_model(source.base, checksums=checksums)
    return source


def check_trained(folder: Path) -> None:
    """Refuse an adapter or trained weights that are not as they were written, by the manifest beside them.

    An adapter made elsewhere has none, and is not looked at.

    Raises:
        UserError: naming the file.
    """
    if (folder / MANIFEST).is_file():
        _refuse_damage(folder, damage(folder))
    elif (folder.parent / MANIFEST).is_file():  # a checkpoint's
        _refuse_damage(folder.parent, damage(folder.parent, inside=folder.name))


def check_model(folder: Path, *, checksums: bool) -> None:
    """Refuse a model that is not as it was written, where it has a manifest (an export).

    Args:
        folder: of the model.
        checksums: read all of it; False looks at sizes only.

    Raises:
        UserError: naming the file.
    """
    if (folder / MANIFEST).is_file():
        _refuse_damage(folder, damage(folder, checksums=checksums))


def _refuse_damage(folder: Path, reason: str | None) -> None:
    if reason:
        raise UserError(f"{folder}: damaged: {reason}; take another copy of the folder, or write it again")


def _find(folder: Path, base: str) -> Source:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a base model, a run, an adapter or an export")
    for trained in (folder, folder / ADAPTER, folder / WEIGHTS):
        provenance: Provenance | None
        if adapter_format(trained):
            provenance, name = adapter_provenance(trained)
            place = _base_of(trained, provenance, name, base)
            return Source(kind="adapter", base=place, trained=trained, base_name=name, provenance=provenance)
        if (trained / WEIGHTS_METADATA).is_file():
            provenance = read_fact(Provenance, trained / WEIGHTS_METADATA)
            place, name = _base_of(trained, provenance, provenance.base, base), provenance.base
            return Source(kind="weights", base=place, trained=trained, base_name=name, provenance=provenance)
    if base:
        raise UserError(f"base={base}: {folder} holds neither an adapter nor trained weights that would need a base")
    if (folder / "config.json").is_file():
        report = folder / EXPORT_REPORT
        return Source(kind="base", base=folder, export=read_fact(ExportReport, report) if report.is_file() else None)
    hint = ""
    if (folder / "checkpoints").is_dir():
        hint = "; the run is not finished: give checkpoint=last or best, or finish it with resume=auto"
    raise UserError(
        f"{folder}: neither a model (config.json) nor an adapter ({PADDLE_CONFIG}, {PEFT_CONFIG}) "
        f"nor a run (adapter/){hint}"
    )


def adapter_provenance(folder: Path) -> tuple[Provenance | None, str]:
    """Where an adapter comes from: what a run here wrote into it, or None; and the base model that it names.

    Raises:
        UserError: an entry of ours that cannot be read.
    """
    metadata = adapter_metadata(folder)
    if metadata.keys() <= {"base"}:  # made elsewhere
        return None, str(metadata.get("base") or "")
    provenance = from_document(Provenance, metadata, f"{folder}: the metadata of the adapter")
    return provenance, provenance.base


def _base_of(trained: Path, provenance: Provenance | None, name: str, given: str) -> Path:
    """Folder of the base model: the one given; or where the run had it; or what its name means here and now."""
    if given:
        return resolve_model(given)
    if not name:
        raise UserError(f"{trained}: this adapter does not name its base model; give base=FOLDER")
    problem = "no config.json"
    for place in filter(None, (provenance.base_path if provenance else "", name)):
        try:
            base = Path(place) if os.path.isabs(place) and Path(place).is_dir() else resolve_model(place)
            if (base / "config.json").is_file():
                return base
        except UserError as error:
            problem = str(error)
    raise UserError(
        f"{trained}: was trained on the base model {name}, which is not there now ({problem}); give base=FOLDER"
    )
