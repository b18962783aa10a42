"""What OmegaConf has no type for: one text or several, and lists and tables whose entries are configurations."""

from __future__ import annotations

import os
from typing import Any

from train.config.fields import Key, did_you_mean, entries, list_keys, value_of
from vl2.errors import UserError

_MAX_SHOWN = 100  # characters of a value in an error


def settle(config: Any) -> None:
    """Make one-or-more keys lists, entries dataclasses, and the `~` of paths the home folder, in place.

    Raises:
        UserError: an entry with an unknown key or a wrong type, by its place: data.sources[1].repeat.
    """
    for spec in list_keys(type(config)):
        group, _, leaf = spec.name.rpartition(".")
        owner = value_of(config, group) if group else config
        value = getattr(owner, leaf)
        if spec.entry_class:
            read = [_read_entry(spec.entry_class, entry, place) for place, entry in entries(spec, value)]
            value = dict(zip(value, read)) if spec.is_table else read
        if spec.one_or_more and not isinstance(value, list):
            value = [] if value in (None, "") else [value]
        if spec.path:  # bash leaves the `~` of `key=~/x` alone, and so does YAML
            if isinstance(value, dict):
                value = {name: _as_path(text) for name, text in value.items()}
            else:
                value = [_as_path(text) for text in value] if isinstance(value, list) else _as_path(value)
        setattr(owner, leaf, value)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _as_path(text: Any) -> Any:
    return os.path.expanduser(text) if isinstance(text, str) and text.startswith("~") else text


def _read_entry(schema: type, entry: Any, place: str) -> Any:
    if not isinstance(entry, dict):
        raise UserError(f"{place}={_shown(entry)}: expected {{key: value}}, found {type(entry).__name__}")
    specs = {spec.name: spec for spec in list_keys(schema)}
    for name, value in entry.items():
        if name not in specs:
            raise UserError(
                f"unknown key {f'{place}.{name}'!r}{did_you_mean(str(name), specs)} (expected {', '.join(specs)})"
            )
        if not _fits(specs[name], value):
            raise UserError(
                f"{place}.{name}={_shown(value)}: expected {specs[name].expected}, found {type(value).__name__}"
            )
    config = schema(
        **{name: float(v) if type(v) is int and specs[name].type is float else v for name, v in entry.items()}
    )
    settle(config)
    return config


def _fits(spec: Key, value: Any) -> bool:
    if value is None:
        return spec.optional
    if spec.is_text_table:
        return isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)
    kinds = (int, float) if spec.type is float else spec.type
    return isinstance(value, kinds) and (spec.type is bool or not isinstance(value, bool))
