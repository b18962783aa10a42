"""The files of the page, given out so that nothing from elsewhere runs in it, and it runs in nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi.staticfiles import StaticFiles
from starlette.responses import Response

PAGE = Path(__file__).with_name("page")
# Scripts, styles and requests: this service's alone. Pictures: data URIs, which the page makes of the reader's files.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked again each time, so that an updated service has its own page
}


class PageFiles(StaticFiles):
    """Gives out the page at / and its files beside it."""

    def __init__(self) -> None:
        super().__init__(directory=PAGE, html=True)

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        """A file, or that it has not changed, with the headers."""
        response = super().file_response(*arguments, **options)
        response.headers.update(_HEADERS)
        return response
