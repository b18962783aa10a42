"""Merged weights and adapters out, verified."""
