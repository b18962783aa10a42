"""A configuration key: default, meaning, unit and range, all written once at the dataclass field.

Knows nothing of Hydra; `bash launch.sh help train` needs no installed package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from train.config.peers import OUR_VALUES, OURS
from vl2.errors import UserError

# Bounds where no smaller one has a reason: what fits a counter and a generator's seed everywhere.
MANY, LAST_SEED = 10**9, 2**32 - 1
LONGEST_TEXT = 1_000_000  # tokens; no model here has so long a context

# A list of texts, which a file may write as one text or null: OmegaConf has no type for that.
OneOrMore = Any


def key(
    default: Any = MISSING,
    doc: str = "",
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    path: bool = False,
    one_or_more: bool = False,
    entry_class: type | None = None,
    factory: Any = MISSING,
) -> Any:
    """A dataclass field that carries what `help` prints and what `check_values` enforces.

    Args:
        doc: What the key decides, a sentence or two.
        unit: Of the value: tokens, optimizer steps, tiles ...
        choices: The only texts allowed, for a text or for each entry of a list or table.
        low: Least value allowed; of a list or table, of each entry.
        high: Greatest value allowed.
        path: The value names a file or folder (a leading `~` is the home folder).
        one_or_more: The value is a list of texts, and may be written as one text, `[A,B]` or null.
        entry_class: Configuration class of a list's or table's entries. OmegaConf must not know it (the type is
            list[Any] or dict[str, Any]): its errors do not say which entry is wrong.
        factory: Makes the default where that is a list or a table.
    """
    metadata = {
        "doc": doc,
        "unit": unit,
        "choices": tuple(choices),
        "low": low,
        "high": high,
        "path": path,
        "one_or_more": one_or_more,
        "entry_class": entry_class,
    }
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Key:
    """One leaf of a configuration class, by its dotted name."""

    name: str
    type: Any  # the annotation without "| None"
    optional: bool
    default: Any
    doc: str
    unit: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None
    path: bool
    one_or_more: bool
    entry_class: type | None

    @property
    def is_table(self) -> bool:
        """Whether the value maps names to values."""
        return get_origin(self.type) is dict

    @property
    def is_text_table(self) -> bool:
        """Whether the value maps names to texts, which are taken as typed."""
        return self.type == dict[str, str]

    @property
    def is_list(self) -> bool:
        """Whether the value is a list."""
        return get_origin(self.type) is list

    @property
    def is_free_text(self) -> bool:
        """Whether the value is taken exactly as typed, past Hydra's grammar."""
        return self.type is str or (self.type == list[str] and not self.choices)

    @property
    def expected(self) -> str:
        """The type in words, for messages: `a whole number (tokens)`."""
        words = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "a text",
            list[str]: "a list [a,b]",
            dict[str, str]: "a table {name:text}",
            dict[str, int]: "a table {name:number}",
            dict[str, float]: "a table {name:number}",
            dict[str, Any]: "a table {name:{key:value}}",
        }.get(self.type, "a list [{key:value},...]")
        words += f" ({self.unit})" if self.unit else ""
        return f"{words} or null" if self.optional else words


def list_keys(schema: type, prefix: str = "") -> list[Key]:
    """Every leaf of a configuration class, in the order of the source."""
    hints, found = get_type_hints(schema), []
    for entry in fields(schema):
        annotation = hints[entry.name]
        if is_dataclass(annotation):
            found += list_keys(annotation, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
            continue
        members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        (kind,) = [member for member in members if member is not type(None)]
        if entry.metadata["one_or_more"]:
            kind = list[str]
        default = entry.default if entry.default is not MISSING else entry.default_factory()  # type: ignore[operator, misc]
        optional = type(None) in members
        found.append(Key(name=prefix + entry.name, type=kind, optional=optional, default=default, **entry.metadata))
    return found


def list_entry_keys(spec: Key, entry: str = "") -> list[Key]:
    """The leaves of an entry, `data.sources[2].path` or `optim.groups.NAME.lr_scale`; none where it has no class."""
    place = f"{spec.name}.{entry or 'NAME'}." if spec.is_table else f"{spec.name}[{entry}]."
    return list_keys(spec.entry_class, place) if spec.entry_class else []


def entries(spec: Key, value: Any) -> list[tuple[str, Any]]:
    """(place, entry) of each entry of a list or table whose entries are configurations."""
    if isinstance(value, dict):
        return [(f"{spec.name}.{name}", entry) for name, entry in value.items()]
    return [(f"{spec.name}[{i}]", entry) for i, entry in enumerate(value)]


def value_of(config: Any, name: str) -> Any:
    """The value at a dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def check_values(config: Any, prefix: str = "") -> None:
    """Checks every value's range and choices.

    Args:
        prefix: Goes before the names in errors: the place of an entry in its list.

    Raises:
        UserError: naming the key, what was expected and what was found.
    """
    for spec in list_keys(type(config)):
        value = value_of(config, spec.name)
        if value is None:
            continue
        spec = replace(spec, name=prefix + spec.name)
        if spec.entry_class:
            for name in value if spec.is_table else ():
                _check_choice(spec, name)
            for place, entry in entries(spec, value):
                check_values(entry, f"{place}.")
            continue
        for name, entry in (
            value.items() if spec.is_table else [(None, v) for v in value] if spec.is_list else [(None, value)]
        ):
            _check_value(spec, name, entry)


def _check_value(spec: Key, table_name: str | None, value: Any) -> None:
    name = f"{spec.name}.{table_name}" if table_name else spec.name
    _check_choice(spec, table_name or value)
    if spec.one_or_more and not (isinstance(value, str) and value):
        raise UserError(f"{name}={value}: expected a text, or a list of texts, none of them empty (null for none)")
    unit = f" {spec.unit}" if spec.unit else ""
    if spec.low is not None and not value >= spec.low:
        raise UserError(f"{name}={value}: expected at least {spec.low}{unit}")
    if spec.high is not None and not value <= spec.high:
        raise UserError(f"{name}={value}: expected at most {spec.high}{unit}")


def _check_choice(spec: Key, text: Any) -> None:
    if spec.choices and text not in spec.choices:
        instead = OUR_VALUES.get(f"{spec.name}={text}")
        hint = f"; did you mean {instead}?" if instead else did_you_mean(text, spec.choices)
        raise UserError(f"{spec.name}={text}: expected one of {', '.join(spec.choices)}{hint}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no known name is near; names that other programs use count as near."""
    known, leaf = list(known), name.split(".")[-1]
    near = [full for full in known if full.split(".")[-1] == leaf]  # `lr` for `optim.lr`
    near = near or [full for full in known if full == OURS.get(leaf)]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
