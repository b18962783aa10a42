"""The service: answers over HTTP, many at a time, and a page to try it on."""
