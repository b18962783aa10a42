"""From the keys of `data` to what the room `data` takes: sources, how their rows are read, how pictures are opened."""

from __future__ import annotations

from collections.abc import Sequence

from data.images.pixels import Exif
from data.images.reader import ImageReader
from data.images.web_cache import default_folder
from data.settings import ReadSettings, SourceSettings
from train.config.data_schema import DataConfig, RowsConfig, SourceConfig


def source_settings(config: RowsConfig, paths: Sequence[str] | None = None) -> tuple[SourceSettings, ...]:
    """The sources of a data set: those of data.sources, or one for each path.

    Args:
        config: the keys of `data`.
        paths: files that are read as those of data.path, held-out ones for instance; None: data.path or data.sources.
    """
    if paths is None and isinstance(config, DataConfig) and config.sources:
        return tuple(_of_mixture(source, config) for source in config.sources)
    return tuple(
        SourceSettings(
            path=path,
            form=config.form,
            image_root=config.image_root,
            columns=dict(config.columns),
            system=config.system,
        )
        for path in (config.path if paths is None else paths)
    )


def _of_mixture(source: SourceConfig, config: DataConfig) -> SourceSettings:
    def said(own: str | None, common: str) -> str:
        return common if own is None else own

    return SourceSettings(
        path=source.path,
        name=source.name,
        form=said(source.form, config.form),
        image_root=said(source.image_root, config.image_root),
        columns=dict(config.columns if source.columns is None else source.columns),
        system=said(source.system, config.system),
        repeat=source.repeat,
        limit=source.limit,
    )


def read_settings(config: RowsConfig) -> ReadSettings:
    """How the rows of every source are read.

    Where rows are not trained on, pictures are read as a whole if bad rows are to be left out: found broken later, a
    picture would stop what is half done.
    """
    if not isinstance(config, DataConfig):
        return ReadSettings(
            unknown=config.unknown,  # type: ignore[arg-type]  # these three are checked by the schema
            on_bad_record=config.on_bad_record,  # type: ignore[arg-type]
            max_bad=config.max_bad,
            verify="decode" if config.on_bad_record == "skip" else "header",
        )
    return ReadSettings(
        special_tokens=config.special_tokens,  # type: ignore[arg-type]
        supervise=config.supervise,  # type: ignore[arg-type]
        unknown=config.unknown,  # type: ignore[arg-type]
        on_bad_record=config.on_bad_record,  # type: ignore[arg-type]
        max_bad=config.max_bad,
        verify=config.verify,  # type: ignore[arg-type]
    )


def image_reader(config: RowsConfig, exif: Exif) -> ImageReader:
    """What opens the pictures of the rows.

    Args:
        config: the keys of `data`.
        exif: what is done with the EXIF orientation: in training data.exif, later what training did.
    """
    return ImageReader(
        exif=exif,
        max_pixels=config.max_pixels,
        allow_private_urls=config.allow_private_urls,
        cache=default_folder(),
    )
