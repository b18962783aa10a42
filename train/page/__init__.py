"""Pages for the browser, each one file: what a run learns from, drawn."""
