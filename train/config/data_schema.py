"""Every setting of the data: which files, what their rows mean, which are held out, how they are packed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from train.config.fields import LAST_SEED, LONGEST_TEXT, MANY, OneOrMore, key

SOURCE_DOC = "a file, a folder, a glob, or a data set on the hub as NAME:CONFIG@SPLIT"
COLUMNS = ("user", "assistant", "system", "image")
EXIF = ("ignore", "rotate")
FORMS = ("auto", "messages", "conversations", "deepseek_vl2", "query", "alpaca", "texts", "columns")


@dataclass(kw_only=True)
class ShapesConfig:
    """Pictures of shapes that are drawn when there is neither data.path nor data.sources."""

    task: str = key("chinese", "What is asked about the pictures.", choices=("chinese", "pretrain"))
    train: int = key(2000, "Conversations to train on.", unit="conversations", low=1, high=1_000_000)
    test: int = key(200, "Conversations held out for the accuracy.", unit="conversations", low=1, high=1_000_000)
    seed: int = key(0, "Seed of the drawn pictures.", low=0, high=LAST_SEED)


@dataclass(kw_only=True)
class SourceConfig:
    """One source of a mixture; what it leaves null holds as data.KEY says."""

    path: str = key("", f"Where its rows are: {SOURCE_DOC}.", path=True)
    name: str = key("", "What metrics and reports call it; empty: its path.")
    form: str | None = key(None, "Form of its rows; null: data.form.", choices=FORMS)
    image_root: str | None = key(None, "Folder of its pictures; null: data.image_root.", path=True)
    columns: dict[str, str] | None = key(
        None, "Its columns of questions, answers and so on; null: data.columns.", choices=COLUMNS
    )
    system: str | None = key(None, "System message where a conversation has none; null: data.system.")
    repeat: float = key(
        1.0,
        "How often an epoch takes each row: 2.5 is twice, and half of the rows a third time.",
        unit="times an epoch",
        low=0.001,
        high=1000,
    )
    limit: int | None = key(None, "Take only its first rows.", unit="rows", low=1, high=MANY)


@dataclass(kw_only=True)
class RowsConfig:
    """Which files, and what their rows mean."""

    path: OneOrMore = key(
        None,
        f"Where the rows are: {SOURCE_DOC}; [A,B] or data.path=A data.path=B for several.",
        path=True,
        one_or_more=True,
    )
    form: str = key("auto", "Form of the rows; auto: found by their fields.", choices=FORMS)
    image_root: str = key(
        "", "Folder where picture paths start and that none may leave; empty: beside the file, anywhere.", path=True
    )
    columns: dict[str, str] = key(
        factory=dict, doc="Columns of questions, answers and so on: data.columns.user=question.", choices=COLUMNS
    )
    system: str = key("", "System message of conversations that have none.")
    unknown: str = key(
        "report", "Columns that no form knows are counted and listed, or refused.", choices=("report", "error")
    )
    max_pixels: int = key(
        100_000_000, "Pictures with more are refused before they are decoded.", unit="pixels", low=1, high=178_956_970
    )
    allow_private_urls: bool = key(False, "Fetch pictures from addresses of private and local networks too.")
    on_bad_record: str = key(
        "error", "A record that cannot be used stops everything, or is left out.", choices=("error", "skip")
    )
    max_bad: int = key(
        100, "With on_bad_record=skip: more than that many stop everything.", unit="records", low=0, high=MANY
    )
    measure_workers: int | None = key(
        None, "Processes that measure the rows; null: one a core.", unit="processes", low=1, high=256
    )


@dataclass(kw_only=True)
class DataConfig(RowsConfig):
    """The data set and how it is packed."""

    path: OneOrMore = key(
        None,
        f"Where the rows are: {SOURCE_DOC}; [A,B] or data.path=A data.path=B for several. "
        "null: data.sources, or else drawn shapes (data.shapes).",
        path=True,
        one_or_more=True,
    )
    sources: list[Any] = key(
        factory=list,
        entry_class=SourceConfig,
        doc="A mixture, instead of data.path: [{path: A, repeat: 2}, {path: B}], best written in a file.",
    )
    eval_path: OneOrMore = key(
        None,
        "Held-out rows to ask, read as data.path; [A,B] for several. null: none, or the shapes' own.",
        path=True,
        one_or_more=True,
    )
    eval_fraction: float | None = key(
        None,
        "Hold this part of the rows out of training and ask them, chosen by what a row says, not by its place.",
        unit="part of the rows",
        low=0.0001,
        high=0.9,
    )
    eval_rows: int | None = key(
        None,
        "Ask at most that many held-out rows; without data.eval_fraction 0.05 of all rows are held out.",
        unit="rows",
        low=1,
        high=MANY,
    )
    supervise: str = key("all", "Every answer of a conversation is learned, or its last.", choices=("all", "last"))
    exif: str = key(
        "ignore", "Pictures as stored (so the model was made), or turned as their EXIF data says.", choices=EXIF
    )
    max_tokens: int = key(
        4096, "Budget of a pack; no conversation may be longer.", unit="tokens", low=64, high=LONGEST_TEXT
    )
    max_tiles: int = key(9, "Most local tiles of one image: the first to turn down.", unit="tiles", low=1, high=9)
    max_tiles_per_pack: int = key(32, "Most tiles of a pack, global views counted.", unit="tiles", low=2, high=10_000)
    verify: str = key("header", "What is read of each image before training.", choices=("header", "decode"))
    order: str = key(
        "random",
        "Rows in random order, or as in the files, one after the other (a curriculum).",
        choices=("random", "file"),
    )
    special_tokens: str = key(
        "error", "A special token typed into a text is refused, or made plain text.", choices=("error", "neutralise")
    )
    workers: int = key(
        2,
        "Processes that build packs beside each trainer; 0: it builds them itself, and measures alone too.",
        unit="processes",
        low=0,
        high=256,
    )
    vision_cache: str = key(
        "",
        "Folder for what the frozen vision tower makes of each picture, which later epochs and runs read; empty: none.",
        path=True,
    )
    shapes: ShapesConfig = field(default_factory=ShapesConfig)


@dataclass(kw_only=True)
class EvalDataConfig(RowsConfig):
    """Held-out rows whose questions `eval` asks."""
