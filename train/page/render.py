"""From a template to a page of one file: styles and script inside, everything foreign escaped, nothing fetched.

Texts of the data are foreign: the templates escape whatever they are given, `visible` gives unseen characters a shape,
and the page's own policy lets a browser run the one script that is ours, and fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from train.page.visible import visible

_FOLDER = Path(__file__).parent


def render_page(
    template: str,
    *,
    script: str | None = None,
    styles: Sequence[str],
    tests: Mapping[str, Callable[[Any], bool]] | None = None,
    **values: Any,
) -> str:
    """Fill in a template of this folder.

    Args:
        template: name of its file.
        script: name of the script's file, the only one that may run; None: none.
        styles: names of style sheets.
        tests: of its own, by name.
        values: what it is filled with.

    Returns:
        HTML that refers to nothing outside of it.
    """
    code = (_FOLDER / script).read_text("utf-8") if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests.update(tests or {})
    environment.filters["thousands"] = lambda number: f"{number:,}"
    style = "".join((_FOLDER / name).read_text("utf-8") for name in styles)
    return environment.get_template(template).render(style=style, script=code, digest=digest, **values)


def write_page(path: Path, page: str) -> None:
    """Write a page; a reader sees the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
